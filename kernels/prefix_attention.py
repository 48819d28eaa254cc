"""Attention of many continuations to one shared prefix: the prefix's keys and values are read once per group.

For a query row with scores s_p over the prefix and s_o over its own tokens, softmax([s_p, s_o]) [v_p; v_o] is computed
jointly, so sharing changes nothing but the order of additions. Plain PyTorch computes it as it stands; Triton computes
each part for itself and merges by log-sum-exp (``attend.py``), also in the backward.

Shapes: G groups, n continuations each, R query tokens each, P prefix and L own key tokens; Hq query heads, Hk key heads
(Hq a multiple of Hk, query head h reads key head h // (Hq / Hk)), D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mstar_mega.kernels import attend
from mstar_mega.kernels.dispatch import chunk_bytes, uses_triton


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal self-attention [G, P, Hq, D] over right-padded rows; rows past a row's length hold finite garbage."""
    if q.is_cuda and q.dtype == torch.float32:
        # With shared key heads torch has no float32 kernel on CUDA that does without all scores at once.
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
    return out.transpose(1, 2)


def prefix_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_bias: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    own_bias: Tensor,
    scale: float,
) -> Tensor:
    """Continuations attend to their group's prefix and to themselves.

    Args:
        q: [G, n, R, Hq, D].
        k_prefix, v_prefix: [G, Hk, P, D], once per group.
        prefix_bias: float32 [G, P]: 0 or minus infinity (padding of the prefix).
        k_own, v_own: [G, n, Hk, L, D].
        own_bias: float32, broadcastable to [G, n, R, L]: 0 or minus infinity (causality, padding).
        scale: factor on the scores.

    Returns:
        [G, n, R, Hq, D]. A row that may attend to nothing is a caller's mistake (NaN).
    """
    if uses_triton("attention", q) and attend.fits(q):
        return _PrefixAttention.apply(q, k_prefix, v_prefix, prefix_bias, k_own, v_own, own_bias, scale)
    # The definition, on so many continuations, or rows of one, at a time that their scores fit into a chunk
    # (kernels.chunk_mb). With gradients, the scores of several chunks are computed again in the backward.
    G, n, R, Hq, _ = q.shape
    L = k_own.size(3)
    most = max(1, chunk_bytes() // (4 * G * Hq * (k_prefix.size(2) + L)))
    if most >= n * R:
        return _prefix_reference(q, k_prefix, v_prefix, prefix_bias, k_own, v_own, own_bias, scale)
    own_bias = own_bias.expand(G, n, R, L)

    def part(some: slice, rows: slice) -> Tensor:
        inputs = (q[:, some, rows], k_prefix, v_prefix, prefix_bias, k_own[:, some], v_own[:, some])
        arguments = (*inputs, own_bias[:, some, rows], scale)
        if not torch.is_grad_enabled():
            return _prefix_reference(*arguments)
        kept: Tensor = checkpoint(_prefix_reference, *arguments, use_reentrant=False, preserve_rng_state=False)
        return kept

    if most >= R:
        return torch.cat([part(some, slice(None)) for some in _slices(n, most // R)], dim=1)
    whole = [torch.cat([part(some, rows) for rows in _slices(R, most)], dim=2) for some in _slices(n, 1)]
    return torch.cat(whole, dim=1)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _prefix_reference(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_bias: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    own_bias: Tensor,
    scale: float,
) -> Tensor:
    """The definition."""
    G, n, R, Hq, D = q.shape
    Hk, P = k_prefix.size(1), k_prefix.size(2)
    rep = Hq // Hk
    # [G, Hk, n, R, rep, D]: all rows that read one prefix head, side by side
    grouped = (q * scale).view(G, n, R, Hk, rep, D).permute(0, 3, 1, 2, 4, 5)
    s_prefix = torch.matmul(grouped.reshape(G, Hk, n * R * rep, D), k_prefix.transpose(-1, -2))
    s_prefix = s_prefix.view(G, Hk, n, R, rep, P) + prefix_bias[:, None, None, None, None, :]
    own_rows = grouped.transpose(1, 2).reshape(G, n, Hk, R * rep, D)
    s_own = torch.matmul(own_rows, k_own.transpose(-1, -2)).view(G, n, Hk, R, rep, -1)
    s_own = s_own.transpose(1, 2) + own_bias[:, None, :, :, None, :]
    weights = torch.cat([s_prefix, s_own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    w_prefix, w_own = weights[..., :P], weights[..., P:]
    out = torch.matmul(w_prefix.reshape(G, Hk, n * R * rep, P), v_prefix).view(G, Hk, n, R, rep, D)
    own = torch.matmul(w_own.transpose(1, 2).reshape(G, n, Hk, R * rep, -1), v_own)
    out = out + own.view(G, n, Hk, R, rep, D).transpose(1, 2)
    return out.permute(0, 2, 3, 1, 4, 5).reshape(G, n, R, Hq, D)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, *inputs: Any) -> Tensor:
        *tensors, scale = inputs
        rows = q.reshape(-1, *q.shape[3:]).contiguous()
        out, lse = attend.forward(rows, _parts(q.shape, *tensors), scale)
        ctx.save_for_backward(rows, *tensors, out, lse)
        ctx.shape, ctx.scale = q.shape, scale
        return out.view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, *tensors, out, lse = ctx.saved_tensors
        parts = _parts(ctx.shape, *tensors)
        dout = grad_outputs[0].reshape(rows.shape)
        dq, ((dkp, dvp), (dko, dvo)) = attend.backward(rows, parts, out, lse, dout, ctx.scale)
        own = tensors[3].shape
        return dq.view(ctx.shape), dkp, dvp, None, dko.view(own), dvo.view(own), None, None


def _parts(
    shape: torch.Size,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_bias: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    own_bias: Tensor,
) -> list[attend.Part]:
    """The shared prefix, read by all n R tokens of a group, and every continuation's own tokens."""
    G, n, R = shape[:3]
    k_own, v_own = (_side_by_side(x.flatten(0, 1)) for x in (k_own, v_own))
    own_bias = _side_by_side(own_bias.expand(G, n, R, k_own.size(2)))
    prefix_bias = _side_by_side(prefix_bias)[:, None, None, :]
    return [
        attend.Part(_side_by_side(k_prefix), _side_by_side(v_prefix), prefix_bias, n * R),
        attend.Part(k_own, v_own, own_bias, R),
    ]


def _side_by_side(x: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()
