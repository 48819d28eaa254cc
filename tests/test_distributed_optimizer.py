"""A distributed optimizer trains as a plain one does, in bfloat16 too, and each loads what the other saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_parallel_truth
import tiny
import torch
from parallel import run_parallel

from mstar_mega.config import OptimizerConfig, ParallelConfig
from mstar_mega.training.batches import TrainGroup
from mstar_mega.training.checkpoint import load_checkpoint
from mstar_mega.training.optimizer_state import full_precision_weights
from mstar_mega.training.trainer import Trainer

sft_groups = test_parallel_truth.sft_groups


def make_trainer(distributed: bool, seed: int = 0) -> Trainer:
    parallel = ParallelConfig(distributed_optimizer=distributed)
    model, family = tiny.build(parallel, seed=seed, precision="bfloat16")
    # Steps are smaller than the spacing of most bfloat16 weights: the float32 copies must be kept.
    config = OptimizerConfig(lr=1e-4, eps=1e-5, clip_grad=0.5)
    return Trainer(model, config, family.prompt, 10, parallel)


def train(distributed: bool, groups: list[TrainGroup], folder: str) -> dict[str, Any]:
    """Three steps, a checkpoint, three more."""
    trainer = make_trainer(distributed)
    first = [trainer.step(groups).loss for _ in range(3)]
    test_parallel_truth.save(trainer, folder, str(distributed))
    later = [trainer.step(groups).loss for _ in range(3)]
    return {"first": first, "later": later, "weights": tiny.shards(trainer.model)}


def resume(distributed: bool, groups: list[TrainGroup], folder: str, name: str) -> dict[str, Any]:
    """The later three steps, by a trainer that began elsewhere."""
    trainer = make_trainer(distributed, seed=5)
    trainer.step(groups)
    state, common = load_checkpoint(Path(folder) / name, trainer.sharded_state())
    trainer.load_state(state, common["scheduler"])
    later = [trainer.step(groups).loss for _ in range(3)]
    return {"later": later, "weights": tiny.shards(trainer.model)}


def reset(groups: list[TrainGroup]) -> list[list[torch.Tensor]]:
    """This rank's float32 copies after two steps, after a reset, and after weights were put back."""
    trainer = make_trainer(True)
    start = trainer.copy_weights()
    for _ in range(2):
        trainer.step(groups)
    found = [[weight.detach().clone() for weight in full_precision_weights(trainer.optimizer)]]
    trainer.reset_optimizer()
    found.append([weight.detach().clone() for weight in full_precision_weights(trainer.optimizer)])
    trainer.load_weights(start)
    found.append([weight.detach().clone() for weight in full_precision_weights(trainer.optimizer)])
    return found


@pytest.fixture(scope="module")
def runs(sft_groups: list[TrainGroup], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[bool, list[Any]]]:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    found = {
        distributed: run_parallel(2, "test_distributed_optimizer:train", distributed, sft_groups, folder)
        for distributed in (False, True)
    }
    return folder, found


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, (_, weight) in one["weights"].items():
        # Once in a while a rounding of the gradient's norm crosses the edge between two bfloat16 numbers.
        torch.testing.assert_close(other["weights"][name][1], weight, rtol=2**-7, atol=1e-5, msg=name)


def test_it_trains_as_a_plain_one(runs: tuple[str, dict[bool, list[Any]]]) -> None:
    plain, shared = runs[1][False], runs[1][True]
    assert plain[0]["first"][-1] < plain[0]["first"][0]
    for one, other in zip(plain, shared, strict=True):
        assert other["first"] + other["later"] == pytest.approx(one["first"] + one["later"], rel=1e-4)
        same_weights(one, other)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_each_continues_what_the_other_saved(
    runs: tuple[str, dict[bool, list[Any]]], sft_groups: list[TrainGroup], saved: bool, distributed: bool
) -> None:
    folder, found = runs
    args = (distributed, sft_groups, folder, str(saved))
    for one, other in zip(found[saved], run_parallel(2, "test_distributed_optimizer:resume", *args), strict=True):
        if saved == distributed:
            assert other["later"] == one["later"]
            assert all(torch.equal(w, other["weights"][name][1]) for name, (_, w) in one["weights"].items())
        assert other["later"] == pytest.approx(one["later"], rel=1e-4)
        same_weights(one, other)


def test_full_precision_survives_a_reset_and_follows_loaded_weights(sft_groups: list[TrainGroup]) -> None:
    for trained, kept, back in run_parallel(2, "test_distributed_optimizer:reset", sft_groups):
        assert trained and all(map(torch.equal, trained, kept))
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in trained)
        assert all(torch.equal(weight, weight.bfloat16().float()) for weight in back)
