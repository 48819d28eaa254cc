"""Parallel truth: every layout trains, generates and resumes as one process does, under gloo on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from parallel import run_parallel
from torch import Tensor

from mstar_mega.config import DataConfig, GenerationConfig, OptimizerConfig, ParallelConfig
from mstar_mega.data.digits.task import build as build_digits
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.models.lmm import Head
from mstar_mega.training.batches import Examples, TrainGroup, split_into_epochs
from mstar_mega.training.checkpoint import load_checkpoint, save_checkpoint
from mstar_mega.training.trainer import StepStats, Trainer

LAYOUTS = {
    "1x1x1": (1, ParallelConfig()),
    "2x1x1": (2, ParallelConfig(tensor=2)),
    "1x2x1": (2, ParallelConfig(pipeline=2)),
    "2x2x1": (4, ParallelConfig(tensor=2, pipeline=2)),
    "1x1x2": (2, ParallelConfig()),
    "2x1x1, sequence": (2, ParallelConfig(tensor=2, sequence=True)),
    "1x1x2, distributed optimizer": (2, ParallelConfig(distributed_optimizer=True)),
    "1x1x2, overlapped": (2, ParallelConfig(overlap_reduction=True)),
    "2x1x2, distributed optimizer, overlapped": (
        4,
        ParallelConfig(tensor=2, distributed_optimizer=True, overlap_reduction=True),
    ),
}
STEPS, MORE = 6, 3  # a wrong schedule shows two steps after a resume


@dataclass
class Outcome:
    """What one rank saw of a run."""

    losses: list[float]
    counted: list[int]
    """Tokens (policy) or steps (PRM) of each optimizer step."""
    gradient_norms: list[float]
    weights: dict[str, tuple[int, Tensor]]
    greedy: list[list[int]]
    sampled: list[list[int]]
    log_probs: list[float]
    later: list[float]
    """Losses after the checkpoint."""


@pytest.fixture(scope="module")
def sft_groups(tmp_path_factory: pytest.TempPathFactory) -> list[TrainGroup]:
    """Questions of the built-in task with their chains of thought; every third has a second, shorter response."""
    folder = tmp_path_factory.mktemp("digits")
    config = DataConfig(
        warmup_examples=9, labelled_queries=0, unlabelled_queries=0, validation_queries=0, test_queries=0
    )
    family = tiny.family()
    groups = []
    for i, (query, text) in enumerate(build_digits(config, folder, seed=0).warmup):
        tokens = family.response_tokens(text)
        groups.append(TrainGroup(query, [tokens, tokens[-5:]] if i % 3 == 0 else [tokens]))
    return groups


@pytest.fixture(scope="module")
def prm_groups(sft_groups: list[TrainGroup]) -> list[TrainGroup]:
    """The same with labelled steps; one response has no step."""
    groups = []
    for i, group in enumerate(sft_groups):
        ends = [[len(r) // 2, len(r)] if i or j else [] for j, r in enumerate(group.responses)]
        labels = [[(i + j + k) % 3 / 2 for k in range(len(e))] for j, e in enumerate(ends)]
        groups.append(TrainGroup(group.query, group.responses, ends, labels))
    return groups


def make_trainer(parallel: ParallelConfig, head: Head, seed: int = 0) -> tuple[Trainer, InternVL2]:
    model, family = tiny.build(parallel, head, seed)
    # Gradients are clipped, a step takes several microbatches, and Adam does not blow rounding up to whole steps (the
    # gradient of a key's bias is rounding alone).
    config = OptimizerConfig(
        lr=3e-3, schedule="cosine", min_lr=1e-4, clip_grad=0.5, eps=1e-5, microbatch_tokens=120
    )  # fmt: skip
    return Trainer(model, config, family.prompt, STEPS + MORE, parallel), family


def train(trainer: Trainer, groups: list[TrainGroup], steps: range) -> list[StepStats]:
    """Optimizer steps of these numbers, epoch after epoch over the groups."""
    cut = split_into_epochs(Examples.of(groups), OptimizerConfig(batch_size=6), STEPS + MORE, ("truth",))
    batches = [batch[:] for batch in cut]
    batches[2] = batches[2][:1]  # one of two data-parallel ranks has no share
    return [trainer.step(batches[i]) for i in steps]


def generate(trainer: Trainer, family: InternVL2, groups: list[TrainGroup], temperature: float) -> list[Any]:
    engine = Engine(trainer.model, family, GenerationConfig(max_new_tokens=12, slots=5, prefill_tokens=100), seed=2)
    requests = [
        Request(family.prompt(group.query), [SampleSpec(key_of("truth", group.query.id, i)) for i in range(2)])
        for group in groups[:4]
    ]
    requests[0].drafts = groups[0].responses
    requests[0].samples.append(SampleSpec(key_of("truth, continued"), 1, 3))
    return [sample for samples in engine.generate(requests, temperature) for sample in samples]


def run_policy(parallel: ParallelConfig, groups: list[TrainGroup], checkpoints: str, name: str) -> Outcome:
    trainer, family = make_trainer(parallel, "vocabulary")
    stats = train(trainer, groups, range(STEPS))
    weights = tiny.shards(trainer.model)
    greedy = generate(trainer, family, groups, 0.0)
    sampled = generate(trainer, family, groups, 1.0)
    save(trainer, checkpoints, name)
    later = train(trainer, groups, range(STEPS, STEPS + MORE))
    return Outcome(
        [s.loss for s in stats],
        [s.tokens for s in stats],
        [s.grad_norm for s in stats],
        weights,
        [s.tokens for s in greedy],
        [s.tokens for s in sampled],
        [value for s in [*greedy, *sampled] for value in s.log_probs],
        [s.loss for s in later],
    )


def run_prm(parallel: ParallelConfig, groups: list[TrainGroup], head: Head) -> Outcome:
    trainer, _ = make_trainer(parallel, head)
    stats = train(trainer, groups, range(STEPS))
    losses, counted, norms = [s.loss for s in stats], [s.tokens for s in stats], [s.grad_norm for s in stats]
    return Outcome(losses, counted, norms, tiny.shards(trainer.model), [], [], [], [])


def save(trainer: Trainer, checkpoints: str, name: str) -> None:
    common = {"scheduler": trainer.scheduler.state_dict()}
    save_checkpoint(Path(checkpoints), name, trainer.sharded_state(), common)


def resume(parallel: ParallelConfig, groups: list[TrainGroup], checkpoints: str, names: list[str]) -> list[list[float]]:
    """Continue each of the checkpoints in one model, which starts with other weights; returns the later losses."""
    trainer, _ = make_trainer(parallel, "vocabulary", seed=9)
    results = []
    for name in names:
        state, common = load_checkpoint(Path(checkpoints) / name, trainer.sharded_state())
        trainer.load_state(state, common["scheduler"])
        results.append([s.loss for s in train(trainer, groups, range(STEPS, STEPS + MORE))])
    return results


@dataclass
class Truth:
    """The runs of the policy in all layouts, and where their checkpoints lie."""

    runs: dict[str, list[Outcome]]
    checkpoints: str


@pytest.fixture(scope="module")
def policy_runs(sft_groups: list[TrainGroup], tmp_path_factory: pytest.TempPathFactory) -> Truth:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    runs = {
        name: run_parallel(ranks, "test_parallel_truth:run_policy", parallel, sft_groups, folder, name)
        for name, (ranks, parallel) in LAYOUTS.items()
    }
    return Truth(runs, folder)


@pytest.fixture(scope="module", params=["linear", "likelihood"])
def prm_runs(request: pytest.FixtureRequest, prm_groups: list[TrainGroup]) -> dict[str, list[Outcome]]:
    return {
        name: run_parallel(ranks, "test_parallel_truth:run_prm", parallel, prm_groups, request.param)
        for name, (ranks, parallel) in LAYOUTS.items()
    }


def check_training(runs: dict[str, list[Outcome]]) -> None:
    """Loss curves, gradient norms and final weights of all layouts against one process."""
    reference = runs["1x1x1"][0]
    whole = tiny.whole_weights([reference.weights], 1)
    for name, ranks in runs.items():
        for outcome in ranks:
            assert outcome.losses == pytest.approx(reference.losses, rel=1e-4), name
            assert outcome.counted == reference.counted, name
            assert outcome.gradient_norms == pytest.approx(reference.gradient_norms, rel=1e-4), name
        joined = tiny.whole_weights([outcome.weights for outcome in ranks], LAYOUTS[name][1].tensor)
        assert joined.keys() == whole.keys()
        for key, value in whole.items():
            gap = float((joined[key] - value).abs().max())
            assert gap < 1e-5, (name, key, gap)


def test_policy_training_agrees_in_every_layout(policy_runs: Truth) -> None:
    losses = policy_runs.runs["1x1x1"][0].losses
    assert losses[-1] < 0.9 * losses[0], "it must learn, or equal losses say little"
    assert min(policy_runs.runs["1x1x1"][0].gradient_norms) > 0.5, "clipping takes part"
    check_training(policy_runs.runs)


def test_prm_training_agrees_in_every_layout(prm_runs: dict[str, list[Outcome]]) -> None:
    losses = prm_runs["1x1x1"][0].losses
    assert abs(losses[-1] - losses[0]) > 0.01
    check_training(prm_runs)


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_generation_gives_identical_tokens_in_every_layout(policy_runs: Truth, layout: str) -> None:
    reference = policy_runs.runs["1x1x1"][0]
    assert len({tuple(tokens) for tokens in reference.greedy}) > 1, "all greedy responses are alike"
    assert len({tuple(tokens) for tokens in reference.sampled}) == len(reference.sampled)
    for outcome in policy_runs.runs[layout]:
        assert outcome.greedy == reference.greedy
        assert outcome.sampled == reference.sampled
        assert outcome.log_probs == pytest.approx(reference.log_probs, abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_any_layout_continues_in_every_other(
    policy_runs: Truth, sft_groups: list[TrainGroup], layout: str
) -> None:
    ranks, parallel = LAYOUTS[layout]
    expected = policy_runs.runs["1x1x1"][0].later
    names = list(LAYOUTS)
    for results in run_parallel(
        ranks, "test_parallel_truth:resume", parallel, sft_groups, policy_runs.checkpoints, names
    ):
        for name, losses in zip(names, results, strict=True):
            assert losses == pytest.approx(expected, rel=1e-4), f"saved at {name}, continued at {layout}"
