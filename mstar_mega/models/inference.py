"""One forward pass without gradients through all pipeline stages, on the training weights in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mstar_mega.models.attention import AttentionPlan
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import PackedBatch


@contextmanager
def inference(model: LMM) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode, and clears what a stage was handed."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_input_tensor(None)
        model.train(training)


def run_stages(
    model: LMM, embed: Callable[[], Tensor], positions: Tensor, plan: AttentionPlan, lengths: Tensor | None = None
) -> Tensor | None:
    """Push one stream through the pipeline; every rank of the model calls it with the same plan.

    Args:
        embed: makes the embedded stream [T, hidden]; called on the first stage only.
        positions: int64 [T].
        lengths: int64 [T], the length of each token's sequence; None: it ends with the token.

    Returns:
        [T, hidden] on the last stage, None elsewhere.
    """
    embedded = None
    if model.pre_process:
        embedded = embed()
    else:
        rows = positions.numel() // model.stream_multiple
        received = torch.empty(rows, 1, model.size.hidden, dtype=model.config.params_dtype, device=positions.device)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    hidden = model.trunk(embedded, positions, plan, lengths)
    if model.post_process:
        return hidden
    dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def run_packed(model: LMM, batch: PackedBatch) -> Tensor | None:
    """:func:`run_stages` of a packed batch."""
    return run_stages(model, lambda: model.embed(batch), batch.positions, batch.plan, batch.lengths)


def from_last_stage(values: Tensor) -> Tensor:
    """Give every stage the last stage's tensor; the others pass an empty one of the same shape and dtype."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            values,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return values
