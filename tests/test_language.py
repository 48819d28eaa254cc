"""The language model of megatron's parts: in names, order and sharding megatron's ``GPTModel``, which it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from parallel import run_parallel
from torch import nn

from mstar_mega.config import ParallelConfig
from mstar_mega.models.language import block_spec
from mstar_mega.models.lmm import LMM, _mark_shards


def sharded(module: Any, prefix: str) -> dict[str, tuple[Any, ...]]:
    """What of which whole tensor a checkpoint gets from this rank, by name."""
    fields = ("key", "global_shape", "global_offset", "axis_fragmentations", "replica_id", "allow_shape_mismatch")
    found: dict[str, tuple[Any, ...]] = {}
    for name, entry in module.sharded_state_dict(prefix).items():
        # A gated matrix is made of its halves later, which say where they lie.
        parts = entry.build() if hasattr(entry, "build") else entry
        for number, part in enumerate(parts if isinstance(parts, list) else [parts]):
            found[f"{name} {number}"] = tuple(getattr(part, field, None) for field in fields)
    return found


def described(module: Any) -> dict[str, Any]:
    shapes = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    return {"parameters": shapes, "state": list(module.state_dict()), "sharded": sharded(module, "language.")}


def both(parallel: ParallelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """This rank's stage of ours and of megatron's."""
    from megatron.core.models.gpt import GPTModel

    ours, _ = tiny.build(parallel)
    theirs = GPTModel(
        ours.config,
        block_spec(ours.config),
        vocab_size=ours.size.padded_vocab,
        max_sequence_length=0,
        pre_process=ours.pre_process,
        post_process=ours.post_process,
        position_embedding_type="none",
        scatter_embedding_sequence_parallel=False,
    )
    return described(ours.language), described(theirs)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
def test_names_order_and_sharding_are_those_of_gptmodel(tensor: int, pipeline: int) -> None:
    pytest.importorskip("megatron.core.models.gpt", reason="this megatron-core has no GPTModel any more")
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    for ours, theirs in run_parallel(tensor * pipeline, "test_language:both", parallel):
        assert len(ours["sharded"]) > 5
        for what in theirs:
            assert ours[what] == theirs[what], what


def marks(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    attributes = ("tensor_model_parallel", "partition_dim")
    return {name: tuple(getattr(p, a, None) for a in attributes) for name, p in model.named_parameters()}


@pytest.mark.usefixtures("job_of_one")
def test_weights_that_are_marked_already_stay_as_they_are() -> None:
    """Newer megatrons mark weights as they make them, and none lets anybody do it twice."""
    model: LMM = tiny.build()[0]
    before = marks(model)
    assert before["language.decoder.layers.0.mlp.linear_fc2.weight"] == (True, 1)
    assert before["language.output_layer.weight"] == (True, 0)
    _mark_shards(model)
    assert marks(model) == before
