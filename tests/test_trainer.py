"""The trainer between stages and starts: what is kept, what the settings change."""

from __future__ import annotations

import pytest
import tiny
import torch

from mstar_mega.config import DataConfig, OptimizerConfig
from mstar_mega.data.digits.task import build as build_digits
from mstar_mega.training.batches import TrainGroup
from mstar_mega.training.trainer import Trainer


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> list[TrainGroup]:
    config = DataConfig(
        warmup_examples=4, labelled_queries=1, unlabelled_queries=0, validation_queries=1, test_queries=1
    )
    task = build_digits(config, tmp_path_factory.mktemp("data"), seed=0)
    family = tiny.family()
    return [TrainGroup(query, [family.response_tokens(text)]) for query, text in task.warmup]


def make_trainer(lr: float, precision: str = "float32") -> Trainer:
    model, family = tiny.build(precision="bfloat16" if precision == "bfloat16" else "float32")
    return Trainer(model, OptimizerConfig(lr=lr), family.prompt, 10)


def test_a_changed_learning_rate_takes_effect_on_a_loaded_state(batch: list[TrainGroup]) -> None:
    trainer = make_trainer(1e-3)
    assert trainer.step(batch).learning_rate == pytest.approx(1e-3)
    state, scheduler = trainer.sharded_state(), trainer.scheduler.state_dict()
    saved = {"model": state["model"], "optimizer": trainer.optimizer.state_dict()}
    weights = trainer.copy_weights()
    lower = make_trainer(1e-5)
    lower.load_state({**saved, "model": weights}, scheduler)
    assert lower.step(batch).learning_rate == pytest.approx(1e-5)


def test_a_reset_optimizer_keeps_what_bfloat16_cannot_hold(batch: list[TrainGroup]) -> None:
    """Steps smaller than the spacing of the weights add up in float32, also over a reset."""
    trainer = make_trainer(1e-6, "bfloat16")

    def full() -> list[torch.Tensor]:
        (part,) = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
        return [weight.detach().clone() for group in part.fp32_from_float16_groups for weight in group]

    start = full()
    trainer.step(batch)
    moved = full()
    assert any(not torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in moved)
    trainer.reset_optimizer()
    assert all(torch.equal(a, b) for a, b in zip(moved, full(), strict=True))
