"""Random weights are not drawn where others are put over them: until then they are NaN, and afterwards none is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from tiny_families import NAMES, make_model_directory

from mstar_mega.checkpoint_tools.convert import hf_to_megatron
from mstar_mega.config import Config, ModelConfig, ParallelConfig, PRMConfig
from mstar_mega.models.build import build_family, build_model
from mstar_mega.models.lmm import LMM
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.fit import load_start
from mstar_mega.recipe.prm import build_prm
from mstar_mega.training.optimizer_state import full_precision_weights
from mstar_mega.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("job_of_one")


def with_nan(model: LMM) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_goes_over_every_weight(
    name: str, precision: Literal["float32", "bfloat16"], distributed_optimizer: bool, tmp_path: Path
) -> None:
    hf_to_megatron(make_model_directory(name, tmp_path / "hf"), tmp_path / "megatron")
    config = Config(model=ModelConfig(family=name, checkpoint=str(tmp_path / "megatron"), precision=precision))
    job = cast(Job, SimpleNamespace(config=config, family=build_family(config), say=lambda text: None))
    model = build_model(config, job.family, draw=False)
    assert with_nan(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    trainer = Trainer(
        model, config.warmup.optimizer, cast(Any, None), 1, ParallelConfig(distributed_optimizer=distributed_optimizer)
    )
    load_start(job, trainer)
    assert with_nan(model) == []
    assert not any(weight.isnan().any() for weight in full_precision_weights(trainer.optimizer))
    assert bool(full_precision_weights(trainer.optimizer)) == (precision == "bfloat16")
    for settings in (PRMConfig(head="linear"), PRMConfig(head="likelihood")):
        config.prm = settings
        prm = build_prm(job, model)
        assert with_nan(prm) == [] and not prm.score_head.any()
        if settings.head == "likelihood":
            assert prm.likelihood_weights.tolist()[1] == 0.0 < prm.likelihood_weights.tolist()[0]


def test_only_random_weights_wait() -> None:
    config = Config()
    model, drawn = (build_model(config, build_family(config), "likelihood", draw=draw) for draw in (False, True))
    assert with_nan(drawn) == []
    for (name, parameter), (_, other) in zip(model.named_parameters(), drawn.named_parameters(), strict=True):
        if parameter.isnan().any():
            assert parameter.isnan().all() and other.unique().numel() > 2, name
        else:
            assert torch.equal(parameter, other) and other.unique().numel() <= 2, name
