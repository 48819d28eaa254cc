"""The head of the language model outside autograd: hidden rows to logits in chunks, what is read off them, and back.

What ``linear_logprob.py`` computes its log-probabilities, its loss and their gradients with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mstar_mega.kernels import linear_stats
from mstar_mega.kernels.dispatch import chunk_bytes
from mstar_mega.kernels.language import cdiv
from mstar_mega.kernels.row_stats import (
    RowStats,
    gradient_reference,
    gradient_triton,
    joined,
    masked,
    stats_reference,
    stats_triton,
)

_PARTS = 4
"""Chunks at least. Each one more reads the weight twice, and reads and writes its float32 gradient: 12 HV bytes."""
_SMALL = 32 * 2**20
"""Bytes for which it is not worth it: no more than the hidden states of 4,096 tokens of 4,096 channels."""


def linear_logits(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """hidden [N, H], weight [V, H] of one dtype -> float32 logits [N, V], never rounded to that dtype: bfloat16 logits
    would put errors of 0.02 to 0.06 into log-probabilities, and ties into samples. ``out``: where they go."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    return torch.mm(hidden.float(), weight.float().t(), out=out)


@dataclass(frozen=True)
class Head:
    """What turns hidden rows into this rank's logits, and how they are read."""

    weight: Tensor
    """In the dtype of the products: low precision is widened on the CPU, whose products would round it."""
    bias: Tensor | None
    temperature: float
    valid: int
    group: ProcessGroup | None
    triton: bool

    @staticmethod
    def of(
        weight: Tensor, bias: Tensor | None, temperature: float, valid: int, group: ProcessGroup | None, triton: bool
    ) -> Head:
        """The head's own view of its parameters, outside autograd."""
        fused = triton and linear_stats.fits(weight, weight)
        weight = weight.detach() if weight.is_cuda or fused else weight.detach().float()
        return Head(weight, None if bias is None else bias.detach(), temperature, valid, group, triton)

    def chunks(self, rows: int) -> Iterator[slice]:
        """Nearly equal slices of rows, each of at most

        - the rows whose logits, with what is computed from them, fit into the budget (and one row at least);
        - a quarter of all, rounded up, or the rows that fit into ``_SMALL`` where these are more.
        """
        # Float32 logits and their gradient; plain PyTorch needs one more temporary.
        row = max(1, self.weight.size(0)) * (8 if self.triton else 12)
        most = max(1, min(chunk_bytes() // row, max(cdiv(rows, _PARTS), _SMALL // row)))
        parts = cdiv(rows, most)
        for i in range(parts):
            yield slice(i * rows // parts, (i + 1) * rows // parts)

    def logits(self, x: Tensor) -> Tensor:
        z = linear_logits(x, self.weight)
        return z if self.bias is None else z.add_(self.bias.float())

    def stats(self, z: Tensor, column: Tensor, entropy: bool) -> RowStats:
        """Of this rank's logits. Plain PyTorch masks ``z`` in place."""
        if self.triton:
            return stats_triton(z, column, self.temperature, self.valid, entropy)
        return stats_reference(masked(z, self.valid, owned=True), column, entropy, self.temperature)

    def gradient(
        self, z: Tensor, column: Tensor, whole: RowStats, g: Tensor, h: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Gradient of the logits from logits as :meth:`stats` left them, in the dtype its products take."""
        dtype = dtype if z.is_cuda else torch.float32
        if self.triton:
            out = z if dtype == torch.float32 else torch.empty_like(z, dtype=dtype)
            return gradient_triton(z, out, column, whole, g, h, self.temperature, self.valid)
        return gradient_reference(z, column, whole, g, h, self.temperature).to(dtype)


class Gradients:
    """Collects the gradients of hidden rows, weight and bias over chunks."""

    def __init__(self, head: Head, x: Tensor, needs: tuple[bool, bool, bool], accumulator: Tensor | None) -> None:
        self.head = head
        self.x = torch.empty_like(x) if needs[0] else None
        self.needs_weight, self.weight = needs[1], accumulator
        self.bias = torch.zeros(head.weight.size(0), device=x.device) if needs[2] else None

    def add(self, rows: slice, x: Tensor, d: Tensor) -> None:
        """Add a chunk: hidden rows ``x`` and the gradient ``d`` of their logits."""
        weight = self.head.weight
        if self.x is not None:
            self.x[rows] = torch.mm(d, weight.to(d.dtype))
        if self.needs_weight:
            self.weight = _add_product(self.weight, d, x.to(d.dtype))
        if self.bias is not None:
            self.bias += d.sum(dim=0, dtype=torch.float32)


def _add_product(total: Tensor | None, d: Tensor, x: Tensor) -> Tensor:
    """total + d^T x in float32, whatever the dtype of d and x."""
    if d.dtype == torch.float32:
        product = torch.mm(d.t(), x)
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(d.t(), x, out_dtype=torch.float32)
    return torch.ops.aten.addmm.dtype_out(total, d.t(), x, torch.float32, out=total)


def local_stats(head: Head, x: Tensor, column: Tensor, entropy: bool) -> RowStats:
    if head.triton and linear_stats.fits(x, head.weight):
        if x.size(0):
            return linear_stats.linear_stats(x, head.weight, head.bias, column, head.temperature, head.valid, entropy)
        none = x.new_empty(0, dtype=torch.float32)
        return RowStats(none, none, none, none if entropy else None)
    parts = [head.stats(head.logits(x[rows]), column[rows], entropy) for rows in head.chunks(x.size(0))]
    if not parts:
        parts = [head.stats(head.logits(x), column, entropy)]
    return joined(parts)


def some_of(mask: Tensor) -> Tensor | None:
    """Indices of the true rows; None when that is all of them. (On CUDA this waits for the mask.)"""
    index = torch.nonzero(mask).flatten()
    return None if index.numel() == mask.numel() else index


def taken(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


def spread(x: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Values of the rows in ``index``, zeros in the others."""
    return x if index is None else x.new_zeros(like.numel()).index_copy_(0, index, x)


def cast_like(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if x is None or like is None else x.to(like.dtype)


def main_grad(weight: Tensor) -> Tensor | None:
    """megatron's float32 gradient buffer of a weight, where its hooks say whether we have added to it ourselves."""
    buffer = getattr(weight, "main_grad", None)
    usable = torch.is_tensor(buffer) and buffer.dtype == torch.float32 and hasattr(weight, "grad_added_to_main_grad")
    return buffer if usable else None


def weight_gradient(ctx: Any, total: Tensor | None, fused: Tensor | None) -> Tensor | None:
    """What autograd gets for the weight. Next to ``main_grad`` it is a placeholder that makes megatron's hook run."""
    weight = ctx.weight
    if not ctx.needs_input_grad[1]:
        return None
    if fused is not None:
        weight.grad_added_to_main_grad = True
        # Shared with the embedding: the hook adds what autograd sums up, ours must count for nothing.
        make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
        return make(weight)
    return torch.zeros_like(weight) if total is None else total.to(weight.dtype)
