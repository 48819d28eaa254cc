"""The trainer between stages and starts: what is kept, what the settings change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from megatron.core.optimizer import optimizer as megatron_optimizer

from mstar_mega.config import DataConfig, OptimizerConfig
from mstar_mega.data.digits.task import build as build_digits
from mstar_mega.models.packing import next_token_targets, pack
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


@pytest.mark.parametrize("by_rates", [False, True])
def test_a_changed_learning_rate_takes_effect_on_a_loaded_state(
    batch: list[TrainGroup], by_rates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_rates:  # newer megatrons tell parameter groups apart by their rates too
        keys = (*megatron_optimizer.param_group_identifier_keys, "max_lr", "min_lr")
        monkeypatch.setattr(megatron_optimizer, "param_group_identifier_keys", keys)
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


# ------------------------------------------------------------------------------------------ what a step is, written out


def mean_loss(trainer: Trainer, groups: list[TrainGroup]) -> torch.Tensor:
    """Minus the mean log-probability of all response tokens, every response in a pass of its own."""
    total, count = torch.zeros(()), 0
    for group in groups:
        for response in group.responses:
            packed = pack([trainer.prompt_of(group.query)], [[response]])
            source, target = next_token_targets(packed, [[response]])
            logits = trainer.model.logits(tiny.hidden(trainer.model, packed)[source])[:, : trainer.model.size.vocab]
            total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            count += len(response)
    return total / count


def test_steps_are_those_of_adamw_on_the_mean_over_the_whole_batch(batch: list[TrainGroup]) -> None:
    """Clipped to a norm, weight decay on matrices alone, however the batch is cut into microbatches."""
    groups = [*batch[:3], TrainGroup(batch[3].query, [batch[3].responses[0], batch[3].responses[0][-4:]])]
    config = OptimizerConfig(
        lr=2e-3, beta1=0.8, beta2=0.9, eps=1e-5, weight_decay=0.3, clip_grad=0.5, microbatch_tokens=60
    )
    trainer, plain = (Trainer(tiny.randomize(tiny.build()[0]), config, tiny.family().prompt, 10) for _ in range(2))
    parameters = dict(plain.model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.dim() > 1 and not name.endswith("bias")]
    others = [p for p in parameters.values() if not any(p is matrix for matrix in matrices)]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        lr=2e-3, betas=(0.8, 0.9), eps=1e-5,
    )  # fmt: skip
    for _ in range(3):
        loss = mean_loss(plain, groups)
        adam.zero_grad()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert norm > 0.5, "clipping takes part"
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient * (0.5 / norm)
        adam.step()
        stats = trainer.step(groups)
        assert stats.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert stats.grad_norm == pytest.approx(norm, rel=1e-4)
        assert (stats.responses, stats.tokens) == (5, sum(len(r) for g in groups for r in g.responses))
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=2e-5, msg=name)


LR, TOTAL = 1.0, 10
SCHEDULES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "constant": ({}, [1.0] * TOTAL),
    "constant, warmed up": ({"warmup_steps": 4}, [0.25, 0.5, 0.75] + [1.0] * 7),
    "linear": ({"schedule": "linear", "min_lr": 0.2}, [1 - 0.8 * i / TOTAL for i in range(1, TOTAL + 1)]),
    "cosine, warmed up": (
        {"schedule": "cosine", "warmup_steps": 2},
        [0.5, *(0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(9))],
    ),
    "wsd": ({"schedule": "wsd", "decay_share": 0.4}, [1.0] * 6 + [0.75, 0.5, 0.25, 0.0]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_of_every_step(name: str) -> None:
    changes, expected = SCHEDULES[name]
    model, family = tiny.build()
    trainer = Trainer(model, OptimizerConfig(lr=LR, **changes), family.prompt, TOTAL)
    rates = []
    for _ in range(TOTAL):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.scheduler.step(increment=1)
    assert rates == pytest.approx(expected)


def test_loaded_weights_are_those_that_the_optimizer_goes_on_from(batch: list[TrainGroup]) -> None:
    """In bfloat16 it keeps copies in float32: old ones would overwrite the loaded weights at the next step."""
    trainer = make_trainer(1e-2, "bfloat16")
    start = trainer.copy_weights()
    trainer.step(batch)
    assert any(not torch.equal(value, trainer.copy_weights()[name]) for name, value in start.items())
    trainer.load_weights(start)
    trainer.reconfigure(OptimizerConfig(lr=0.0), 10)
    trainer.step(batch)
    assert all(torch.equal(value, trainer.copy_weights()[name]) for name, value in start.items())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_a_schedule_that_is_reset_falls_within_its_iteration_and_on_a_resume_too(
    schedule: Any, batch: list[TrainGroup]
) -> None:
    """However long the budget was that the trainer was made for."""

    def make(total_steps: int) -> Trainer:
        model, family = tiny.build()
        config = OptimizerConfig(lr=1e-3, min_lr=1e-5, schedule=schedule, warmup_steps=2, decay_share=0.5)
        return Trainer(model, config, family.prompt, total_steps)

    def rates(trainer: Trainer, steps: int) -> list[float]:
        return [trainer.step(batch).learning_rate for _ in range(steps)]

    expected = rates(make(6), 6)
    assert expected[1] == pytest.approx(1e-3) and expected[-1] == pytest.approx(1e-5)
    trainer = make(1000)
    for _ in range(2):  # two iterations
        trainer.reset_optimizer()
        trainer.set_total_steps(6)
        first = rates(trainer, 3)
        scheduler = trainer.scheduler.state_dict()
        assert first + rates(trainer, 3) == pytest.approx(expected)
    resumed = make(1000)
    resumed.scheduler.num_steps = 0
    resumed.scheduler.load_state_dict(scheduler)
    resumed.set_total_steps(6)
    assert rates(resumed, 3) == pytest.approx(expected[3:])
