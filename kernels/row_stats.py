"""What a row of logits is reduced to, and the gradient these numbers give back: the core of all log-probabilities.

Of a row z a rank keeps :class:`RowStats`: the maximum, the log of the sum of exponentials over differences to it, the
target's z_y (minus infinity where another rank holds it) and the slice's entropy. :func:`merge_ranks` combines those of
all vocabulary slices with one all-gather; log-probability and gradient follow:

    log p_v = (z_v - max) / T - log sum_u exp((z_u - max) / T)     entropy = - sum_v p_v log p_v
    d(g log p_y + h entropy) / d logit_v = (g [v = y] - p_v (g + h (log p_v + entropy))) / T

Maximum and log-sum stay apart, and nothing but differences of logits is divided by the temperature: added up, or
divided before, they would be rounded as numbers of the logits' own size, which at 200 costs six bits.

Traffic in Triton: the forward reads each logit once, the backward reads it and writes the gradient; 6 bytes an element
in bfloat16 against 22 for Megatron's and Liger's vocabulary-parallel cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class RowStats:
    """Of rows of logits, or of a slice of them; float32 [N] each."""

    high: Tensor
    """Largest logit, minus infinity where there is none."""
    log_sum: Tensor
    """log sum_v exp((z_v - high) / T), minus infinity where there is none."""
    target: Tensor
    """The target's logit, minus infinity where it is not among them."""
    entropy: Tensor | None

    def log_prob(self, temperature: float) -> Tensor:
        """Of the target, under the whole vocabulary's numbers."""
        return (self.target - self.high) / temperature - self.log_sum

    def rows(self, which: Tensor | slice) -> RowStats:
        """Those of some rows."""
        entropy = None if self.entropy is None else self.entropy[which]
        return RowStats(self.high[which], self.log_sum[which], self.target[which], entropy)


def joined(parts: list[RowStats]) -> RowStats:
    """Those of all rows from those of stretches, in order."""
    if len(parts) == 1:
        return parts[0]
    high, log_sum, target = (torch.cat([getattr(p, name) for p in parts]) for name in ("high", "log_sum", "target"))
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return RowStats(high, log_sum, target, torch.cat(entropies) if entropies else None)


# -- plain PyTorch ---------------------------------------------------------------------------------------------------


def masked(logits: Tensor, valid: int, owned: bool = False) -> Tensor:
    """float32 logits, minus infinity from column ``valid`` on; a copy unless ``owned``."""
    z = logits.float()
    if not owned and z is logits:
        z = z.clone()
    if valid < z.size(-1):
        z[..., max(0, valid) :] = NEG_INF
    return z


def stats_reference(z: Tensor, column: Tensor, entropy: bool, temperature: float) -> RowStats:
    """Of masked logits [N, V]; ``column`` int64 [N], outside [0, V) for "not here"."""
    high = z.amax(-1) if z.size(-1) else z.new_full(z.shape[:-1], NEG_INF)
    inside = (column >= 0) & (column < z.size(-1))
    at = column.clamp(0, max(z.size(-1) - 1, 0))
    target = torch.where(inside, z.gather(-1, at[:, None]).squeeze(-1), NEG_INF)
    below = _divide(z - _finite(high)[:, None], temperature)
    if not entropy:
        return RowStats(high, below.exp_().sum(dim=-1).log_(), target, None)
    p = torch.exp(below)
    total = p.sum(dim=-1)
    log_sum = torch.log(total)
    weighted = torch.where(p == 0, 0.0, below.mul_(p)).sum(dim=-1)
    return RowStats(high, log_sum, target, torch.where(total == 0, 0.0, log_sum - weighted / total))


def _divide(x: Tensor, temperature: float) -> Tensor:
    """In place."""
    return x if temperature == 1 else x.div_(temperature)


def _finite(high: Tensor) -> Tensor:
    """What may be subtracted: 0 for the maximum of nothing."""
    return torch.where(high == NEG_INF, 0.0, high)


