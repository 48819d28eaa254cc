"""Log-probabilities and the SFT loss from hidden states: the logits exist only in chunks of rows.

    z = hidden weight^T + bias        log p(y) = z_y / T - logsumexp_v(z_v / T)

Operations, with 2 N H V for one matrix product (N counts rows that are not ignored, A of them with a gradient):

    :func:`linear_logprob`        forward 2NHV, backward 6AHV: any upstream gradient, so the logits are computed again
    :func:`linear_cross_entropy`  forward 6NHV, backward 0: its gradient is known up to one factor, and taken at once
    frozen weight                 one product less each: no weight gradient

Ignored rows leave before the forward, rows whose upstream gradient is exactly zero before the backward: no tolerance,
the result is the same. Every vocabulary rank drops the same rows. A chunk fits into ``kernels.chunk_mb``, and is a
quarter of the rows at most, so that no tensor has the size of rows times vocabulary whatever that budget is.
Weight gradients accumulate in float32, straight into megatron's ``main_grad`` where the weight has one.
Without a gradient on CUDA the forward is the kernel of ``linear_stats.py``, whose logits never reach memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_world_size

from mstar_mega.kernels import linear_stats
from mstar_mega.kernels.dispatch import chunk_bytes, is_on, uses_triton
from mstar_mega.kernels.language import cdiv
from mstar_mega.kernels.logprob import check_arguments, local_valid, logprob_reference, vocab_parallel_logprob
from mstar_mega.kernels.row_stats import (
    RowStats,
    gradient_reference,
    gradient_triton,
    joined,
    masked,
    merge_ranks,
    stats_reference,
    stats_triton,
)
from mstar_mega.kernels.sum_gradient import SumGradient

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
class _Head:
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
    ) -> _Head:
        """The head's own view of its parameters, outside autograd."""
        fused = triton and linear_stats.fits(weight, weight)
        weight = weight.detach() if weight.is_cuda or fused else weight.detach().float()
        return _Head(weight, None if bias is None else bias.detach(), temperature, valid, group, triton)

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


class _Gradients:
    """Collects the gradients of hidden rows, weight and bias over chunks."""

    def __init__(self, head: _Head, x: Tensor, needs: tuple[bool, bool, bool], accumulator: Tensor | None) -> None:
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


# -- log-probabilities -----------------------------------------------------------------------------------------------


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor, counted: Tensor, head: _Head,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        index = _some_of(counted)
        x, at = _take(hidden, index), _take(column, index)
        whole = merge_ranks(_local_stats(head, x, at, entropy), head.temperature, head.group)
        kept = [_spread(each, index, counted) for each in (whole.high, whole.log_sum, whole.target)]
        H = None if whole.entropy is None else _spread(whole.entropy, index, counted)
        ctx.save_for_backward(hidden, column, counted, *kept, H)
        ctx.head, ctx.weight = head, weight
        log_prob = _spread(whole.log_prob(head.temperature), index, counted)
        return log_prob, log_prob.new_empty(0) if H is None else H

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, column, counted, *kept = ctx.saved_tensors
        head, whole = ctx.head, RowStats(*kept)
        g = torch.where(counted, grad_outputs[0].float(), 0.0)
        h = None if whole.entropy is None else torch.where(counted, grad_outputs[1].float(), 0.0)
        index = _some_of(g != 0 if h is None else (g != 0) | (h != 0))
        x, at, g = (_take(t, index) for t in (hidden, column, g))
        h = None if h is None else _take(h, index)
        whole = whole if index is None else whole.rows(index)
        fused = _main_grad(ctx.weight) if ctx.needs_input_grad[1] else None
        gradients = _Gradients(head, x, ctx.needs_input_grad[:3], fused)
        for rows in head.chunks(x.size(0)):
            z = head.logits(x[rows])
            if not head.triton:
                z = masked(z, head.valid, owned=True)
            d = head.gradient(z, at[rows], whole.rows(rows), g[rows], None if h is None else h[rows], x.dtype)
            gradients.add(rows, x[rows], d)
            del z, d  # before the next chunk, not after it
        dx = gradients.x
        if dx is not None and index is not None:
            dx = hidden.new_zeros(hidden.shape).index_copy_(0, index, dx)
        return dx, _weight_gradient(ctx, gradients.weight, fused), _cast(gradients.bias, head.bias), *[None] * 4


