"""Checkpoints: exact, independent of the layout, complete or absent, and never believed when damaged."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gpt
import torch
import torch.distributed as dist
from parallel import Pool, run_parallel

from mstar_mega.config import ParallelConfig
from mstar_mega.platform import distributed
from mstar_mega.platform.cpu import apply_cpu_platform
from mstar_mega.training import checkpoint
from mstar_mega.training.checkpoint import (
    CheckpointWriteError,
    find_checkpoints,
    load_checkpoint,
    load_latest,
    prune,
    save_checkpoint,
)
from mstar_mega.training.manifest import MANIFEST, STAMP, DamagedCheckpointError


def train_and_save(
    directory: str, parallel: ParallelConfig, saved_at: int, total: int, precision: torch.dtype = torch.float32
) -> tuple[list[float], list[Any]]:
    """Train ``total`` steps, saving after ``saved_at``; returns all losses and this rank's final state."""
    run = tiny_gpt.build(parallel, precision=precision)
    losses = tiny_gpt.train(run, range(saved_at))
    save_checkpoint(Path(directory), f"step-{saved_at}", run.sharded_state(), {"step": saved_at, "note": [1.25, "x"]})
    losses += tiny_gpt.train(run, range(saved_at, total))
    return losses, tiny_gpt.weights(run)


def resume(
    directory: str, parallel: ParallelConfig, total: int, precision: torch.dtype = torch.float32
) -> tuple[list[float], list[Any], dict[str, Any]]:
    """Continue the newest checkpoint of a directory in a model that started elsewhere."""
    run = tiny_gpt.build(parallel, seed=7, precision=precision)
    loaded = load_latest(Path(directory), run.sharded_state)
    assert loaded is not None
    state, common, _ = loaded
    run.load(state)
    return tiny_gpt.train(run, range(common["step"], total)), tiny_gpt.weights(run), common


@pytest.mark.parametrize("saved_at", [0, 2])
@pytest.mark.parametrize(("tensor", "precision"), [(1, torch.float32), (2, torch.float32), (1, torch.bfloat16)])
def test_resuming_in_the_same_layout_is_bit_exact(
    tmp_path: Path, tensor: int, precision: torch.dtype, saved_at: int
) -> None:
    parallel, directory = ParallelConfig(tensor=tensor), str(tmp_path)
    whole = run_parallel(tensor, "test_checkpoint:train_and_save", directory, parallel, saved_at, 4, precision)
    resumed = run_parallel(tensor, "test_checkpoint:resume", directory, parallel, 4, precision)
    for (losses, state), (later_losses, later_state, common) in zip(whole, resumed, strict=True):
        assert common == {"step": saved_at, "note": [1.25, "x"]}
        assert later_losses == losses[saved_at:]
        assert len(state) == len(later_state) > 60
        assert all(torch.equal(a, b) for a, b in zip(state, later_state, strict=True))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2)])
def test_a_checkpoint_continues_in_every_layout(tmp_path: Path, tensor: int, pipeline: int) -> None:
    saver = ParallelConfig(tensor=tensor, pipeline=pipeline)
    losses, _ = run_parallel(tensor * pipeline, "test_checkpoint:train_and_save", str(tmp_path), saver, 2, 4)[0]
    for other_tensor, other_pipeline in [(1, 1), (2, 1), (1, 2), (2, 2)]:
        parallel = ParallelConfig(tensor=other_tensor, pipeline=other_pipeline)
        size = other_tensor * other_pipeline
        continued, _, _ = run_parallel(size, "test_checkpoint:resume", str(tmp_path), parallel, 4)[0]
        assert continued == pytest.approx(losses[2:], rel=2e-5), (other_tensor, other_pipeline)


# A state small enough to damage in every way: one sharded tensor, one plain value.


def small_state(value: float | None = None) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor

    apply_cpu_platform()
    rank = dist.get_rank()
    data = torch.full((4, 8), -1.0 if value is None else value + rank)
    offsets = (0, rank, dist.get_world_size())
    return {"weight": ShardedTensor.from_rank_offsets("weight", data, offsets, replica_id=0), "plain": value}


def save_small(directory: str, names: list[str]) -> None:
    for name in names:
        step = int(name.rpartition("-")[2])
        save_checkpoint(Path(directory), name, small_state(float(step)), {"step": step})


