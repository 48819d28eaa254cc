"""The ids that top-p keeps, by a search over the order of the logits: no sorting, no row gathered from other ranks.

Formula: of the allowed ids in order of falling logit, the lower id first where logits are equal, the first n with

    w_1 + ... + w_(n-1) < needed <= w_1 + ... + w_n,   needed = ceil(p sum_v w_v),   w_v = 2^40 exp((z_v - max z) / T)

The weights are integers, made by float32 operations that round alike everywhere and by integer ones. Sums of integers
do not depend on their order, so the set is the same for every sharding, in PyTorch, in Triton and in its interpreter,
also where p falls on the edge between two ids. A weight is right to 1e-8 and what (z - max z) / T loses in float32;
below 2^-40 of the largest it is 0.

The search finds the last kept id's logit four bits at a time, from the top: of the ids whose bits so far are right, it
adds up the weights by their next four bits (16 sums), and goes on with those where the mass reaches ``needed``. That
takes one reading of the row for four bits of the logits' dtype, 8 for float32 and 4 for bfloat16, and under tensor
parallelism an all-gather of 128 bytes a row each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_gather_into_tensor, all_reduce, get_rank, get_world_size

from mstar_mega.kernels.language import jit, tl

BLOCK = 256
WARPS = 8
PARTS = 64
"""Parts of a row that are added up at a time."""
BINS = 16
"""Values of four bits; the kernels have the number written out."""
_LOW = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}
"""Bits at the end of a float32 that are zero in logits of this dtype, in fours."""
_FRACTION = 24
_FARTHEST = float(63 << _FRACTION)
"""Steps of 2^-24 powers of two below the largest weight; a shift by more bits is not defined."""
_EXP2 = (117063, 1368751, 10285566, 59582747, 257938951, 744260993, 1 << 30)
"""2^-f on [0, 1) as a polynomial in -f with these coefficients / 2^30, highest degree first: error below 7e-9."""


@dataclass
class Kept:
    """What top-p leaves of this rank's slice: logits above ``floor``, and some of those equal to it."""

    floor: Tensor
    """float32 [B]: the lowest logit that is kept, minus infinity in a row without allowed ids."""
    ties: Tensor
    """int64 [B, parts]: how many of the ids whose logit is ``floor`` each part keeps, the lowest ids first."""


Split = tuple[int, int]
"""(parts of the slice, columns of each but the last)."""


def top_p_kept(
    logits: Tensor,
    *,
    top_p: float,
    temperature: float | Tensor,
    allowed: Tensor | None,
    floor: Tensor | None,
    valid: int,
    split: Split | None,
    group: ProcessGroup | None,
) -> Kept:
    """Find what top-p keeps.

    Args:
        logits: [B, V_local] of any float dtype, columns contiguous.
        top_p: below 1.
        temperature: above 0, or 0 for 1. float64 [B]: of each row.
        allowed: uint8 [V_local], 0 at banned ids; None allows all.
        floor: float32 [B]: lower logits are not allowed (top-k); None allows all.
        valid: columns from this one on do not exist.
        split: how Triton cuts the slice into parts; None for plain PyTorch (one part).
        group: the ranks that hold the other slices; None where the vocabulary is whole.
    """
    scale = _steps_per_logit(temperature, logits)
    if split is None:
        z = allowed_logits(logits, allowed, valid)
        if floor is not None:
            z = z.masked_fill(z < floor[:, None], float("-inf"))
        highest = z.amax(dim=1) if z.size(1) else z.new_full((z.size(0),), float("-inf"))
    else:
        highest = _highest(logits, allowed, valid, split)
    if group is not None:
        all_reduce(highest, ReduceOp.MAX, group=group)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)  # a row without allowed ids: all weights are 0
    if split is not None:
        sums = _sums_triton(logits, allowed, floor, highest, scale, valid, split)
    elif group is not None:
        sums = _sums_sorted(z, weights(z, highest, scale))
    else:
        return _definition(z, weights(z, highest, scale), top_p)
    return _search(sums, highest, scale, _LOW.get(logits.dtype, 0), top_p, split is not None, group)


