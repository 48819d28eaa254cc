"""The platform room: megatron-core on the CPU, layouts, collectives, and the shared workers of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_gpt
import torch
from parallel import Pool, RankFailedError, run_parallel

from mstar_mega.config import ParallelConfig
from mstar_mega.platform import distributed
from mstar_mega.platform.cpu import apply_cpu_platform
from mstar_mega.platform.memory import peak_memory_bytes
from mstar_mega.training.checkpoint import load_latest, save_checkpoint

only_without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        (ParallelConfig(tensor=2, pipeline=2), 6, ["tensor 2", "pipeline 2", "= 4", "6 ranks", "--nproc-per-node 4"]),
        (ParallelConfig(tensor=2), 1, ["= 2", "has 1 rank.", "lower"]),
        (ParallelConfig(sequence=True), 1, ["parallel.sequence", "parallel.tensor is 1"]),
        (ParallelConfig(pipeline=0), 1, ["parallel.pipeline is 0"]),
    ],
)
def test_impossible_sizes_say_what_is_wrong(parallel: ParallelConfig, ranks: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        distributed.check_sizes(parallel, ranks)
    assert all(word in str(error.value) for word in words), error.value


def describe_layout(tensor: int, pipeline: int) -> distributed.Layout:
    distributed.initialize(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=0)
    return distributed.layout()


def test_layouts_of_four_ranks_in_one_process_group() -> None:
    for tensor, pipeline in [(1, 1), (2, 2), (4, 1), (1, 4)]:
        places = run_parallel(4, "test_platform:describe_layout", tensor, pipeline)
        coordinates = {(p.tensor_rank, p.pipeline_rank, p.data_rank) for p in places}
        assert len(coordinates) == 4
        assert {(p.tensor_size, p.pipeline_size, p.data_size) for p in places} == {
            (tensor, pipeline, 4 // tensor // pipeline)
        }
        assert [p.is_main for p in places] == [True, False, False, False]


def count_groups() -> list[int]:
    counts = []
    for tensor in (1, 2, 1):
        distributed.initialize(ParallelConfig(tensor=tensor), seed=0)
        counts.append(len(torch.distributed.distributed_c10d._world.pg_map))
    return counts


def test_a_former_layouts_groups_are_given_back() -> None:
    for counts in run_parallel(2, "test_platform:count_groups"):
        assert counts[2] == counts[0]


def talk() -> tuple[list[int], str, dict[str, float]]:
    distributed.initialize(ParallelConfig(tensor=2), seed=0)
    rank = distributed.layout().rank
    gathered = distributed.all_gather_objects(rank)
    text = distributed.broadcast_object(f"from rank {rank}")
    sums = distributed.sum_over_data({"all": 1.5 + rank, f"rank {rank}": 1.0})
    distributed.barrier()
    return gathered, text, sums


def test_collectives_follow_the_data_parallel_groups() -> None:
    # Tensor parallel 2 over four ranks: {0, 1} and {2, 3} are model copies, {0, 2} and {1, 3} data-parallel groups.
    results = run_parallel(4, "test_platform:talk")
    assert [gathered for gathered, _, _ in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert {text for _, text, _ in results} == {"from rank 0"}
    assert results[2][2] == {"all": 5.0, "rank 0": 1.0, "rank 2": 1.0}


def train_from(checkpoints: str, parallel: ParallelConfig, steps: int) -> list[float]:
    run = tiny_gpt.build(parallel, seed=99)
    loaded = load_latest(Path(checkpoints), run.sharded_state)
    assert loaded is not None
    run.load(loaded[0])
    return tiny_gpt.train(run, range(steps))


def save_untrained(checkpoints: str) -> None:
    run = tiny_gpt.build(ParallelConfig())
    save_checkpoint(Path(checkpoints), "start", run.sharded_state(), {})


def test_training_losses_agree_in_every_layout(tmp_path: Path) -> None:
    run_parallel(1, "test_platform:save_untrained", str(tmp_path))
    reference = run_parallel(1, "test_platform:train_from", str(tmp_path), ParallelConfig(), 3)[0]
    assert reference[-1] < reference[0]
    for tensor, pipeline, data in [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]:
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
        losses = run_parallel(tensor * pipeline * data, "test_platform:train_from", str(tmp_path), parallel, 3)[0]
        assert losses == pytest.approx(reference, rel=2e-5), (tensor, pipeline, data)


@only_without_cuda
def test_only_megatron_sees_another_torch() -> None:
    apply_cpu_platform()
    apply_cpu_platform()
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch.zeros(1, device="cuda").device == torch.device("cpu")
    assert clip_grads.torch.Tensor is torch.Tensor
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        torch.zeros(1).cuda()
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        torch.cuda.current_stream()
    inside: dict[str, Any] = {"__name__": "megatron.core.somewhere", "torch": torch}
    exec("def stream(): return torch.cuda.current_stream()", inside)
    assert inside["stream"]() is None
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).type(torch.int32).dtype is torch.int32
    # A mode would slow down every operation of decoding.
    assert torch._C._len_torch_function_stack() == 0


def train_in_bfloat16() -> tuple[list[float], set[str]]:
    with warnings.catch_warnings(record=True) as caught:
        run = tiny_gpt.build(ParallelConfig(), precision=torch.bfloat16)
        losses = tiny_gpt.train(run, range(6))
    shown = {str(w.message) for w in caught if issubclass(w.category, (UserWarning, FutureWarning))}
    return losses, shown


def test_mixed_precision_trains_and_warns_of_nothing() -> None:
    losses, shown = run_parallel(1, "test_platform:train_in_bfloat16")[0]
    assert losses[-1] < losses[0]
    assert not shown


def draw_and_recompute() -> tuple[bool, bool, bool, bool]:
    distributed.initialize(ParallelConfig(), seed=5)
    from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker

    outside = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3)
    after = torch.rand(3)
    distributed.initialize(ParallelConfig(), seed=5)
    undisturbed = torch.equal(torch.rand(6), torch.cat([outside, after]))
    with get_cuda_rng_tracker().fork():
        own_stream = torch.equal(torch.rand(3), inside)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(x * x, 0.5)

    gradients = []
    for layer in (noisy, lambda x: checkpoint(noisy, False, x)):
        distributed.initialize(ParallelConfig(), seed=5)
        x = torch.ones(64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    return torch.equal(inside, outside), undisturbed, own_stream, torch.equal(gradients[0], gradients[1])


def test_random_states_are_kept_apart_and_recomputed() -> None:
    same_draws, undisturbed, own_stream, same_gradients = run_parallel(1, "test_platform:draw_and_recompute")[0]
    assert not same_draws
    assert undisturbed and own_stream
    assert same_gradients


@only_without_cuda
def test_a_plain_process_starts_alone_and_prints_nothing() -> None:
    program = """
