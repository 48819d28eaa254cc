"""What a row of logits is reduced to, and the gradient these numbers give back: the core of all log-probabilities.

Of a row z (already divided by the temperature) a rank keeps three floats: lse = logsumexp_v z_v, the target's z_y
(minus infinity where another rank holds it) and the slice's entropy. :func:`merge_ranks` combines those of all
vocabulary slices with one all-gather; log-probability and gradient follow:

    log p(y) = z_y - lse     p_v = exp(z_v - lse)     entropy = sum_v p_v (lse - z_v)
    d(g log p(y) + h entropy) / d logit_v = (g [v = y] - p_v (g + h (z_v - lse + entropy))) / T

Sums run over differences to the maximum, so that large logits of one sign cost no accuracy.

Traffic in Triton: the forward reads each logit once, the backward reads it and writes the gradient; 6 bytes an element
in bfloat16 against 22 for Megatron's and Liger's vocabulary-parallel cross-entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_into_tensor, get_world_size

from mstar_mega.kernels.language import INTERPRETED, cdiv, jit, narrow, tl

NEG_INF = float("-inf")
BLOCK = 4096
"""Columns that a program handles at a time: 16 elements per thread of 8 warps."""
WARPS = 8
# Enough programs for every multiprocessor, also when there are few rows.
_PROGRAMS = 1024


# -- plain PyTorch ---------------------------------------------------------------------------------------------------


def scaled(logits: Tensor, temperature: float, valid: int, owned: bool = False) -> Tensor:
    """float32 logits / T, minus infinity from column ``valid`` on; a copy unless ``owned``."""
    z = logits.float()
    if not (owned and z is logits):
        z = z / temperature
    elif temperature != 1:
        z.div_(temperature)
    if valid < z.size(-1):
        z[..., max(0, valid) :] = NEG_INF
    return z


def stats_reference(z: Tensor, column: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(lse, target logit, entropy) of scaled logits [N, V]; ``column`` int64 [N], outside [0, V) for "not here"."""
    lse = torch.logsumexp(z, dim=-1)
    inside = (column >= 0) & (column < z.size(-1))
    at = column.clamp(0, max(z.size(-1) - 1, 0))
    target = torch.where(inside, z.gather(-1, at[:, None]).squeeze(-1), NEG_INF)
    if not entropy:
        return lse, target, None
    below = z - torch.where(lse == NEG_INF, 0.0, lse)[:, None]
    p = torch.exp(below)
    return lse, target, torch.where(p == 0, 0.0, p * below).sum(dim=-1).neg_()


def gradient_reference(
    z: Tensor, column: Tensor, lse: Tensor, g: Tensor, h: Tensor | None, H: Tensor | None, temperature: float
) -> Tensor:
    """Gradient of the logits, float32 [N, V], written over the scaled logits ``z``; H is the entropy."""
    inside = (column >= 0) & (column < z.size(-1))
    at = column.clamp(0, max(z.size(-1) - 1, 0))
    scale = (g / temperature)[:, None]
    factor = None
    if h is not None and H is not None:
        above = torch.where(z == NEG_INF, 0.0, z - (lse - H)[:, None])
        factor = above.mul_((h / temperature)[:, None]).add_(scale).neg_()
    z.sub_(lse[:, None]).exp_().mul_(-scale if factor is None else factor)
    return z.scatter_add_(-1, at[:, None], scale * inside[:, None])


# -- Triton ----------------------------------------------------------------------------------------------------------