def outcome_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (DamagedCheckpointError, CheckpointWriteError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def try_each(path: str) -> str:
    return outcome_of(lambda: load_checkpoint(Path(path), small_state()))


def latest(directory: str) -> tuple[float, dict[str, Any], list[str]] | None:
    """Value and common state of the newest good checkpoint, and the warnings on the way there."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    checkpoint.logger.addHandler(handler)
    try:
        loaded = load_latest(Path(directory), small_state)
    finally:
        checkpoint.logger.removeHandler(handler)
    if loaded is None:
        return None
    state, common, _ = loaded
    assert state["plain"] == float(state["weight"][0, 0]) - dist.get_rank()
    return state["plain"], common, messages


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def test_every_damage_is_detected_named_and_skipped(tmp_path: Path) -> None:
    run_parallel(2, "test_checkpoint:save_small", str(tmp_path), ["step-9", "step-10"])
    newest = tmp_path / "step-10"
    assert find_checkpoints(tmp_path) == [newest, tmp_path / "step-9"]
    files = sorted(path.name for path in newest.iterdir())
    assert len(files) == 7 and MANIFEST in files
    pristine = tmp_path / "pristine"
    shutil.copytree(newest, pristine)
    for name in files:
        for damage in (flip_a_bit, truncate, Path.unlink):
            damage(newest / name)
            errors = run_parallel(2, "test_checkpoint:try_each", str(newest))
            assert all(error.startswith("DamagedCheckpointError") and name in error for error in errors), errors
            shutil.copy(pristine / name, newest / name)
    assert run_parallel(2, "test_checkpoint:try_each", str(newest)) == ["", ""]
    shutil.rmtree(pristine)

    flip_a_bit(newest / "__1_0.distcp")
    (main_value, common, warnings), (other_value, _, quiet) = run_parallel(2, "test_checkpoint:latest", str(tmp_path))
    assert (main_value, other_value, common) == (9.0, 9.0, {"step": 9})
    assert len(warnings) == 1 and str(newest / "__1_0.distcp") in warnings[0] and not quiet


def test_every_release_of_megatron_finds_its_own_stamp(tmp_path: Path) -> None:
    """The newer ones write fewer fields and ignore what they do not know; the older ones want all."""
    from megatron.core.dist_checkpointing.core import maybe_load_config

    run_parallel(1, "test_checkpoint:save_small", str(tmp_path), ["step-3"])
    stamp = maybe_load_config(str(tmp_path / "step-3"))
    assert (stamp.sharded_backend, stamp.sharded_backend_version) == ("torch_dist", 1)
    assert {"common_backend": "torch", "common_backend_version": 1}.items() <= json.loads(
        (tmp_path / "step-3" / STAMP).read_text()
    ).items()


def test_no_byte_of_the_manifest_can_change_unnoticed(tmp_path: Path) -> None:
    run_parallel(1, "test_checkpoint:save_small", str(tmp_path), ["step-3"])
    file = tmp_path / "step-3" / MANIFEST
    text = file.read_text()
    assert '"step": 3' in text
    file.write_text(text.replace('"step": 3', '"step": 4'))
    assert "was altered" in run_parallel(1, "test_checkpoint:try_each", str(file.parent))[0]


def load_as_other_model(path: str) -> tuple[str, str]:
    from megatron.core.dist_checkpointing import ShardedTensor

    apply_cpu_platform()
    other_name = {"bias": ShardedTensor.from_rank_offsets("bias", torch.zeros(4, 8))}
    other_shape = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(4, 9))}
    return (
        outcome_of(lambda: load_checkpoint(Path(path), other_name)),
        outcome_of(lambda: load_checkpoint(Path(path), other_shape)),
    )


def test_another_models_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    run_parallel(1, "test_checkpoint:save_small", str(tmp_path), ["step-1"])
    name, shape = run_parallel(1, "test_checkpoint:load_as_other_model", str(tmp_path / "step-1"))[0]
    assert name.startswith("ValueError") and "step-1 does not fit this model" in name and "bias" in name
    assert shape.startswith("ValueError") and "(4, 9)" in shape and "weight" in shape
    assert len(name) < 400 and len(shape) < 400


class _Killed(BaseException):
    """Stands for a kill at one point: nothing that handles errors may run."""


def save_and_be_killed(directory: str, point: int) -> bool:
    """Save step 2, killed before the ``point``-th change of the disk; True when the save came to its end."""
    seen = 0
    inside_torch = False

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen, inside_torch
            if inside_torch:  # it would turn the stand-in for a kill into an ordinary error
                return change(*args, **kwargs)
            seen += 1
            if seen == point:
                raise _Killed
            inside_torch = change is real_torch_save
            try:
                return change(*args, **kwargs)
            finally:
                inside_torch = False

        return call

    real_torch_save = checkpoint.torch_dist_save

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "torch_dist_save", counted(real_torch_save))
        patch.setattr(torch, "save", counted(torch.save))
        patch.setattr(os, "fsync", counted(os.fsync))
        for method in ("mkdir", "rename", "write_text"):
            patch.setattr(Path, method, counted(getattr(Path, method)))
        try:
            save_checkpoint(Path(directory), "step-2", small_state(2.0), {"step": 2})
        except _Killed:
            return False
    return True


def kill_at_every_point(parent: str) -> list[tuple[tuple[Any, ...], list[str]]]:
    """What is found after each kill, and the names then left in the directory."""
    found = []
    for point in range(1, 100):
        directory = os.path.join(parent, str(point))
        save_small(directory, ["step-1"])
        done = save_and_be_killed(directory, point)
        good = latest(directory)
        assert good is not None
        found.append((good, sorted(os.listdir(directory))))
        if done:
            break
    return found


def test_a_save_killed_at_any_point_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    found = run_parallel(1, "test_checkpoint:kill_at_every_point", str(tmp_path))[0]
    values = [value for (value, _, _), _ in found]
    assert len(values) > 8 and values[0] == 1.0 and values[-1] == 2.0
    assert values == sorted(values), "once it is there it stays"
    for (value, common, warnings), names in found:
        assert common == {"step": value} and not warnings
        assert names == [f"step-{n}" for n in range(1, int(value) + 1)], "leftovers are cleared away"


def save_for_ever(directory: str) -> None:
    for step in range(1, 100_000):
        save_checkpoint(Path(directory), f"step-{step}", small_state(float(step)), {"step": step})
        prune(Path(directory), keep=2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_kill_9_while_saving(tmp_path: Path, world_size: int) -> None:
    randomness = random.Random(world_size)
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        pool = Pool(world_size)
        pool.send("test_checkpoint:save_for_ever", str(directory))
        deadline = time.monotonic() + 60
        while len(find_checkpoints(directory)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(randomness.random() * 0.2)
        os.kill(pool.processes[-1].pid or 0, signal.SIGKILL)
        pool.close()
        seen = find_checkpoints(directory)[0].name
        value, common, warnings = run_parallel(world_size, "test_checkpoint:latest", str(directory))[0]
        assert (f"step-{int(value)}", common, warnings) == (seen, {"step": int(value)}, [])


def save_to_a_full_disk(directory: str) -> list[str]:
    """Rank 1 may write only little (the system refuses more); every rank's error, then a save that works again."""
    state = small_state(5.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        error = outcome_of(lambda: save_checkpoint(Path(directory), "step-5", state, {"step": 5}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    distributed.barrier()
    names = sorted(os.listdir(directory))
    distributed.barrier()
    save_checkpoint(Path(directory), "step-6", small_state(6.0), {"step": 6})
    return [error, *names]


def test_a_full_disk_fails_on_all_ranks_and_spares_the_rest(tmp_path: Path) -> None:
    run_parallel(2, "test_checkpoint:save_small", str(tmp_path), ["step-4"])
    for error, *names in run_parallel(2, "test_checkpoint:save_to_a_full_disk", str(tmp_path), timeout_s=30.0):
        assert error.startswith("CheckpointWriteError") and "'step-5'" in error and "rank 1" in error, error
        assert str(tmp_path) in error and "intact" in error
        assert names == ["step-4"]
    assert run_parallel(2, "test_checkpoint:latest", str(tmp_path))[0][0] == 6.0


def save_over_and_prune(directory: str) -> list[str]:
    save_checkpoint(Path(directory), "step-11", small_state(11.0), {"step": 11})
    save_checkpoint(Path(directory), "step-11", small_state(12.0), {"step": 12})
    prune(Path(directory), keep=2)
    return [path.name for path in find_checkpoints(Path(directory))]


def test_replacing_pruning_and_empty_directories(tmp_path: Path) -> None:
    run_parallel(1, "test_checkpoint:save_small", str(tmp_path), ["step-2", "step-9", "step-10"])
    assert run_parallel(1, "test_checkpoint:save_over_and_prune", str(tmp_path))[0] == ["step-11", "step-10"]
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-11"]
    assert run_parallel(1, "test_checkpoint:latest", str(tmp_path))[0][:2] == (12.0, {"step": 12})
    assert run_parallel(1, "test_checkpoint:latest", str(tmp_path / "nothing"))[0] is None
    with pytest.raises(ValueError, match="keep_checkpoints is 0"):
        prune(tmp_path, 0)