import tiny_gpt, torch
from mstar_mega.config import ParallelConfig
from mstar_mega.platform import distributed
tiny_gpt.train(tiny_gpt.build(ParallelConfig()), range(1))
print(distributed.layout().world_size, torch.get_num_threads())
distributed.shutdown()
distributed.shutdown()
print(torch.distributed.is_initialized())
"""
    drop = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=900)
    assert done.stdout.split() == ["1", str(len(os.sched_getaffinity(0))), "False"], done.stderr
    assert done.stderr == ""


def measure_peaks() -> tuple[int, int]:
    before = peak_memory_bytes()
    block = bytearray(b"x") * (before + (64 << 20))
    after = peak_memory_bytes()
    return before, after - len(block)


def test_peak_memory_counts_what_was_touched() -> None:
    # A block larger than the process ever was must raise its peak by at least the difference.
    before, rest = run_parallel(1, "test_platform:measure_peaks")[0]
    assert before > 10 << 20
    assert rest > 0


def visible_gpus() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_workers_never_see_a_gpu() -> None:
    before = visible_gpus()
    assert run_parallel(2, "test_platform:visible_gpus") == ["", ""]
    assert visible_gpus() == before


def fail_on(rank: int) -> int:
    distributed.initialize(ParallelConfig(), seed=0)
    if distributed.layout().rank == rank or rank < 0:
        raise KeyError("a wrong key")
    return rank


def die() -> None:
    os._exit(3)


def sleep_for_ever() -> None:
    time.sleep(1000)


def test_workers_report_exceptions_deaths_and_hangs() -> None:
    pool = Pool(2)
    assert [p.rank for p in pool.run("test_platform:describe_layout", 1, 1)] == [0, 1]
    with pytest.raises(RankFailedError, match="KeyError: 'a wrong key'"):
        pool.run("test_platform:fail_on", -1)
    assert pool.alive, "ranks that failed together go on"
    with pytest.raises(RankFailedError, match=r"(?s)rank 0: returned normally.*rank 1: Traceback.*a wrong key"):
        pool.run("test_platform:fail_on", 1)
    assert not pool.alive, "ranks that have come apart are ended"
    pool = Pool(1)
    with pytest.raises(RankFailedError, match="died with exit code 3"):
        pool.run("test_platform:die")
    assert not pool.alive
    pool = Pool(1)
    pool.run("test_platform:describe_layout", 1, 1)
    with pytest.raises(RankFailedError, match=r"(?s)did not end in time.*in sleep_for_ever"):
        pool.run("test_platform:sleep_for_ever", timeout_s=1.0)
    assert not pool.alive