@jit
def _add_block(x, scale, high, total, weighted, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add [lanes, EACH] logits to each lane's maximum, sum of exponentials and weighted sum: one correction of the sums
    for EACH elements, and no exchange between threads."""
    new = tl.maximum(high, tl.max(x, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    below, fall = x - base[:, None], high - base
    e, old = tl.exp2(below * scale), tl.exp2(fall * scale)
    if ENTROPY:
        moved = weighted + tl.where(total == 0.0, 0.0, total * fall)
        weighted = moved * old + tl.sum(tl.where(e == 0.0, 0.0, e * below), 1)
    return new, total * old + tl.sum(e, 1), weighted


@jit
def row_stats_kernel(  # type: ignore[no-untyped-def]
    Z, COLUMN, SKIP, MAX, SUM, WEIGHTED, TARGET, stride, valid, span, inverse_temperature,
    BLOCK: tl.constexpr, EACH: tl.constexpr, ENTROPY: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """One program: columns [split * span, ...) of one row -> maximum m, sum e^(x - m), sum (x - m) e^(x - m).

    The mask of the last block would keep all loads from being 16 bytes wide: it has that block alone.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    place = row * tl.num_programs(1) + split
    skip = False
    if HAS_SKIP:
        skip = tl.load(SKIP + row) != 0
    m = -float("inf")
    s = 0.0
    w = 0.0
    if not skip:
        begin = split * span
        end = tl.minimum(begin + span, valid)
        whole = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
        scale = inverse_temperature * 1.4426950408889634
        start = Z + row * stride
        at = tl.arange(0, BLOCK // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
        high = tl.full((BLOCK // EACH,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK // EACH,), tl.float32)
        weighted = tl.zeros((BLOCK // EACH,), tl.float32)
        for first in range(begin, whole, BLOCK):
            x = tl.load(start + (first + at)).to(tl.float32)
            high, total, weighted = _add_block(x, scale, high, total, weighted, ENTROPY)
        if whole < end:
            x = tl.load(start + (whole + at), mask=whole + at < end, other=-float("inf")).to(tl.float32)
            high, total, weighted = _add_block(x, scale, high, total, weighted, ENTROPY)
        m = tl.max(high, 0)
        fall = high - tl.where(m == -float("inf"), 0.0, m)
        lanes = tl.exp2(fall * scale)
        s = tl.sum(total * lanes, 0)
        if ENTROPY:
            w = tl.sum((weighted + tl.where(total == 0.0, 0.0, total * fall)) * lanes, 0) * inverse_temperature
        m *= inverse_temperature
        if split == 0:
            column = tl.load(COLUMN + row)
            here = (column >= 0) & (column < valid)
            z = tl.load(start + column, mask=here, other=-float("inf")).to(tl.float32)
            tl.store(TARGET + row, z * inverse_temperature)
    tl.store(MAX + place, m)
    tl.store(SUM + place, s)
    if ENTROPY:
        tl.store(WEIGHTED + place, w)


@jit
def row_grad_kernel(  # type: ignore[no-untyped-def]
    Z, OUT, COLUMN, LSE, ENT, G, H, stride, out_stride, local, valid, inverse_temperature,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one row's gradient; rows without upstream gradient are zeroed and never read."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(G + row) * inverse_temperature
    h = 0.0
    if ENTROPY:
        h = tl.load(H + row) * inverse_temperature
    out = OUT + row * out_stride + at
    if (g == 0.0) & (h == 0.0):
        tl.store(out, tl.zeros((BLOCK,), OUT.dtype.element_ty), mask=at < local)
    else:
        # Padding is read as well: its end lets loads be 16 bytes wide where that of the vocabulary does not.
        real = at < valid
        x = tl.load(Z + row * stride + at, mask=at < local, other=0.0).to(tl.float32) * inverse_temperature
        below = x - tl.load(LSE + row)
        p = tl.exp2(below * 1.4426950408889634)
        factor = g
        if ENTROPY:
            factor += h * tl.where(p == 0.0, 0.0, below + tl.load(ENT + row))
        grad = tl.where(at == tl.load(COLUMN + row), g, 0.0) - p * factor
        tl.store(out, narrow(tl.where(real, grad, 0.0), OUT.dtype.element_ty, INTERP), mask=at < local)


def stats_triton(
    logits: Tensor, column: Tensor, temperature: float, valid: int, entropy: bool, skip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`stats_reference`, from logits [N, V] that are not yet scaled. Rows with ``skip`` are not read."""
    N, V = logits.shape
    splits = max(1, min(cdiv(V, BLOCK), _PROGRAMS // max(N, 1)))
    span = cdiv(cdiv(V, splits), BLOCK) * BLOCK
    splits = max(1, cdiv(V, span))
    parts = [torch.empty(N, splits, device=logits.device, dtype=torch.float32) for _ in range(2 + entropy)]
    target = torch.zeros(N, device=logits.device, dtype=torch.float32)
    if N:
        row_stats_kernel[(N, splits)](
            logits, column, column if skip is None else skip, parts[0], parts[1], parts[-1], target,
            logits.stride(0), max(0, min(valid, V)), span, 1.0 / temperature,
            BLOCK=BLOCK, EACH=_each(logits), ENTROPY=entropy, HAS_SKIP=skip is not None, num_warps=WARPS,
        )  # fmt: skip
    lse, ent = merge_parts(parts[0], parts[1], parts[2] if entropy else None, dim=1)
    return lse, target, ent


def _each(logits: Tensor) -> int:
    """Neighbouring columns of a thread: those of 16 bytes, or one where rows do not all begin at 16 bytes."""
    aligned = logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0
    return 16 // logits.element_size() if aligned else 1


def merge_parts(m: Tensor, s: Tensor, w: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """(lse, entropy) from partial maxima m, sums of e^(x - m) and of (x - m) e^(x - m) along ``dim``."""
    high = m.amax(dim)
    base = torch.where(high == NEG_INF, 0.0, high)
    below = m - base.unsqueeze(dim)
    share = torch.exp(below)
    total = (s * share).sum(dim)
    log_total = torch.log(total)
    if w is None:
        return base + log_total, None
    moved = w + torch.where(share == 0, 0.0, s * below)
    return base + log_total, torch.where(total == 0, 0.0, log_total - (moved * share).sum(dim) / total)


def gradient_triton(
    logits: Tensor, out: Tensor, column: Tensor, lse: Tensor, g: Tensor, h: Tensor | None, H: Tensor | None,
    temperature: float, valid: int,
) -> Tensor:  # fmt: skip
    """Gradient of logits [N, V] into ``out`` [N, V] of any float dtype; ``out`` may be ``logits``."""
    N, V = logits.shape
    if N and V:
        row_grad_kernel[(N, cdiv(V, BLOCK))](
            logits, out, column, lse, lse if H is None else H, g, g if h is None else h,
            logits.stride(0), out.stride(0), V, max(0, min(valid, V)), 1.0 / temperature,
            BLOCK=BLOCK, ENTROPY=h is not None, INTERP=INTERPRETED, num_warps=WARPS,
        )  # fmt: skip
    return out


# -- over the ranks --------------------------------------------------------------------------------------------------


def merge_ranks(
    lse: Tensor, target: Tensor, entropy: Tensor | None, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The whole vocabulary's (lse, target logit, entropy) from every slice's: one all-gather of 8 or 12 bytes a row.

    A gather is exact, needs no common reference, and replaces the two or three all-reduces of the usual scheme.
    """
    if group is None or get_world_size(group) == 1 or not lse.numel():
        return lse, target, entropy
    packed = torch.stack([lse, target] if entropy is None else [lse, target, entropy])
    size = get_world_size(group)
    everyone = packed.new_empty(size * packed.size(0), packed.size(1))
    all_gather_into_tensor(everyone, packed, group=group)
    everyone = everyone.view(size, *packed.shape)
    whole = torch.logsumexp(everyone[:, 0], dim=0)
    if entropy is not None:
        below = everyone[:, 0] - whole
        share = torch.exp(below)
        entropy = torch.where(share == 0, 0.0, share * (everyone[:, 2] - below)).sum(dim=0)
    return whole, everyone[:, 1].amax(dim=0), entropy