# -- plain PyTorch ---------------------------------------------------------------------------------------------------


def allowed_logits(logits: Tensor, allowed: Tensor | None, valid: int) -> Tensor:
    """float32 [B, valid], minus infinity where ``allowed`` (uint8 [V_local]) is 0."""
    z = logits[:, :valid].float()
    return z if allowed is None else z.masked_fill(allowed[:valid] == 0, float("-inf"))


def weights(z: Tensor, highest: Tensor, scale: Tensor) -> Tensor:
    """w of the formula: int64 [B, V] of float32 logits [B, V], highest logits [B] and steps per logit [B].

    The difference and its product with ``scale`` are rounded to float32 one after the other, which every device does
    alike; all that follows is integer.
    """
    steps = (highest[:, None] - z).mul_(scale[:, None]).clamp_(max=_FARTHEST).to(torch.int64)
    fraction = steps & ((1 << _FRACTION) - 1)
    power = torch.full_like(steps, _EXP2[0])
    for coefficient in _EXP2[1:]:
        power.mul_(fraction).bitwise_right_shift_(_FRACTION).neg_().add_(coefficient)
    return (power << 10) >> (steps >> _FRACTION)


def _steps_per_logit(temperature: float | Tensor, logits: Tensor) -> Tensor:
    """Powers of two per logit, in steps of 2^-24, as float32 [B] rounds it."""
    if not isinstance(temperature, Tensor):
        temperature = torch.full((logits.size(0),), temperature, dtype=torch.float64, device=logits.device)
    t = torch.where(temperature == 0, 1.0, temperature)
    return ((1 << _FRACTION) / (t * math.log(2))).clamp(max=3e38).float()


def _needed(total: Tensor, top_p: float) -> Tensor:
    """The mass that is to be reached, int64, of the whole mass, int64."""
    return torch.minimum((total.double() * top_p).ceil().long(), total).clamp(min=1)


def _definition(z: Tensor, w: Tensor, top_p: float) -> Kept:
    """The formula, for a whole vocabulary."""
    ordered, order = z.sort(dim=1, descending=True, stable=True)
    w = w.gather(1, order)
    mass = w.cumsum(dim=1)
    kept = mass - w < _needed(mass[:, -1:], top_p)
    floor = ordered.gather(1, kept.sum(dim=1, keepdim=True) - 1)
    return Kept(floor.squeeze(1), (kept & (ordered == floor)).sum(dim=1, keepdim=True))


def _ordered(z: Tensor) -> Tensor:
    """32-bit numbers, as int64, in the order of float32 logits. Zeros of both signs are one number."""
    bits = z.masked_fill(z == 0, 0.0).view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits + (1 << 31))


def _logit_of(number: Tensor, low: int) -> Tensor:
    """The float32 logit of an :func:`_ordered` number whose last ``low`` bits are unknown and zero in the logit."""
    bits = torch.where(number < 1 << 31, (~number >> low) << low, number - (1 << 31))
    return bits.to(torch.int32).view(torch.float32)


Sums = Callable[[Tensor, int], Tensor]
"""Given the top bits found so far, int64 [B], and the place of the next four: the weights' sums by these four, for the
ids that agree so far, int64 [B, parts, 16]."""


def _sums_sorted(z: Tensor, w: Tensor) -> Sums:
    """From the slice's logits, sorted once."""
    numbers, order = _ordered(z).sort(dim=1)
    mass = torch.nn.functional.pad(w.gather(1, order).cumsum(dim=1), (1, 0))

    def sums(found: Tensor, place: int) -> Tensor:
        edges = (found[:, None] * BINS + torch.arange(BINS + 1, device=z.device)) << place
        return mass.gather(1, torch.searchsorted(numbers, edges)).diff(dim=1)[:, None]

    return sums


