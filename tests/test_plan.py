"""Predicted bytes against what training allocates, and the layouts that are recommended."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hf_directories import CONFIGS
from parallel import run_parallel

from mstar_mega import cli, settings
from mstar_mega.checkpoint_tools.maps import map_of
from mstar_mega.checkpoint_tools.memory import (
    Layout,
    is_possible,
    largest_microbatch,
    longest_prompt,
    most_image_tokens,
    rank_memory,
)
from mstar_mega.checkpoint_tools.plan import (
    USABLE,
    Choice,
    both_ways,
    bytes_of,
    choices,
    model_of,
    recommend,
    settings_tokens,
)
from mstar_mega.checkpoint_tools.published import PUBLISHED
from mstar_mega.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from mstar_mega.data.types import Query
from mstar_mega.models.build import build_model
from mstar_mega.models.families import FAMILIES
from mstar_mega.models.packing import Prompt
from mstar_mega.platform import distributed
from mstar_mega.settings.rules import validate
from mstar_mega.training.batches import TrainGroup, microbatches
from mstar_mega.training.optimizer_state import full_precision_weights
from mstar_mega.training.trainer import Trainer

EXAMPLES = Path(__file__).parents[1] / "examples" / "configs"
TOTALS = {"internvl2": 2_205_754_368, "phi3_5_vision": 4_146_621_440, "minicpm_v2_5": 8_537_092_336}


def allocated(
    family: str,
    tensor: int,
    pipeline: int,
    precision: Literal["float32", "bfloat16"],
    is_prm: bool,
    distributed_optimizer: bool = False,
) -> tuple[int, dict[str, int]]:
    """This rank's stage, and the bytes of weights, gradients and optimizer state after a real step."""
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, distributed_optimizer=distributed_optimizer)
    distributed.initialize(parallel, 0)
    policy = FAMILIES[family].from_config(CONFIGS[family], None)
    config = Config(parallel=parallel, model=ModelConfig(family=family, precision=precision))
    model = build_model(config, policy, "linear" if is_prm else "vocabulary")
    if is_prm and model.pre_process:
        model.vision.requires_grad_(False)
        model.connector.requires_grad_(False)
    prompt = Prompt(list(range(5, 25)), [], None)
    trainer = Trainer(model, OptimizerConfig(), lambda query: prompt, 10, parallel)
    scores: list[Any] = [[[3]], [[1.0]]] if is_prm else []
    trainer.step([TrainGroup(Query("q", "?", (), "1"), [[7, 8, 9, 10]], *scores)])
    (part,) = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    moments = [
        value
        for state in part.optimizer.state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and name != "step"
    ]
    copies = full_precision_weights(trainer.optimizer)
    buffers = trainer.wrapped.buffers + trainer.wrapped.expert_parallel_buffers
    return distributed.layout().pipeline_rank, {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(tensor.nbytes for tensor in moments + copies),
    }


