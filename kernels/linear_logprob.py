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

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_world_size

from mstar_mega.kernels.dispatch import is_on, uses_triton
from mstar_mega.kernels.linear_head import (
    Gradients,
    Head,
    cast_like,
    local_stats,
    main_grad,
    some_of,
    spread,
    taken,
    weight_gradient,
)
from mstar_mega.kernels.logprob import check_arguments, local_valid, logprob_reference, vocab_parallel_logprob
from mstar_mega.kernels.row_stats import RowStats, masked, merge_ranks
from mstar_mega.kernels.sum_gradient import SumGradient

# -- log-probabilities -----------------------------------------------------------------------------------------------


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor, counted: Tensor, head: Head,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        index = some_of(counted)
        x, at = taken(hidden, index), taken(column, index)
        whole = merge_ranks(local_stats(head, x, at, entropy), head.temperature, head.group)
        kept = [spread(each, index, counted) for each in (whole.high, whole.log_sum, whole.target)]
        H = None if whole.entropy is None else spread(whole.entropy, index, counted)
        ctx.save_for_backward(hidden, column, counted, *kept, H)
        ctx.head, ctx.weight = head, weight
        log_prob = spread(whole.log_prob(head.temperature), index, counted)
        return log_prob, log_prob.new_empty(0) if H is None else H

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, column, counted, *kept = ctx.saved_tensors
        head, whole = ctx.head, RowStats(*kept)
        g = torch.where(counted, grad_outputs[0].float(), 0.0)
        h = None if whole.entropy is None else torch.where(counted, grad_outputs[1].float(), 0.0)
        index = some_of(g != 0 if h is None else (g != 0) | (h != 0))
        x, at, g = (taken(t, index) for t in (hidden, column, g))
        h = None if h is None else taken(h, index)
        whole = whole if index is None else whole.rows(index)
        fused = main_grad(ctx.weight) if ctx.needs_input_grad[1] else None
        gradients = Gradients(head, x, ctx.needs_input_grad[:3], fused)
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
        return dx, weight_gradient(ctx, gradients.weight, fused), cast_like(gradients.bias, head.bias), *[None] * 4


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
    head = Head.of(weight, bias, temperature, valid, group, uses_triton("linear_logprob", hidden))
    counted = target != ignore_index
    column = torch.where(counted, target - vocab_start, -1)
    log_prob, entropy = _LinearLogProb.apply(hidden, weight, bias, column, counted, head, with_entropy)
    return (log_prob, entropy) if with_entropy else log_prob


# -- the SFT loss ----------------------------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor, coefficient: Tensor, head: Head,
        kept: Tensor,
    ) -> Tensor:  # fmt: skip
        """Minus sum_i coefficient_i log p_i over the rows ``kept``, and its gradients for an upstream gradient of 1."""
        index = some_of(kept)
        x, at, g = (taken(t, index) for t in (hidden, column, -coefficient))
        gradients = Gradients(head, x, ctx.needs_input_grad[:3], None)
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
            fused = main_grad(ctx.weight)
            weight = weight * upstream if fused is None else fused.addcmul_(weight, upstream)
        bias = None if bias is None else bias * upstream
        return dx, weight_gradient(ctx, weight, fused), cast_like(bias, ctx.head.bias), *[None] * 4


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
    head = Head.of(weight, bias, temperature, valid, group, triton)
    column = torch.where(counted, target - vocab_start, -1)
    return _LinearCrossEntropy.apply(hidden, weight, bias, column, coefficient, head, coefficient != 0)


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Plain definitions of log-probability and entropy with whole logits, for tests."""
    return logprob_reference(torch.nn.functional.linear(hidden, weight, bias), target, temperature)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1):
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, H] and [V, H]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: give both the same dtype")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}, but weight {list(weight.shape)} needs [{weight.size(0)}]")
    check_arguments(hidden.shape[:1], target, temperature, f"hidden {list(hidden.shape)}")