def _descend(mass: Tensor, needed: Tensor, found: Tensor, above: Tensor) -> None:
    """Choose the next four bits, in place: the highest ones with which ``needed`` is reached.

    mass int64 [B, parts, 16]; needed, found and above int64 [B]: mass to reach, bits so far, mass of higher numbers.
    """
    bins = mass.sum(dim=1)
    reached = above[:, None] + bins.flip(1).cumsum(dim=1).flip(1) >= needed[:, None]
    digit = (reached.sum(dim=1) - 1).clamp_(min=0)
    higher = torch.arange(BINS, device=mass.device) > digit[:, None]
    above += (bins * higher).sum(dim=1)
    found.mul_(BINS).add_(digit)


def _search(
    sums: Sums, highest: Tensor, scale: Tensor, low: int, top_p: float, triton: bool, group: ProcessGroup | None
) -> Kept:
    """Find the last kept id's logit, four bits at a time, and how many of its equals stay."""
    found, above = torch.zeros(2, highest.numel(), dtype=torch.int64, device=highest.device)
    needed = above
    for place in range(28, low - 1, -4):
        mine = sums(found, place)
        mass = mine if group is None else of_ranks(mine.sum(dim=1), group)
        if place == 28:
            total = mass.sum(dim=(1, 2))
            needed = _needed(total, top_p)
        if triton:
            _descend_triton(mass, needed, found, above)
        else:
            _descend(mass, needed, found, above)
    floor = _logit_of(found << low, low)
    weight = weights(floor[:, None], highest, scale).clamp_(min=1)
    keep = (needed - above)[:, None].add_(weight - 1).div_(weight, rounding_mode="floor")
    digit = (found % BINS)[:, None, None]

    def equal(mass: Tensor) -> Tensor:
        return mass.gather(2, digit.expand(-1, mass.size(1), -1)).squeeze(2) // weight

    if group is not None:
        keep = keep - equal(mass)[:, : get_rank(group)].sum(dim=1, keepdim=True)
    ties = equal(mine)
    ties = (keep - (ties.cumsum(dim=1) - ties)).clamp_(min=0)
    return Kept(floor.masked_fill(total == 0, float("-inf")), ties)


def of_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, n] of every rank -> [B, ranks, n]."""
    size = get_world_size(group)
    everyone = x.new_empty(size * x.size(0), x.size(1))
    all_gather_into_tensor(everyone, x.contiguous(), group=group)
    return everyone.view(size, *x.shape).transpose(0, 1)


# -- Triton ----------------------------------------------------------------------------------------------------------


@jit
def top_p_highest_kernel(Z, ALLOWED, HIGHEST, stride, valid, span, BLOCK: tl.constexpr, BAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: the highest allowed logit of columns [split * span, ...) of one row."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, valid)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        raw = tl.load(Z + row * stride + at, mask=at < end, other=-float("inf")).to(tl.float32)
        if BAN:
            raw = tl.where(tl.load(ALLOWED + at, mask=at < end, other=0) != 0, raw, -float("inf"))
        highest = tl.maximum(highest, raw)
    tl.store(HIGHEST + row * tl.num_programs(1) + tl.program_id(1), tl.max(highest, 0))


@jit(varying=("place",))
def top_p_sums_kernel(  # type: ignore[no-untyped-def]
    Z, ALLOWED, FLOOR, HIGHEST, SCALE, FOUND, MASS, stride, valid, span, place,
    BLOCK: tl.constexpr, BAN: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """One program: columns [split * span, ...) of one row. MASS: [B, splits, 16]. Weights as in :func:`weights`."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, valid)
    highest = tl.load(HIGHEST + row)
    scale = tl.load(SCALE + row)
    found = (tl.load(FOUND + row) << 4).to(tl.uint32)
    floor = -float("inf")
    if TOP_K:
        floor = tl.load(FLOOR + row)
    bins = tl.arange(0, 16)
    mass = tl.zeros((16, BLOCK), tl.int64)
    for first in tl.range(begin, end, BLOCK, loop_unroll_factor=4):  # four loads at a time
        at = first + tl.arange(0, BLOCK)
        raw = tl.load(Z + row * stride + at, mask=at < end, other=-float("inf")).to(tl.float32)
        steps = tl.minimum((highest - raw) * scale, 1056964608.0).to(tl.int32)
        fraction = (steps & 0xFFFFFF).to(tl.int64)
        power = 1368751 - ((fraction * 117063) >> 24)
        power = 10285566 - ((power * fraction) >> 24)
        power = 59582747 - ((power * fraction) >> 24)
        power = 257938951 - ((power * fraction) >> 24)
        power = 744260993 - ((power * fraction) >> 24)
        power = 1073741824 - ((power * fraction) >> 24)
        weight = (power << 10) >> (steps >> 24).to(tl.int64)
        if BAN:
            weight = tl.where(tl.load(ALLOWED + at, mask=at < end, other=0) != 0, weight, 0)
        if TOP_K:
            weight = tl.where(raw < floor, 0, weight)
        bits = tl.where(raw == 0, 0.0, raw).to(tl.int32, bitcast=True)
        number = tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)
        digit = ((number >> place) ^ found).to(tl.int32, bitcast=True)  # 16 or more, or negative: other bits differ
        mass += tl.where(digit[None, :] == bins[:, None], weight[None, :], 0)
    split = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(MASS + split * 16 + bins, tl.sum(mass, 1))