def _local_stats(head: _Head, x: Tensor, column: Tensor, entropy: bool) -> RowStats:
    if head.triton and linear_stats.fits(x, head.weight):
        if x.size(0):
            return linear_stats.linear_stats(x, head.weight, head.bias, column, head.temperature, head.valid, entropy)
        none = x.new_empty(0, dtype=torch.float32)
        return RowStats(none, none, none, none if entropy else None)
    parts = [head.stats(head.logits(x[rows]), column[rows], entropy) for rows in head.chunks(x.size(0))]
    if not parts:
        parts = [head.stats(head.logits(x), column, entropy)]
    return joined(parts)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    group: ProcessGroup | None = None,
    with_entropy: bool = False,
    reduce_hidden_grad: bool = True,
) -> Any:
    """Log-probabilities, float32 [N], of ``target`` under softmax((hidden weight^T + bias) / temperature).

    Differentiable per token in hidden, weight and bias. Under a group: one all-gather of 12 bytes a row in the forward.

    Args:
        hidden: [N, H] of any float dtype, the same on every rank of the group.
        weight: [V_local, H] of hidden's dtype: this rank's slice of the vocabulary.
        target: int64 [N] global ids; ``ignore_index`` gives 0 and no gradient, an id that no rank holds gives minus
            infinity.
        bias: [V_local].
        valid_vocab: ids at or above it (padding rows) do not exist.
        vocab_start: global id of this rank's first row.
        group: tensor-parallel group; None where the vocabulary is whole.
        with_entropy: also return the entropy, float32 [N], differentiable as well.
        reduce_hidden_grad: sum hidden's gradient over the group, so that every rank holds all of it; False where the
            caller's own operation does (megatron's copy to the tensor-parallel region, or the sequence gather).

    Raises:
        ValueError: shapes or dtypes that do not fit, a temperature that is not above 0.
    """
    _check(hidden, weight, bias, target, temperature)
    valid = local_valid(weight.size(0), valid_vocab, vocab_start)
    if reduce_hidden_grad and group is not None and get_world_size(group) > 1:
        hidden = SumGradient.apply(hidden, group)
    if not is_on("linear_logprob"):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return vocab_parallel_logprob(
            logits, target, temperature=temperature, ignore_index=ignore_index, valid_vocab=valid_vocab,
            vocab_start=vocab_start, group=group, with_entropy=with_entropy,
        )  # fmt: skip
    head = _Head.of(weight, bias, temperature, valid, group, uses_triton("linear_logprob", hidden))
    counted = target != ignore_index
    column = torch.where(counted, target - vocab_start, -1)
    log_prob, entropy = _LinearLogProb.apply(hidden, weight, bias, column, counted, head, with_entropy)
    return (log_prob, entropy) if with_entropy else log_prob


