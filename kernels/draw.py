"""The draw of a decode step in Triton, launch by launch; ``sampling.py`` has the definition.

    begin_kernel      what each row feeds, its temperature, and the counter of its noise
    sample_kernel     the best candidate of each part of a row's logits, and the sums for its log-probs
    merge_kernel      the same of this rank's whole slice: five numbers a row, which ranks exchange
    conclude_kernel   token, log-probs and surviving mass from every rank's five numbers
    advance_kernel    the slots' newest tokens and lengths

One kernel reads each logit once (top-k: twice; top-p: ten times) and makes noise, both log-sum-exps and the draw on the
way: 4 B V bytes for float32 logits, where the plain definition takes about ten passes. Everything lies in fixed places
(:class:`Slots`, :class:`Scratch`): a step allocates nothing and asks the host nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_into_tensor, get_world_size

from mstar_mega.kernels.language import cdiv, jit, next_power_of_2, tl
from mstar_mega.kernels.top_p import Split

BLOCK = 2048
WARPS = 8
ROWS = 128
"""Rows of a program that moves the slots' state."""
_PROGRAMS = 1024


@jit
def _mix(x):  # type: ignore[no-untyped-def]
    """``noise.mix`` of uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def _exp(x):  # type: ignore[no-untyped-def]
    """e^x by the instruction for powers of two; ``tl.exp`` takes four more of them for results below 2^-126."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def _log_sum(high, total):  # type: ignore[no-untyped-def]
    """Log-sum-exp of all parts from each part's maximum and sum of e^(x - maximum)."""
    m = tl.max(high, 0)
    base = tl.where(m == -float("inf"), 0.0, m)
    sums = tl.sum(total * _exp(high - base), 0)
    return tl.where(sums == 0.0, -float("inf"), base + tl.log(tl.where(sums == 0.0, 1.0, sums)))


