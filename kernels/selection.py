"""The k best correct responses of every query, all queries at once.

Order: higher score first, the lower index wins a tie; scores of NaN come last. In Triton one program serves a query and
makes k passes over its responses, each for the best one after the previous: no sorting, and no limit on their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.kernels.dispatch import uses_triton
from mstar_mega.kernels.language import jit, tl

BLOCK = 256
_NONE = -1


@dataclass
class Selected:
    """Result of :func:`select_topk`."""

    index: Tensor
    """int64 [Q, k]: positions in ``score``, best first, then -1."""
    count: Tensor
    """int64 [Q]: how many were selected."""
    correct: Tensor
    """int64 [Q]: how many could have been; 0 marks a query without a correct response."""


@jit
def select_topk_kernel(  # type: ignore[no-untyped-def]
    SCORE, CORRECT, OFFSET, INDEX, COUNT, ELIGIBLE, k, BLOCK: tl.constexpr
):
    """One program: one query."""
    query = tl.program_id(0).to(tl.int64)
    begin = tl.load(OFFSET + query)
    end = tl.load(OFFSET + query + 1)
    eligible = tl.zeros((BLOCK,), tl.int64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        eligible += tl.load(CORRECT + at, mask=at < end, other=0).to(tl.int64)
    total = tl.sum(eligible, 0)
    tl.store(ELIGIBLE + query, total)
    tl.store(COUNT + query, tl.minimum(total, k))
    previous = tl.full((), float("inf"), SCORE.dtype.element_ty)
    previous_index = begin - 1
    for rank in range(0, k):
        best = tl.full((), -float("inf"), SCORE.dtype.element_ty)
        best_index = end
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(SCORE + at, mask=at < end, other=-float("inf"))
            x = tl.where(x != x, -float("inf"), x)
            open_ = tl.load(CORRECT + at, mask=at < end, other=0) != 0
            open_ = open_ & ((x < previous) | ((x == previous) & (at > previous_index)))
            top = tl.max(tl.where(open_, x, -float("inf")), 0)
            place = tl.min(tl.where(open_ & (x == top), at, end), 0)
            better = (place < end) & ((best_index == end) | (top > best))
            best = tl.where(better, top, best)
            best_index = tl.where(better, place, best_index)
        tl.store(INDEX + query * k + rank, tl.where(best_index < end, best_index, -1))
        previous = tl.where(best_index < end, best, -float("inf"))
        previous_index = tl.where(best_index < end, best_index, end)


def select_topk(score: Tensor, correct: Tensor, offsets: Tensor, k: int) -> Selected:
    """For each query its ``k`` best correct responses.

    Args:
        score: float32 or float64 [R], queries one after the other. NaN counts as minus infinity.
        correct: bool [R].
        offsets: int64 [Q + 1]: query q has the responses [offsets[q], offsets[q + 1]).
        k: at least 1.

    Raises:
        ValueError: k below 1, or shapes and dtypes that do not fit.
    """
    if k < 1:
        raise ValueError(f"selection.k is {k}: it must be at least 1")
    if correct.dtype != torch.bool or correct.shape != score.shape or score.dim() != 1:
        raise ValueError(
            f"score {list(score.shape)} and correct {correct.dtype} {list(correct.shape)} must be [R], bool"
        )
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or not offsets.numel():
        raise ValueError(f"offsets are {offsets.dtype} {list(offsets.shape)}: pass int64 [Q + 1], from 0 to R")
    queries, device = offsets.numel() - 1, score.device
    index = torch.full((queries, k), _NONE, device=device)
    if uses_triton("selection", score):
        count, eligible = torch.zeros(2, queries, dtype=torch.int64, device=device)
        if queries:
            select_topk_kernel[(queries,)](
                score.contiguous(), correct.to(torch.uint8).contiguous(), offsets.contiguous(), index, count, eligible,
                k, BLOCK=BLOCK, num_warps=1,
            )  # fmt: skip
        return Selected(index, count, eligible)
    query = torch.repeat_interleave(torch.arange(queries, device=device), offsets.diff(), output_size=score.numel())
    order = torch.argsort(score.nan_to_num(nan=float("-inf"), neginf=float("-inf"), posinf=float("inf")),
                          descending=True, stable=True)  # fmt: skip
    order = order[correct[order]]
    order = order[torch.argsort(query[order], stable=True)]
    eligible = torch.bincount(query[order], minlength=queries)
    rank = torch.arange(order.numel(), device=device) - (eligible.cumsum(0) - eligible)[query[order]]
    best = rank < k
    index[query[order[best]], rank[best]] = order[best]
    return Selected(index, eligible.clamp(max=k), eligible)
