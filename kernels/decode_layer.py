"""What a decode step does between its matrix products, in one launch each: add and norm, rotate and store, SwiGLU.

    add_rms_norm:      x <- x + delta;  y = x / sqrt(mean(x^2) + eps) * weight
    rotate_and_store:  q, k <- x cos + swap(x) sin at the token's position (``Rope``); k and v go to the cache
    swiglu:            y = silu(gate) * up

The plain definitions are the operations of the training forward, in its order: in float32 on one device they give the
same bits. The kernels compute in float32 and round once; those for the CPU are compiled C (``native.c``). Nothing here
asks the host or allocates: results go to ``out`` (kernels) or are new tensors (plain PyTorch); use what is returned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar_mega.kernels.dispatch import native_for, uses_triton
from mstar_mega.kernels.language import INTERPRETED, cdiv, jit, narrow, next_power_of_2, tl
from mstar_mega.kernels.norms import warps_for

BLOCK = 1024
"""Channels of a SwiGLU program."""


@jit
def add_norm_kernel(  # type: ignore[no-untyped-def]
    X, DELTA, WEIGHT, Y, width, eps, BLOCK: tl.constexpr, ADD: tl.constexpr, INTERP: tl.constexpr
):
    """One program: one row. The sum is rounded before it is normed, as the training forward does it."""
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(X + row + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(DELTA + row + at, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(x, X.dtype.element_ty, INTERP)
        tl.store(X + row + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    y = x / tl.sqrt(tl.sum(x * x, 0) / width + eps) * tl.load(WEIGHT + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row + at, narrow(y, Y.dtype.element_ty, INTERP), mask=inside)


@jit(varying=("dummy",))
def rotate_store_kernel(  # type: ignore[no-untyped-def]
    QKV, COS, SIN, ROWS, LENGTH, PROMPT, Q, K, V, dummy, limit, key_heads, rep,
    D: tl.constexpr, BD: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: the queries, key and value of one row and key head. QKV [B, Hk, rep + 2, D]."""
    b = tl.program_id(0) // key_heads
    head = tl.program_id(0) % key_heads
    slot = tl.load(ROWS + b)
    own = tl.load(LENGTH + slot) - 1
    position = tl.maximum(own, 0) + tl.load(PROMPT + slot)
    d = tl.arange(0, BD)
    inside = d < D
    swapped = tl.where(d < D // 2, d + D // 2, d - D // 2)
    cos = tl.load(COS + position * D + d, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(SIN + position * D + d, mask=inside, other=0.0).to(tl.float32)
    source = QKV + tl.program_id(0).to(tl.int64) * (rep + 2) * D
    for j in range(0, rep):
        x = tl.load(source + j * D + d, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(source + j * D + swapped, mask=inside, other=0.0).to(tl.float32)
        to = Q + ((b * key_heads + head) * rep + j) * D + d
        tl.store(to, narrow(x * cos + y * sin, Q.dtype.element_ty, INTERP), mask=inside)
    x = tl.load(source + rep * D + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + rep * D + swapped, mask=inside, other=0.0).to(tl.float32)
    to = ((slot * key_heads + head) * limit + own) * D + d
    running = tl.where((slot < dummy) & (own >= 0) & (own < limit), d, D) < D
    tl.store(K + to, narrow(x * cos + y * sin, K.dtype.element_ty, INTERP), mask=running)
    tl.store(V + to, tl.load(source + (rep + 1) * D + d, mask=inside, other=0.0), mask=running)


@jit
def swiglu_kernel(H, Y, width, BLOCK: tl.constexpr, INTERP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: BLOCK channels of one row; H [B, 2, width], Y [B, width]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(H + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(H + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    gate = narrow(gate / (1.0 + tl.exp(-gate)), Y.dtype.element_ty, INTERP).to(tl.float32)
    tl.store(Y + row * width + at, narrow(gate * up, Y.dtype.element_ty, INTERP), mask=inside)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """x [B, H] becomes x + delta in place (delta None: stays); returns its RMS norm [B, H]."""
    if uses_triton("decode", x):
        width = x.size(1)
        block = next_power_of_2(width)
        add_norm_kernel[(x.size(0),)](
            x, x if delta is None else delta, weight, out, width, eps,
            BLOCK=block, ADD=delta is not None, INTERP=INTERPRETED, num_warps=warps_for(block),
        )  # fmt: skip
        return out
    if (lib := native_for("decode", x)) is not None:
        moved = None if delta is None else delta.data_ptr()
        lib.add_rms_norm(x.data_ptr(), moved, weight.data_ptr(), out.data_ptr(), *x.shape, eps)
        return out
    if delta is not None:
        x.add_(delta)
    return torch.nn.functional.rms_norm(x, (x.size(1),), weight, eps)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, length: Tensor, prompt_length: Tensor,
    k_cache: Tensor, v_cache: Tensor, at: Tensor | None, out: Tensor,
) -> Tensor:  # fmt: skip
    """Rotate a step's queries and keys to their positions and put keys and values into the cache.

    Args:
        qkv: [B, Hk, rep + 2, D]: of each key head its queries, key and value, before rotation.
        cos, sin: [positions, D] of every position, the sine's first half negated (``Rope.table``). Plain PyTorch: of
            each row, [B, D].
        rows: int64 [B], the slots that decode; ``slots`` (one past the last) for a row that is none.
        length: int64 [slots + 1], own tokens of each slot, the new one included.
        prompt_length: int64 [slots + 1].
        k_cache, v_cache: [slots, Hk, limit, D].
        at: int64 [B * Hk], the new token's places in the flattened cache; plain PyTorch only.

    Returns:
        Rotated queries [B, Hk * rep, D].
    """
    B, key_heads, columns, D = qkv.shape
    rep = columns - 2
    if at is None and (lib := native_for("decode", qkv)) is not None:
        places = (qkv, cos, sin, rows, length, prompt_length, out, k_cache, v_cache)
        sizes = (k_cache.size(0), k_cache.size(2), key_heads, rep, D)
        lib.rotate_and_store(*(place.data_ptr() for place in places), B, *sizes)
        return out
    if at is None:
        rotate_store_kernel[(B * key_heads,)](
            qkv, cos, sin, rows, length, prompt_length, out, k_cache, v_cache, k_cache.size(0), k_cache.size(2),
            key_heads, rep, D=D, BD=next_power_of_2(D), INTERP=INTERPRETED, num_warps=1,
        )  # fmt: skip
        return out
    x = qkv[:, :, : rep + 1]
    x = torch.addcmul(x * cos[:, None, None], x.roll(D // 2, -1), sin[:, None, None])
    k_cache.view(-1, D).index_copy_(0, at, x[:, :, rep].reshape(-1, D))
    v_cache.view(-1, D).index_copy_(0, at, qkv[:, :, rep + 1].reshape(-1, D))
    return x[:, :, :rep].reshape(B, key_heads * rep, D)


def swiglu(h: Tensor, out: Tensor) -> Tensor:
    """h [B, 2 F], gates before values -> [B, F]."""
    if uses_triton("decode", h):
        width = out.size(1)
        swiglu_kernel[(h.size(0), cdiv(width, BLOCK))](h, out, width, BLOCK=BLOCK, INTERP=INTERPRETED, num_warps=4)
        return out
    if (lib := native_for("decode", h)) is not None:
        lib.swiglu(h.data_ptr(), out.data_ptr(), *out.shape)
        return out
    gate, up = h.chunk(2, dim=1)
    return torch.nn.functional.silu(gate).mul_(up)