def gradient_reference(
    z: Tensor, column: Tensor, whole: RowStats, g: Tensor, h: Tensor | None, temperature: float
) -> Tensor:
    """Gradient of the logits, float32 [N, V], written over the masked logits ``z``."""
    inside = (column >= 0) & (column < z.size(-1))
    at = column.clamp(0, max(z.size(-1) - 1, 0))
    scale = (g / temperature)[:, None]
    _divide(z.sub_(whole.high[:, None]), temperature).sub_(whole.log_sum[:, None])
    factor = None
    if h is not None and whole.entropy is not None:
        above = torch.where(z == NEG_INF, 0.0, z + whole.entropy[:, None])
        factor = above.mul_((h / temperature)[:, None]).add_(scale).neg_()
    z.exp_().mul_(-scale if factor is None else factor)
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
    """One program: columns [split * span, ...) of one row -> maximum m of the logits, and of the differences x to it,
    divided by the temperature, sum e^x and sum x e^x.

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
        if split == 0:
            column = tl.load(COLUMN + row)
            here = (column >= 0) & (column < valid)
            z = tl.load(start + column, mask=here, other=-float("inf")).to(tl.float32)
            tl.store(TARGET + row, z)
    tl.store(MAX + place, m)
    tl.store(SUM + place, s)
    if ENTROPY:
        tl.store(WEIGHTED + place, w)


@jit
def row_grad_kernel(  # type: ignore[no-untyped-def]
    Z, OUT, COLUMN, HIGH, LOG_SUM, ENT, G, H, stride, out_stride, local, valid, inverse_temperature,
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
        x = tl.load(Z + row * stride + at, mask=at < local, other=0.0).to(tl.float32)
        below = (x - tl.load(HIGH + row)) * inverse_temperature - tl.load(LOG_SUM + row)
        p = tl.exp2(below * 1.4426950408889634)
        factor = g
        if ENTROPY:
            factor += h * tl.where(p == 0.0, 0.0, below + tl.load(ENT + row))
        grad = tl.where(at == tl.load(COLUMN + row), g, 0.0) - p * factor
        tl.store(out, narrow(tl.where(real, grad, 0.0), OUT.dtype.element_ty, INTERP), mask=at < local)


def stats_triton(
    logits: Tensor, column: Tensor, temperature: float, valid: int, entropy: bool, skip: Tensor | None = None
) -> RowStats:
    """As :func:`stats_reference`, from logits [N, V] that are not yet masked. Rows with ``skip`` are not read."""
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
    return merge_parts(parts[0], parts[1], parts[2] if entropy else None, target, temperature, dim=1)


def _each(logits: Tensor) -> int:
    """Neighbouring columns of a thread: those of 16 bytes, or one where rows do not all begin at 16 bytes."""
    aligned = logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0
    return 16 // logits.element_size() if aligned else 1


def merge_parts(m: Tensor, s: Tensor, w: Tensor | None, target: Tensor, temperature: float, dim: int) -> RowStats:
    """From partial maxima m, and sums of e^x and of x e^x over x = (logit - m) / T, along ``dim``."""
    high = m.amax(dim)
    below = (m - _finite(high).unsqueeze(dim)) / temperature
    share = torch.exp(below)
    total = (s * share).sum(dim)
    log_sum = torch.log(total)
    if w is None:
        return RowStats(high, log_sum, target, None)
    moved = w + torch.where(share == 0, 0.0, s * below)
    entropy = torch.where(total == 0, 0.0, log_sum - (moved * share).sum(dim) / total)
    return RowStats(high, log_sum, target, entropy)


def gradient_triton(
    logits: Tensor, out: Tensor, column: Tensor, whole: RowStats, g: Tensor, h: Tensor | None, temperature: float,
    valid: int,
) -> Tensor:  # fmt: skip
    """Gradient of logits [N, V] into ``out`` [N, V] of any float dtype; ``out`` may be ``logits``."""
    N, V = logits.shape
    if N and V:
        row_grad_kernel[(N, cdiv(V, BLOCK))](
            logits, out, column, whole.high, whole.log_sum, g if whole.entropy is None else whole.entropy, g,
            g if h is None else h,
            logits.stride(0), out.stride(0), V, max(0, min(valid, V)), 1.0 / temperature,
            BLOCK=BLOCK, ENTROPY=h is not None, INTERP=INTERPRETED, num_warps=WARPS,
        )  # fmt: skip
    return out


# -- over the ranks --------------------------------------------------------------------------------------------------


def merge_ranks(local: RowStats, temperature: float, group: ProcessGroup | None) -> RowStats:
    """The whole vocabulary's numbers from every slice's: one all-gather of 12 or 16 bytes a row.

    A gather is exact, needs no common reference, and replaces the two or three all-reduces of the usual scheme.
    """
    if group is None or get_world_size(group) == 1 or not local.high.numel():
        return local
    own = [local.high, local.log_sum, local.target]
    packed = torch.stack(own if local.entropy is None else [*own, local.entropy])
    size = get_world_size(group)
    everyone = packed.new_empty(size * packed.size(0), packed.size(1))
    all_gather_into_tensor(everyone, packed, group=group)
    highs, log_sums, targets, *entropies = everyone.view(size, *packed.shape).unbind(1)
    high = highs.amax(dim=0)
    below = (highs - _finite(high)) / temperature + log_sums
    log_sum = torch.logsumexp(below, dim=0)
    entropy = None
    if entropies:
        log_share = below - log_sum
        share = torch.exp(log_share)
        entropy = torch.where(share == 0, 0.0, share * (entropies[0] - log_share)).sum(dim=0)
    return RowStats(high, log_sum, targets.amax(dim=0), entropy)