@jit(varying=("parts",))
def top_p_descend_kernel(MASS, NEEDED, FOUND, ABOVE, parts, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: one row of :func:`_descend`."""
    row = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, 16)
    mass = tl.zeros((16,), tl.int64)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = (row * parts + part[:, None]) * 16 + bins[None, :]
        mass += tl.sum(tl.load(MASS + at, mask=(part < parts)[:, None], other=0), 0)
    above = tl.load(ABOVE + row)
    reached = above + tl.sum(mass, 0) - tl.cumsum(mass, 0) + mass >= tl.load(NEEDED + row)
    digit = tl.maximum(tl.sum(reached.to(tl.int32), 0) - 1, 0)
    tl.store(ABOVE + row, above + tl.sum(tl.where(bins > digit, mass, 0), 0))
    tl.store(FOUND + row, tl.load(FOUND + row) * 16 + digit)


def _highest(logits: Tensor, allowed: Tensor | None, valid: int, split: Split) -> Tensor:
    (B, _), (splits, span) = logits.shape, split
    highest = torch.empty(B, splits, device=logits.device)
    if B:
        top_p_highest_kernel[(B, splits)](
            logits, highest if allowed is None else allowed, highest, logits.stride(0), valid, span,
            BLOCK=8 * BLOCK, BAN=allowed is not None, num_warps=WARPS,
        )  # fmt: skip
    return highest.amax(dim=1)


def _sums_triton(
    logits: Tensor,
    allowed: Tensor | None,
    floor: Tensor | None,
    highest: Tensor,
    scale: Tensor,
    valid: int,
    split: Split,
) -> Sums:
    (B, _), (splits, span) = logits.shape, split

    def sums(found: Tensor, place: int) -> Tensor:
        mass = torch.empty(B, splits, BINS, dtype=torch.int64, device=logits.device)
        if B:
            top_p_sums_kernel[(B, splits)](
                logits, mass if allowed is None else allowed, highest if floor is None else floor, highest, scale,
                found, mass, logits.stride(0), valid, span, place,
                BLOCK=BLOCK, BAN=allowed is not None, TOP_K=floor is not None, num_warps=WARPS,
            )  # fmt: skip
        return mass

    return sums


def _descend_triton(mass: Tensor, needed: Tensor, found: Tensor, above: Tensor) -> None:
    B, parts, _ = mass.shape
    if B:
        top_p_descend_kernel[(B,)](mass.contiguous(), needed, found, above, parts, PARTS=PARTS, num_warps=4)