@pytest.mark.parametrize(
    ("family", "tensor", "pipeline", "precision"),
    [
        ("internvl2", 1, 1, "float32"),
        ("internvl2", 2, 1, "bfloat16"),
        ("phi3_5_vision", 1, 2, "bfloat16"),
        ("minicpm_v2_5", 2, 1, "float32"),
    ],
)
def test_weights_gradients_and_optimizer_are_what_training_allocates(
    family: str, tensor: int, pipeline: int, precision: Literal["float32", "bfloat16"]
) -> None:
    model = map_of(CONFIGS[family], "vocabulary", Path("config.json"))
    config = Config(model=ModelConfig(family=family, precision=precision))
    predicted = rank_memory(model, config, Layout(tensor, pipeline, 128))
    for is_prm in (False, True):
        args = (family, tensor, pipeline, precision, is_prm)
        for stage, found in run_parallel(tensor * pipeline, "test_plan:allocated", *args):
            expected = predicted[stage]
            if is_prm:
                assert found["weights"] == expected.prm
                assert found["gradients"] + found["optimizer"] == expected.prm_training
            else:
                assert found == {name: getattr(expected, name) for name in found}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_copies_of_the_model_share_a_distributed_optimizers_state(precision: Literal["float32", "bfloat16"]) -> None:
    model = map_of(CONFIGS["internvl2"], "vocabulary", Path("config.json"))
    parallel = ParallelConfig(distributed_optimizer=True)
    config = Config(parallel=parallel, model=ModelConfig(family="internvl2", precision=precision))
    (predicted,) = rank_memory(model, config, Layout(1, 1, 128, data=2))
    ranks = [found for _, found in run_parallel(2, "test_plan:allocated", "internvl2", 1, 1, precision, False, True)]
    for found in ranks:
        assert found["weights"] == predicted.weights
        # Every parameter begins at a multiple of 64 values; real ones are that long by themselves.
        assert 0 <= found["gradients"] - predicted.gradients < 4 * 64 * len(model.mappings)
        assert abs(found["optimizer"] - predicted.optimizer) < 12 * 64 * len(model.mappings) / 2
    (alone,) = rank_memory(model, config, Layout(1, 1, 128))
    assert sum(found["optimizer"] for found in ranks) == alone.optimizer


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_sizes(family: str) -> None:
    model = map_of(PUBLISHED[family], "vocabulary", Path("config.json"))
    values = sum(torch.Size(source.shape).numel() for mapping in model.mappings for source in mapping.sources)
    assert values == TOTALS[family]
    assert most_image_tokens(model.vision) == {"internvl2": 3328, "phi3_5_vision": 2509, "minicpm_v2_5": 960}[family]


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_is_recommended_fits_and_less_cut_layouts_do_not(family: str) -> None:
    model = map_of(PUBLISHED[family], "vocabulary", Path("config.json"))
    config = Config(model=ModelConfig(family=family, precision="bfloat16", recompute="full"))
    wanted = config.evolve.optimizer.microbatch_tokens
    for memory in (80 * 10**9, 40 * 10**9):
        best = recommend(model, config, 8, memory)
        ways = [each for pair in both_ways(model, config, 8, wanted) for each in pair if each is not None]
        fitting = [choice for choice in ways if choice.largest.total <= memory * USABLE]
        assert (best is None) == (not fitting) or best.layout.microbatch_tokens < wanted  # type: ignore[union-attr]
        if best is not None:
            layout = best.layout
            assert layout.tensor * layout.pipeline * layout.data == 8 and is_possible(
                model, layout.tensor, layout.pipeline
            )
            assert best.largest.total <= memory * USABLE
            assert all(choice.layout.data <= layout.data for choice in fitting)
    assert recommend(model, config, 8, 10**9) is None


def test_a_distributed_optimizer_is_recommended_only_for_a_cut_that_needs_it() -> None:
    model = map_of(PUBLISHED["internvl2"], "vocabulary", Path("config.json"))
    config = Config(model=ModelConfig(family="internvl2", precision="bfloat16", recompute="full"))

    def best(gigabytes: float, gpus: int = 8) -> Choice:
        found = recommend(model, config, gpus, int(gigabytes * 1e9 / USABLE))
        assert found is not None
        return found

    (alone, shared), *_ = both_ways(model, config, 8, config.evolve.optimizer.microbatch_tokens)
    assert shared is not None and alone.layout == shared.layout and alone.layout.data == 8
    needed, less = alone.largest.total / 1e9, shared.largest.total / 1e9
    assert less < 0.7 * needed
    assert best(needed + 0.1).parallel == ParallelConfig()
    # The least cut counts for more than the settings' own optimizer, which would fit at tensor 2.
    assert best(needed - 0.1).parallel == best(less + 0.1).parallel == ParallelConfig(distributed_optimizer=True)
    assert best(less - 0.1).layout.tensor == 2
    # One copy of the model shares with nobody.
    assert all(other is None for _, other in both_ways(model, config, 1, 4096))
    config.parallel.distributed_optimizer = True
    assert all(one.parallel.distributed_optimizer and other is None for one, other in both_ways(model, config, 8, 4096))
    assert best(needed + 0.1).parallel.distributed_optimizer


@pytest.mark.parametrize("name", ["internvl2_2b", "phi3_5_vision", "minicpm_v2_5"])
def test_example_configs_fit_on_eight_gpus_of_80_gb(name: str) -> None:
    config = settings.parse(["--config", str(EXAMPLES / f"{name}.yaml")])
    model, _ = model_of(config)
    cut = (config.parallel.tensor, config.parallel.pipeline)
    tokens = config.evolve.optimizer.microbatch_tokens
    (own,) = [c for c in choices(model, config, 8, tokens) if (c.layout.tensor, c.layout.pipeline) == cut]
    assert own.largest.total <= 80 * 10**9 * USABLE


