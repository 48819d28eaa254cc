"""PRM scores: only the rows of a two-row head, only at the ends of steps; the vocabulary head never runs.

    score_k = sigmoid((w_good - w_bad) . hidden[position_k])

which is the two-class softmax. In Triton one program gathers a step's row and multiplies it in registers: K H elements
are read, where the usual way (logits of all positions, then two of their columns) takes 2 N H V operations.
:func:`reduce_steps` makes one score of a response's steps, all responses at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mstar_mega.config import Reduction
from mstar_mega.kernels.dispatch import uses_triton
from mstar_mega.kernels.language import jit, next_power_of_2, tl

BLOCK_H = 1024
BLOCK_STEPS = 64
REDUCTIONS = ("min", "prod", "mean", "last")


@jit
def step_logits_kernel(  # type: ignore[no-untyped-def]
    HIDDEN, POSITION, HEAD, OUT, H, stride, BLOCK: tl.constexpr
):
    """One program: one step's difference of head logits."""
    step = tl.program_id(0)
    row = tl.load(POSITION + step)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, H, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < H
        good = tl.load(HEAD + at, mask=inside, other=0.0).to(tl.float32)
        bad = tl.load(HEAD + H + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(HIDDEN + row * stride + at, mask=inside, other=0.0).to(tl.float32) * (good - bad)
    tl.store(OUT + step, tl.sum(total, 0))


@jit
def _times(a, b):  # type: ignore[no-untyped-def]
    return a * b


@jit
def reduce_steps_kernel(SCORE, OFFSET, OUT, HOW: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: one response's steps."""
    response = tl.program_id(0)
    begin = tl.load(OFFSET + response)
    end = tl.load(OFFSET + response + 1)
    neutral: tl.constexpr = float("inf") if HOW == "min" else (1.0 if HOW == "prod" else 0.0)
    lanes = tl.full((BLOCK,), neutral, SCORE.dtype.element_ty)
    if HOW == "last":
        begin = tl.maximum(begin, end - 1)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(SCORE + at, mask=at < end, other=neutral)
        if HOW == "min":
            lanes = tl.where((x < lanes) | (x != x), x, lanes)
        elif HOW == "prod":
            lanes *= x
        else:
            lanes += x
    if HOW == "min":
        out = tl.min(lanes, 0)
        out = tl.where(tl.sum((lanes != lanes).to(tl.int32), 0) > 0, float("nan"), out)
    elif HOW == "prod":
        out = tl.reduce(lanes, 0, _times)
    else:
        out = tl.sum(lanes, 0)
        if HOW == "mean":
            out /= tl.maximum(end - begin, 1).to(SCORE.dtype.element_ty)
    tl.store(OUT + response, tl.where(end > begin, out, float("nan")))


class _StepLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, positions: Tensor, head_weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, positions, head_weight)
        rows, at, head = hidden.contiguous(), positions.contiguous(), head_weight.contiguous()
        out = torch.empty(positions.numel(), device=hidden.device)
        if out.numel():
            step_logits_kernel[(out.numel(),)](
                rows, at, head, out, hidden.size(1), hidden.size(1),
                BLOCK=min(BLOCK_H, next_power_of_2(hidden.size(1))), num_warps=4,
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, positions, head_weight = ctx.saved_tensors
        g, dx, dw = grad_outputs[0], None, None
        if ctx.needs_input_grad[0]:
            difference = head_weight[0].float() - head_weight[1].float()
            # In float32: a position may occur more than once.
            dx = torch.zeros(hidden.shape, device=hidden.device).index_add_(0, positions, torch.outer(g, difference))
            dx = dx.to(hidden.dtype)
        if ctx.needs_input_grad[2]:
            row = g @ hidden[positions].float()
            dw = torch.stack([row, -row]).to(head_weight.dtype)
        return dx, None, dw


def step_scores(hidden: Tensor, positions: Tensor, head_weight: Tensor, *, as_logit: bool = False) -> Tensor:
    """Scores of steps in [0, 1], float32 [K]; differentiable.

    Args:
        hidden: [T, H] of any float dtype, the trunk's output.
        positions: int64 [K], rows of ``hidden`` at the last token of each step.
        head_weight: [2, H], rows (good, bad).
        as_logit: z_good - z_bad, whose sigmoid is the score.

    Raises:
        ValueError: a head that does not fit the hidden states, positions that are not int64.
    """
    if head_weight.dim() != 2 or head_weight.shape != (2, hidden.size(-1)):
        raise ValueError(f"head_weight is {list(head_weight.shape)}, but hidden {list(hidden.shape)} needs [2, H]")
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(f"positions are {positions.dtype} {list(positions.shape)}: pass int64 [K]")
    if uses_triton("step_scores", hidden):
        logits = _StepLogits.apply(hidden, positions, head_weight)
    else:
        z = torch.nn.functional.linear(hidden[positions].float(), head_weight.float())
        logits = z[:, 0] - z[:, 1]
    return logits if as_logit else torch.sigmoid(logits)


def reduce_steps(scores: Tensor, offsets: Tensor, how: Reduction = "min") -> Tensor:
    """One score per response from its steps' scores; no gradient. A response without steps, or with a NaN, is NaN.

    Args:
        scores: float32 or float64 [K], responses one after the other; the result has the same dtype.
        offsets: int64 [R + 1]: response r has the steps [offsets[r], offsets[r + 1]).
        how: the smallest, the product, the mean, or the last one.

    Raises:
        ValueError: an unknown reduction, or offsets that do not fit.
    """
    if how not in REDUCTIONS:
        raise ValueError(f"prm.reduction is {how!r}; it must be min, prod, mean or last")
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or not offsets.numel():
        raise ValueError(f"offsets are {offsets.dtype} {list(offsets.shape)}: pass int64 [R + 1], from 0 to K")
    scores = scores.detach()
    if uses_triton("step_scores", scores):
        out = scores.new_empty(offsets.numel() - 1)
        if out.numel():
            reduce_steps_kernel[(out.numel(),)](
                scores.contiguous(), offsets.contiguous(), out, HOW=how, BLOCK=BLOCK_STEPS, num_warps=1
            )
        return out
    if how == "last":
        padded = torch.nn.functional.pad(scores, (1, 0), value=float("nan"))  # index 0: no step
        return padded[torch.where(offsets[1:] > offsets[:-1], offsets[1:], 0)]
    out = torch.segment_reduce(scores, how, offsets=offsets)
    return torch.where(offsets[1:] > offsets[:-1], out, float("nan"))


def span_sums(values: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Sums of ``values[start[k]:end[k]]``, float32 [K], from one running sum in float64. Differentiable.

    Args:
        values: float [N].
        start, end: int64 [K] with 0 <= start <= end <= N; spans may overlap.
    """
    running = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
    return (running[end] - running[start]).float()