# -- the SFT loss ----------------------------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor, coefficient: Tensor, head: _Head,
        kept: Tensor,
    ) -> Tensor:  # fmt: skip
        """Minus sum_i coefficient_i log p_i over the rows ``kept``, and its gradients for an upstream gradient of 1."""
        index = _some_of(kept)
        x, at, g = (_take(t, index) for t in (hidden, column, -coefficient))
        gradients = _Gradients(head, x, ctx.needs_input_grad[:3], None)
        total = torch.zeros((), device=x.device)
        for rows in head.chunks(x.size(0)):
            z = head.logits(x[rows])
            whole = merge_ranks(head.stats(z, at[rows], False), head.temperature, head.group)
            total += (whole.log_prob(head.temperature) * g[rows]).sum()
            d = head.gradient(z, at[rows], whole, g[rows], None, dtype=x.dtype)
            gradients.add(rows, x[rows], d)
            del z, d
        ctx.save_for_backward(gradients.x, gradients.weight, gradients.bias, index)
        ctx.head, ctx.weight, ctx.rows = head, weight, hidden.size(0)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, index = ctx.saved_tensors
        upstream = grad_outputs[0].float()
        dx = None
        if x is not None:
            dx = x * upstream.to(x.dtype)
            dx = dx if index is None else dx.new_zeros(ctx.rows, dx.size(1)).index_copy_(0, index, dx)
        fused = None
        if weight is not None:
            fused = _main_grad(ctx.weight)
            weight = weight * upstream if fused is None else fused.addcmul_(weight, upstream)
        bias = None if bias is None else bias * upstream
        return dx, _weight_gradient(ctx, weight, fused), _cast(bias, ctx.head.bias), *[None] * 4


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    group: ProcessGroup | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    row_weight: Tensor | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """The loss - sum_i row_weight_i log p(target_i), float32 scalar; see :func:`linear_logprob` for the arguments.

    Args:
        reduction: "mean" divides by the number of counted rows; without any it is 0, with zero gradients.
        row_weight: float [N], no gradient; rows with weight 0 cost nothing. None: 1 for each.

    Under a group the forward has one all-gather of 12 bytes a row for each chunk: a chunk's gradient needs its rows'
    maximum and log-sum over all ranks. The gradient is computed with the loss, and only where something asks for it.
    """
    _check(hidden, weight, bias, target, temperature)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; it must be sum or mean")
    if row_weight is not None and row_weight.shape != target.shape:
        raise ValueError(f"row_weight has shape {list(row_weight.shape)}, but target {list(target.shape)}")
    counted = target != ignore_index
    coefficient = counted.float() if row_weight is None else torch.where(counted, row_weight.detach().float(), 0.0)
    if reduction == "mean":
        coefficient = coefficient / counted.sum().clamp(min=1)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if not (differentiable and is_on("linear_cross_entropy")):
        kept = torch.where(coefficient != 0, target, ignore_index)
        log_prob = linear_logprob(
            hidden, weight, kept, bias=bias, temperature=temperature, ignore_index=ignore_index,
            valid_vocab=valid_vocab, vocab_start=vocab_start, group=group, reduce_hidden_grad=reduce_hidden_grad,
        )  # fmt: skip
        return -torch.where(coefficient != 0, log_prob * coefficient, 0.0).sum()
    valid = local_valid(weight.size(0), valid_vocab, vocab_start)
    if reduce_hidden_grad and group is not None and get_world_size(group) > 1:
        hidden = SumGradient.apply(hidden, group)
    triton = uses_triton("linear_cross_entropy", hidden)
    head = _Head.of(weight, bias, temperature, valid, group, triton)
    column = torch.where(counted, target - vocab_start, -1)
    return _LinearCrossEntropy.apply(hidden, weight, bias, column, coefficient, head, coefficient != 0)


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Plain definitions of log-probability and entropy with whole logits, for tests."""
    return logprob_reference(torch.nn.functional.linear(hidden, weight, bias), target, temperature)


# -- pieces ----------------------------------------------------------------------------------------------------------


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1):
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, H] and [V, H]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: give both the same dtype")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}, but weight {list(weight.shape)} needs [{weight.size(0)}]")
    check_arguments(hidden.shape[:1], target, temperature, f"hidden {list(hidden.shape)}")


def _some_of(mask: Tensor) -> Tensor | None:
    """Indices of the true rows; None when that is all of them. (On CUDA this waits for the mask.)"""
    index = torch.nonzero(mask).flatten()
    return None if index.numel() == mask.numel() else index


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


def _spread(x: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Values of the rows in ``index``, zeros in the others."""
    return x if index is None else x.new_zeros(like.numel()).index_copy_(0, index, x)


def _cast(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if x is None or like is None else x.to(like.dtype)


def _main_grad(weight: Tensor) -> Tensor | None:
    """megatron's float32 gradient buffer of a weight, where its hooks say whether we have added to it ourselves."""
    buffer = getattr(weight, "main_grad", None)
    usable = torch.is_tensor(buffer) and buffer.dtype == torch.float32 and hasattr(weight, "grad_added_to_main_grad")
    return buffer if usable else None


def _weight_gradient(ctx: Any, total: Tensor | None, fused: Tensor | None) -> Tensor | None:
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