def test_cutting_more_needs_less() -> None:
    model = map_of(PUBLISHED["minicpm_v2_5"], "vocabulary", Path("config.json"))
    config = Config(model=ModelConfig(family="minicpm_v2_5", precision="bfloat16"))

    def largest(tensor: int, pipeline: int, tokens: int = 4096) -> int:
        return max(stage.total for stage in rank_memory(model, config, Layout(tensor, pipeline, tokens)))

    assert largest(1, 1) > largest(2, 1) > largest(4, 1) > largest(8, 1)
    assert largest(2, 1) > largest(2, 2) and largest(2, 2) < largest(2, 2, 8192)
    assert not is_possible(model, 3, 1) and not is_possible(model, 1, 5) and is_possible(model, 8, 4)


def train_groups(prompt: int, response: int) -> tuple[list[TrainGroup], Prompt]:
    """Queries with all sixteen responses selected, from short ones to the longest, and everybody's prompt."""
    lengths = [1 + (response - 1) * i // 15 for i in range(16)]
    groups = [TrainGroup(Query(f"q{i}", "?", (), "1"), [[7] * n for n in lengths]) for i in range(3)]
    return groups, Prompt([5] * prompt, [], None)


@pytest.mark.parametrize(("bound", "new"), [(4096, 512), (4096, 1024), (1024, 512), (8192, 1024)])
def test_activations_are_those_of_the_largest_micro_batch_that_occurs(bound: int, new: int) -> None:
    """Formed by what forms them in training, from the longest prompts and responses that the settings allow."""
    model = map_of(PUBLISHED["internvl2"], "vocabulary", Path("config.json"))
    config = Config()
    config.generation.max_new_tokens = new
    groups, prompt = train_groups(longest_prompt(model, config), new)
    formed = [b.tokens for b in microbatches(groups, lambda _: prompt, OptimizerConfig(microbatch_tokens=bound), 1)]
    largest = largest_microbatch(model, config, bound)
    assert max(formed) <= largest and len(formed) > 1
    assert largest == (max(formed) if max(formed) > bound else bound), "no more than occurs"

    def activations(tokens: int) -> int:
        return rank_memory(model, config, Layout(1, 1, tokens))[0].activations

    assert activations(2 * largest) == pytest.approx(2 * activations(largest), rel=1e-6)
    # Below the longest prompt with its response a lower bound saves nothing.
    assert activations(256) == activations(128)


def test_a_set_on_disk_is_held_to_its_longest_prompts() -> None:
    model = map_of(PUBLISHED["internvl2"], "vocabulary", Path("config.json"))
    config = Config()
    config.data.name, config.data.max_prompt_tokens = "mathv360k", 1000
    assert largest_microbatch(model, config, 100) == 1000 + config.generation.max_new_tokens


def test_the_stage_with_the_highest_bound_counts() -> None:
    config = Config()
    config.prm.optimizer.microbatch_tokens = 9000
    assert settings_tokens(config) == 9000


def test_amounts_of_memory() -> None:
    assert [bytes_of(text) for text in ("80GB", "80 gib", "81920.5MB")] == [80 * 10**9, 80 * 2**30, 81_920_500_000]
    for text in ("80 apples", "", "-3GB"):
        with pytest.raises(ValueError, match="is not an amount of memory; write for example 80GB"):
            bytes_of(text)
    for text in ("80", "80000000000"):
        with pytest.raises(ValueError, match=f"--memory '{text}' has no unit; write for example 80GB"):
            bytes_of(text)
    for text in ("0GB", "80MB", "0.9GB"):
        with pytest.raises(ValueError, match="is less than 1 GB; write for example 80GB"):
            bytes_of(text)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"family": "internvl2", "checkpoint": str(tmp_path / "later"), "precision": "bfloat16"}
    (tmp_path / "run.yaml").write_text(json.dumps({"model": model}))
    args = ["plan", "--config", str(tmp_path / "run.yaml"), "--gpus", "8", "--memory", "80GB"]
    assert cli.main(args) == 0
    shown = capsys.readouterr().out
    assert f"{TOTALS['internvl2']:,} parameters in bfloat16" in shown and "Recommended: tensor" in shown
    for part in ("weights", "gradients", "optimizer", "activations", "cache", "total"):
        assert part in shown
    (tmp_path / "run.yaml").write_text("model: {family: internvl2}")
    assert cli.main(args) == cli.USER_ERROR
    assert "set model.checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["internvl2_2b", "phi3_5_vision", "minicpm_v2_5"])
