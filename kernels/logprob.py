"""Log-probabilities of given tokens from given vocabulary-sharded logits.

    log p(y) = z_y / T - logsumexp_v(z_v / T)

Each rank reduces its own slice to three floats a row (four with the entropy); one all-gather merges the ranks, so no
[N, V] tensor crosses the network. Only the logits and these floats are kept for the backward, which recomputes the
softmax, and may write the gradient over the logits. Formulas and kernels: ``row_stats.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mstar_mega.kernels.dispatch import uses_triton
from mstar_mega.kernels.row_stats import (
    RowStats,
    gradient_reference,
    gradient_triton,
    masked,
    merge_ranks,
    stats_reference,
    stats_triton,
)


class _VocabParallelLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        temperature: float,
        ignore_index: int,
        valid: int,
        vocab_start: int,
        group: ProcessGroup | None,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, labels = logits.reshape(-1, logits.size(-1)), target.reshape(-1)
        counted = labels != ignore_index
        column = torch.where(counted, labels - vocab_start, -1)
        if uses_triton("vocab_parallel_logprob", rows):
            local = stats_triton(_unit_stride(rows), column, temperature, valid, entropy, ~counted)
        else:
            local = stats_reference(masked(rows, valid), column, entropy, temperature)
        whole = merge_ranks(local, temperature, group)
        ctx.save_for_backward(logits, column, counted, whole.high, whole.log_sum, whole.target, whole.entropy)
        ctx.constants = (temperature, valid, inplace)
        log_prob = torch.where(counted, whole.log_prob(temperature), 0.0).view(target.shape)
        if whole.entropy is None:
            return log_prob, log_prob.new_empty(0)
        return log_prob, torch.where(counted, whole.entropy, 0.0).view(target.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, column, counted, *kept = ctx.saved_tensors
        whole = RowStats(*kept)
        temperature, valid, inplace = ctx.constants
        g = torch.where(counted, grad_outputs[0].reshape(-1).float(), 0.0)
        h = None if whole.entropy is None else torch.where(counted, grad_outputs[1].reshape(-1).float(), 0.0)
        rows = logits.detach().reshape(-1, logits.size(-1))
        if uses_triton("vocab_parallel_logprob", rows):
            rows = _unit_stride(rows)
            out = rows if inplace else torch.empty_like(rows)
            grad = gradient_triton(rows, out, column, whole, g, h, temperature, valid)
        else:
            z = masked(rows, valid, owned=inplace)
            grad = gradient_reference(z, column, whole, g, h, temperature).to(logits.dtype)
        return grad.view(logits.shape), None, None, None, None, None, None, None, None


def vocab_parallel_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    group: ProcessGroup | None = None,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Log-probabilities, float32 [...], of ``target`` under softmax(logits / temperature).

    Args:
        logits: [..., V_local] of any float dtype: this rank's slice of the vocabulary. Differentiable.
        target: int64 [...] global ids; ``ignore_index`` gives 0 and no gradient, an id that no rank holds gives minus
            infinity.
        valid_vocab: ids at or above it (padding rows) do not exist.
        vocab_start: global id of this rank's first column.
        group: tensor-parallel group; None where the vocabulary is whole.
        with_entropy: also return the entropy of that distribution, float32 [...], differentiable as well.
        inplace_backward: the gradient overwrites the logits, which nothing may read afterwards.

    Raises:
        ValueError: shapes that do not fit, a target that is not int64, a temperature that is not above 0.
    """
    check_arguments(logits.shape[:-1], target, temperature, f"logits {list(logits.shape)}")
    valid = local_valid(logits.size(-1), valid_vocab, vocab_start)
    log_prob, entropy = _VocabParallelLogProb.apply(
        logits, target, temperature, ignore_index, valid, vocab_start, group, with_entropy, inplace_backward
    )
    return (log_prob, entropy) if with_entropy else log_prob


def local_valid(local: int, valid_vocab: int | None, vocab_start: int) -> int:
    """How many of a slice's ``local`` columns exist."""
    return local if valid_vocab is None else max(0, min(local, valid_vocab - vocab_start))


def check_arguments(rows: torch.Size, target: Tensor, temperature: float, what: str) -> None:
    """Raises ValueError where targets and what they index do not fit."""
    if target.shape != rows:
        raise ValueError(f"target has shape {list(target.shape)}, but {what} need {list(rows)}: one id per row")
    if target.dtype != torch.int64:
        raise ValueError(f"target is {target.dtype}: pass int64 ids")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")


def _unit_stride(rows: Tensor) -> Tensor:
    """Rows whose columns lie side by side, as the kernels read them."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def logprob_reference(logits: Tensor, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Plain definitions of log-probability and entropy on whole logits [..., V], for tests."""
    everything = torch.log_softmax(logits / temperature, dim=-1)
    return everything.gather(-1, target[..., None]).squeeze(-1), -(everything.exp() * everything).sum(-1)


def target_logprob_reference(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Plain definition on whole logits [..., V], for tests."""
    return logprob_reference(logits, target, temperature)[0]