@jit(varying=("rows",))
def begin_kernel(  # type: ignore[no-untyped-def]
    SLOT, TOKEN, KEY, LENGTH, TEMPERATURE, SEED, FED, COUNTER, HOT, rows, BLOCK: tl.constexpr
):
    """One program: BLOCK rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    slot = tl.load(SLOT + row, mask=there, other=0)
    position = tl.load(LENGTH + slot, mask=there, other=0).to(tl.uint64, bitcast=True)
    key = tl.load(KEY + slot, mask=there, other=0).to(tl.uint64, bitcast=True)
    counter = _mix(key + (position + 1) * 0x9E3779B97F4A7C15)
    counter = _mix(counter + tl.load(SEED).to(tl.uint64, bitcast=True))
    tl.store(COUNTER + row, counter.to(tl.int64, bitcast=True), mask=there)
    tl.store(FED + row, tl.load(TOKEN + slot, mask=there, other=0), mask=there)
    tl.store(HOT + row, tl.load(TEMPERATURE + slot, mask=there, other=1.0), mask=there)


@jit
def sample_kernel(  # type: ignore[no-untyped-def]
    Z, ALLOWED, FLOOR, LEFT, COUNTER, TEMPERATURE, BEST, TOKEN, CHOSEN, STATS, stride, valid, start, span,
    BLOCK: tl.constexpr, BAN: tl.constexpr, FLOORED: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """One program: columns [split * span, ...) of one row. STATS: [2 or 4, B, splits] maxima and sums, all then kept.

    LEFT: int64 [B, splits], how many of the logits equal to the floor stay, the first ones.
    The noise is that of ``noise.py``: SplitMix64 of (counter, id), its top 23 bits. A row of temperature 0 has none.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    place = row * splits + split
    plane = tl.num_programs(0).to(tl.int64) * splits
    begin = split * span
    end = tl.minimum(begin + span, valid)
    lane = tl.arange(0, BLOCK)
    counter = tl.load(COUNTER + row).to(tl.uint64, bitcast=True)
    temperature = tl.load(TEMPERATURE + row).to(tl.float32)
    inverse_temperature = tl.div_rn(1.0, tl.where(temperature == 0.0, 1.0, temperature))
    noise = tl.where(temperature == 0.0, 0.0, 1.0)
    floor = -float("inf")
    if FLOORED:
        floor = tl.load(FLOOR + row)
    left = 0
    if TIES:
        left = tl.load(LEFT + place).to(tl.int32)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    chosen = tl.full((BLOCK,), -float("inf"), tl.float32)
    column = begin + lane
    high = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    kept_high = tl.full((BLOCK,), -float("inf"), tl.float32)
    kept_total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, BLOCK):
        at = first + lane
        raw = tl.load(Z + row * stride + at, mask=at < end, other=-float("inf")).to(tl.float32)
        x = raw * inverse_temperature
        new = tl.maximum(high, x)
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * _exp(high - base) + _exp(x - base)
        high = new
        if BAN:
            x = tl.where(tl.load(ALLOWED + at, mask=at < end, other=0) != 0, x, -float("inf"))
        if FLOORED:
            x = tl.where(raw < floor, -float("inf"), x)
        if TIES:
            tied = ((raw == floor) & (x > -float("inf"))).to(tl.int32)
            x = tl.where((tied != 0) & (tl.cumsum(tied, 0) > left), -float("inf"), x)
            left -= tl.sum(tied, 0)
        if BAN or FLOORED:
            new = tl.maximum(kept_high, x)
            base = tl.where(new == -float("inf"), 0.0, new)
            kept_total = kept_total * _exp(kept_high - base) + _exp(x - base)
            kept_high = new
        bits = counter + (at + start + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
        u = ((bits >> 41).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        noisy = x - tl.log(-tl.log(u)) * noise
        better = noisy > best
        best = tl.where(better, noisy, best)
        chosen = tl.where(better, x, chosen)
        column = tl.where(better, at, column)
    top = tl.max(best, 0)
    winner = tl.min(tl.where(best == top, column, 0x7FFFFFFF), 0)
    tl.store(BEST + place, top)
    tl.store(TOKEN + place, winner.to(tl.int64) + start)
    tl.store(CHOSEN + place, tl.max(tl.where(column == winner, chosen, -float("inf")), 0))
    m = tl.max(high, 0)
    tl.store(STATS + place, m)
    tl.store(STATS + plane + place, tl.sum(total * _exp(high - tl.where(m == -float("inf"), 0.0, m)), 0))
    if BAN or FLOORED:
        m = tl.max(kept_high, 0)
        sums = kept_total * _exp(kept_high - tl.where(m == -float("inf"), 0.0, m))
        tl.store(STATS + 2 * plane + place, m)
        tl.store(STATS + 3 * plane + place, tl.sum(sums, 0))


@jit(varying=("splits",))
def merge_kernel(  # type: ignore[no-untyped-def]
    BEST, TOKEN, CHOSEN, STATS, PACKED, splits, SPLITS: tl.constexpr, NARROWED: tl.constexpr
):
    """One program: one row. PACKED float64 [B, 5]: best, its id (exact), its logit, both log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * splits
    at = tl.arange(0, SPLITS)
    there = at < splits
    place = row * splits + at
    best = tl.load(BEST + place, mask=there, other=-float("inf"))
    token = tl.load(TOKEN + place, mask=there, other=0x7FFFFFFFFFFF)
    top = tl.max(best, 0)
    winner = tl.min(tl.where(best == top, token, 0x7FFFFFFFFFFF), 0)
    chosen = tl.load(CHOSEN + place, mask=there, other=-float("inf"))
    chosen = tl.max(tl.where(token == winner, chosen, -float("inf")), 0)
    m = tl.load(STATS + place, mask=there, other=-float("inf"))
    whole = _log_sum(m, tl.load(STATS + plane + place, mask=there, other=0.0))
    kept = whole
    if NARROWED:
        m = tl.load(STATS + 2 * plane + place, mask=there, other=-float("inf"))
        kept = _log_sum(m, tl.load(STATS + 3 * plane + place, mask=there, other=0.0))
    to = PACKED + row * 5
    tl.store(to, top.to(tl.float64))
    tl.store(to + 1, winner.to(tl.float64))
    tl.store(to + 2, chosen.to(tl.float64))
    tl.store(to + 3, whole.to(tl.float64))
    tl.store(to + 4, kept.to(tl.float64))


@jit
def conclude_kernel(PACKED, DRAWN, ranks, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: one row. PACKED float64 [ranks, B, 5], DRAWN float64 [4, B]."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    at = tl.arange(0, RANKS)
    there = at < ranks
    place = PACKED + (at * rows + row) * 5
    best = tl.load(place, mask=there, other=-float("inf"))
    first = tl.min(tl.where((best == tl.max(best, 0)) & there, at, RANKS), 0)
    token = tl.sum(tl.where(at == first, tl.load(place + 1, mask=there, other=0.0), 0.0), 0)
    chosen = tl.max(tl.where(at == first, tl.load(place + 2, mask=there, other=0.0), -float("inf")), 0).to(tl.float32)
    ones = tl.full((RANKS,), 1.0, tl.float32)
    whole = _log_sum(tl.load(place + 3, mask=there, other=-float("inf")).to(tl.float32), ones)
    kept = _log_sum(tl.load(place + 4, mask=there, other=-float("inf")).to(tl.float32), ones)
    tl.store(DRAWN + row, token)
    tl.store(DRAWN + rows + row, (chosen - whole).to(tl.float64))
    tl.store(DRAWN + 2 * rows + row, (chosen - kept).to(tl.float64))
    tl.store(DRAWN + 3 * rows + row, tl.exp(kept - whole).to(tl.float64))


@jit(varying=("rows", "slots"))
def advance_kernel(SLOT, DRAWN, TOKEN, LENGTH, rows, slots, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: BLOCK rows. Rows that are none (slot ``slots``) move nothing."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(SLOT + row, mask=row < rows, other=0)
    running = (row < rows) & (slot < slots)
    tl.store(TOKEN + slot, tl.load(DRAWN + row, mask=running, other=0.0).to(tl.int64), mask=running)
    tl.store(LENGTH + slot, tl.load(LENGTH + slot, mask=running, other=0) + 1, mask=running)


@dataclass
class Slots:
    """What the device knows of each slot. One place more than there are slots: rows that are none point to it."""

    length: Tensor
    """int64 [slots + 1]: own tokens."""
    prompt_length: Tensor
    """int64 [slots + 1]"""
    key: Tensor
    """int64 [slots + 1]: names the sample's noise."""
    token: Tensor
    """int64 [slots + 1]: the newest."""
    temperature: Tensor
    """float64 [slots + 1]"""

    @staticmethod
    def of(slots: int, device: torch.device) -> Slots:
        """All empty."""
        numbers = torch.zeros(4, slots + 1, dtype=torch.int64, device=device)
        length, prompt_length, key, token = numbers
        return Slots(length, prompt_length, key, token, torch.ones(slots + 1, dtype=torch.float64, device=device))

    @property
    def count(self) -> int:
        return self.length.numel() - 1


@dataclass
class Scratch:
    """Where a draw of up to so many rows leaves what its launches hand on."""

    best: Tensor
    token: Tensor
    chosen: Tensor
    stats: Tensor
    packed: Tensor
    """float64 [rows, 5]"""

    @staticmethod
    def of(rows: int, local: int, device: torch.device) -> Scratch:
        """For slices of ``local`` logits."""
        places = max(b * split_of(b, local)[0] for b in range(1, rows + 1)) if rows else 0
        best, chosen = torch.empty(2, places, device=device)
        return Scratch(
            best,
            torch.empty(places, dtype=torch.int64, device=device),
            chosen,
            torch.empty(4 * places, device=device),
            torch.empty(rows, 5, dtype=torch.float64, device=device),
        )


def split_of(rows: int, local: int) -> Split:
    """Parts of a row, each for one program, and their columns."""
    splits = max(1, min(cdiv(local, BLOCK), _PROGRAMS // max(rows, 1)))
    span = cdiv(cdiv(local, splits), BLOCK) * BLOCK
    return max(1, cdiv(local, span)), span


def begin(rows: Tensor, slots: Slots, seed: Tensor, fed: Tensor, counter: Tensor, temperature: Tensor) -> None:
    """Of each row (int64 [B], a slot): its newest token, its noise's counter and its temperature, [B] each.

    ``seed``: int64 [1]. The counter is ``mix(counters(key, length) + seed)``, see ``noise.py``.
    """
    begin_kernel[(cdiv(rows.numel(), ROWS),)](
        rows, slots.token, slots.key, slots.length, slots.temperature, seed, fed, counter, temperature, rows.numel(),
        BLOCK=ROWS, num_warps=4,
    )  # fmt: skip


def candidates(
    logits: Tensor,
    temperature: Tensor,
    allowed: Tensor | None,
    floor: Tensor | None,
    ties: Tensor | None,
    counter: Tensor,
    valid: int,
    start: int,
    split: Split,
    scratch: Scratch,
) -> Tensor:
    """``sampling.draw_rows``, with ``ties`` [B, splits]; gives this slice's five numbers, float64 [B, 5] of scratch."""
    B, (splits, span) = logits.size(0), split
    packed = scratch.packed[:B]
    if not B:
        return packed
    narrowed = allowed is not None or floor is not None
    sample_kernel[(B, splits)](
        logits, counter if allowed is None else allowed, counter if floor is None else floor,
        counter if ties is None else ties, counter, temperature, scratch.best, scratch.token, scratch.chosen,
        scratch.stats, logits.stride(0), valid, start, span,
        BLOCK=BLOCK, BAN=allowed is not None, FLOORED=floor is not None, TIES=ties is not None, num_warps=WARPS,
    )  # fmt: skip
    merge_kernel[(B,)](
        scratch.best, scratch.token, scratch.chosen, scratch.stats, packed, splits,
        SPLITS=next_power_of_2(splits), NARROWED=narrowed, num_warps=1,
    )  # fmt: skip
    return packed


def gathered(packed: Tensor, group: ProcessGroup | None, out: Tensor | None = None) -> Tensor:
    """[B, 5] of every rank -> [ranks, B, 5], in rank order. ``out``: room for so many numbers."""
    if group is None:
        return packed[None]
    ranks, numbers = get_world_size(group), packed.numel()
    everyone = packed.new_empty(ranks * numbers) if out is None else out[: ranks * numbers]
    all_gather_into_tensor(everyone.view(-1, packed.size(1)), packed, group=group)
    return everyone.view(ranks, *packed.shape)


def conclude(everyone: Tensor, drawn: Tensor) -> Tensor:
    """``sampling.conclude`` of every rank's numbers [ranks, B, 5], into ``drawn``, float64 [4, B]."""
    ranks, B, _ = everyone.shape
    if B:
        conclude_kernel[(B,)](everyone, drawn, ranks, RANKS=next_power_of_2(ranks), num_warps=1)
    return drawn


def advance(rows: Tensor, drawn: Tensor, slots: Slots) -> None:
    """The rows' slots have drawn these tokens (``drawn`` begins with float64 [B])."""
    advance_kernel[(cdiv(rows.numel(), ROWS),)](
        rows, drawn, slots.token, slots.length, rows.numel(), slots.count, BLOCK=ROWS, num_warps=4
    )  # fmt: skip