def test_the_shipped_configs_have_the_layout_that_is_recommended(name: str) -> None:
    """For eight GPUs of 80 GB; with the micro-batches, in all stages."""
    config = settings.parse(["--config", name])
    best = recommend(model_of(config)[0], config, 8, 80 * 10**9)
    assert best is not None and best.parallel == config.parallel
    stages = (config.warmup, config.prm, config.evolve)
    assert {stage.optimizer.microbatch_tokens for stage in stages} == {best.layout.microbatch_tokens}


def cut_in_two(folder: Path) -> list[str]:
    """Arguments for a config that is not what is recommended."""
    (folder / "two.yaml").write_text("parallel: {tensor: 2, sequence: true, distributed_optimizer: false}")
    return ["--config", str(EXAMPLES / "internvl2_2b.yaml"), "--config", str(folder / "two.yaml")]


def test_what_is_recommended_is_a_job_that_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = cut_in_two(tmp_path)
    assert cli.main(["plan", *config, "--gpus", "3", "--memory", "80GB"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --parallel.tensor ")]
    assert "--parallel.sequence false --parallel.distributed_optimizer true" in line
    advised = settings.parse([*config, *line.split()])
    validate(advised)
    distributed.check_sizes(advised.parallel, 3)
    # What differs from the settings is printed, and nothing else.
    assert cli.main(["plan", *config, *line.split(), "--gpus", "3", "--memory", "80GB"]) == 0
    assert "--parallel.sequence" not in capsys.readouterr().out


def test_every_layout_stands_beside_itself_with_a_distributed_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["plan", *cut_in_two(tmp_path), "--gpus", "8", "--memory", "80GB"]
    assert cli.main(args) == 0
    own = re.findall(r"^  (tensor .* x data (\d), .* tokens): (\S+ GB), (?:.*; shared (\S+ GB))?", _out(capsys), re.M)
    assert cli.main([*args, "--parallel.distributed_optimizer", "true"]) == 0
    shared = re.findall(r"^  (tensor .* tokens): (\S+ GB), (?!.*shared)", _out(capsys), re.M)
    assert len(own) == len(shared) > 8
    for (layout, data, alone, beside), (same_layout, figure) in zip(own, shared, strict=True):
        assert layout == same_layout and figure == (beside if data != "1" else alone) and (data == "1") == (not beside)


def test_settings_are_given_as_for_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, example = tmp_path / "small.yaml", str(EXAMPLES / "internvl2_2b.yaml")
    small.write_text("model: {precision: float32}\ngeneration: {slots: 8}\n")
    args = ["plan", "--gpus=8", "--config", example, "--memory", "80GB", f"--config={small}", "--parallel.tensor", "4"]
    assert cli.main(args) == 0
    several = _out(capsys)
    assert "parameters in float32" in several and "The settings: tensor 4 x pipeline 1 x data 2" in several
    assert cli.main([*args, "--parallel.tensr", "4"]) == cli.USER_ERROR
    assert "did you mean '--parallel.tensor'?" in capsys.readouterr().err
    for tool in (["inspect", "none"], ["convert", "hf-to-megatron", "--hf", "a", "--out", "b"]):
        assert cli.main([*tool, "--parallel.tensor", "4"]) == cli.USER_ERROR
        assert "unrecognized arguments: --parallel.tensor 4" in capsys.readouterr().err


def test_nothing_fits_is_a_failure_with_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--config", str(EXAMPLES / "minicpm_v2_5.yaml"), "--gpus", "1", "--memory", "24GB"]
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert ended.value.code == 1
    assert "Nothing fits" in (shown := _out(capsys)) and "All layouts" in shown and "Recommended" not in shown


def _out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out
