"""Draw a token and say with which probability: Gumbel-max over vocabulary shards.

Formula: token = argmax_v (z_v / T + g_v) with g_v standard Gumbel noise keyed by (seed, counter, v), restricted to the
ids that survive the ban list, top-k and top-p (in this order). Five numbers per row and rank are exchanged; top-k
gathers k numbers a row from each rank, top-p searches as ``top_p.py`` says. No row is gathered.

In Triton one kernel reads each logit once (top-k: twice; top-p: ten times) and makes noise, both log-sum-exps and the
draw on the way: 4 B V bytes for float32 logits, where the plain definition takes about ten passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_into_tensor, get_rank, get_world_size

from mstar_mega.kernels.dispatch import uses_triton
from mstar_mega.kernels.language import cdiv, jit, tl
from mstar_mega.kernels.noise import gumbel, mix
from mstar_mega.kernels.row_stats import merge_parts
from mstar_mega.kernels.top_p import Split, allowed_logits, of_ranks, top_p_kept

BLOCK = 2048
WARPS = 8
_PROGRAMS = 1024


@dataclass
class Sampled:
    """Result of :func:`sample_with_logprob`; every tensor is [B]."""

    token: Tensor
    """int64 global ids."""
    behaviour_log_prob: Tensor
    """float32: under the distribution that was sampled from (after ban, temperature, top-k, top-p)."""
    log_prob: Tensor
    """float32: at that temperature over the whole vocabulary (what a training forward recomputes)."""
    mass: Tensor
    """float32: share of that vocabulary distribution which survived ban, top-k and top-p."""


def sample_with_logprob(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    banned: Tensor | None = None,
    seed: int,
    counters: Tensor,
    valid_vocab: int | None = None,
    group: ProcessGroup | None = None,
) -> Sampled:
    """Sample one token per row.

    Args:
        logits: [B, V_local] of any float dtype: this rank's slice of the vocabulary, slices in rank order.
        temperature: above 0; 0 means greedy (lowest id wins a tie), with log-probs at temperature 1.
        top_k: keep the k most likely ids, and all that are as likely as the last of them; 0 keeps all.
        top_p: of these, keep the smallest set of most likely ids whose mass reaches top_p, the lower id first where
            logits are equal.
        banned: int64 [n] global ids that are never drawn.
        seed, counters: the noise's key; counters int64 [B]. The draw depends on nothing else of the machine.
        valid_vocab: ids at or above it (padding rows) do not exist.
        group: tensor-parallel group; None where the vocabulary is whole.
    """
    size = 1 if group is None else get_world_size(group)
    group = None if size == 1 else group
    (B, local), device = logits.shape, logits.device
    start = 0 if group is None else get_rank(group) * local
    valid = local if valid_vocab is None else max(0, min(local, valid_vocab - start))
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    split = _split(B, local) if uses_triton("sampling", logits) else None
    allowed = floor = ties = None
    if banned is not None and banned.numel():
        # No boolean index: the host would wait for its size. Ids of other ranks go to a place of their own.
        here = torch.where((banned >= start) & (banned < start + local), banned - start, local)
        allowed = torch.ones(local + 1, dtype=torch.uint8, device=device).index_fill_(0, here, 0)[:local]
    if 0 < top_k < local * size:
        floor = _kth_largest(allowed_logits(logits, allowed, valid), top_k, group)
    if top_p < 1.0:
        kept = top_p_kept(
            logits, top_p=top_p, temperature=temperature or 1.0, allowed=allowed, floor=floor, valid=valid,
            split=split, group=group,
        )  # fmt: skip
        floor, ties = kept.floor, kept.ties
    counter = mix(counters + seed)
    if split is None:
        drawn = _draw(logits, temperature, allowed, floor, ties, counter, valid, start)
    else:
        drawn = _draw_triton(logits, temperature, allowed, floor, ties, counter, valid, start, split)
    _, token, chosen, whole, survived = drawn if group is None else _merge(*drawn, size, group)
    return Sampled(token, chosen - survived, chosen - whole, torch.exp(survived - whole))


Drawn = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of one slice, [B] each: highest noisy logit, its id, its logit without noise, log-sum-exp of all and of the allowed.
"""


def _draw(
    logits: Tensor,
    temperature: float,
    allowed: Tensor | None,
    floor: Tensor | None,
    ties: Tensor | None,
    counter: Tensor,
    valid: int,
    start: int,
) -> Drawn:
    """The definition. ``allowed`` uint8 [V_local]; lower logits than ``floor`` [B] are left out; of those equal to it
    the first ``ties`` [B, 1] stay, or all."""
    greedy = temperature == 0
    raw = logits.float()
    z = raw / (1.0 if greedy else temperature)
    z[:, valid:] = float("-inf")
    kept = z
    if allowed is not None:
        kept = z.masked_fill(allowed == 0, float("-inf"))
    if floor is not None:
        kept = kept.masked_fill(raw < floor[:, None], float("-inf"))
    if floor is not None and ties is not None:
        tied = (raw == floor[:, None]) & (kept > float("-inf"))
        kept = kept.masked_fill(tied & (tied.cumsum(dim=1) > ties), float("-inf"))
    ids = torch.arange(start, start + z.size(1), device=z.device)
    noisy = kept if greedy else gumbel(counter, ids).add_(kept)
    best, column = noisy.max(dim=1)
    token = ids[column]
    chosen = kept.gather(1, column[:, None]).squeeze(1)
    whole = torch.logsumexp(z, dim=1)
    survived = whole if kept is z else torch.logsumexp(kept, dim=1)
    return best, token, chosen, whole, survived


@jit
def _exp(x):  # type: ignore[no-untyped-def]
    """e^x by the instruction for powers of two; ``tl.exp`` takes four more of them for results below 2^-126."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def sample_kernel(  # type: ignore[no-untyped-def]
    Z, ALLOWED, FLOOR, LEFT, COUNTER, BEST, TOKEN, CHOSEN, STATS, stride, valid, start, span, inverse_temperature,
    BLOCK: tl.constexpr, GREEDY: tl.constexpr, BAN: tl.constexpr, FLOORED: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """One program: columns [split * span, ...) of one row. STATS: [2 or 4, B, splits] maxima and sums, all then kept.

    LEFT: int64 [B, splits], how many of the logits equal to the floor stay, the first ones.
    The noise is that of ``noise.py``: SplitMix64 of (counter, id), its top 23 bits.
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
        noisy = x
        if not GREEDY:
            bits = counter + (at + start + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
            bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
            bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
            u = ((bits >> 41).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
            noisy = x - tl.log(-tl.log(u))
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


def _split(B: int, local: int) -> Split:
    """Parts of a row, each for one program, and their columns."""
    splits = max(1, min(cdiv(local, BLOCK), _PROGRAMS // max(B, 1)))
    span = cdiv(cdiv(local, splits), BLOCK) * BLOCK
    return max(1, cdiv(local, span)), span


def _draw_triton(
    logits: Tensor,
    temperature: float,
    allowed: Tensor | None,
    floor: Tensor | None,
    ties: Tensor | None,
    counter: Tensor,
    valid: int,
    start: int,
    split: Split,
) -> Drawn:
    """:func:`_draw`, with ``ties`` [B, splits]."""
    (B, _), (splits, span), device = logits.shape, split, logits.device
    best, chosen = torch.empty(2, B, splits, device=device)
    token = torch.empty(B, splits, dtype=torch.int64, device=device)
    narrowed = allowed is not None or floor is not None
    stats = torch.empty(4 if narrowed else 2, B, splits, device=device)
    if B:
        unread = counter
        sample_kernel[(B, splits)](
            logits, unread if allowed is None else allowed, unread if floor is None else floor,
            unread if ties is None else ties, counter, best, token, chosen, stats,
            logits.stride(0), valid, start, span, 1.0 / (temperature or 1.0),
            BLOCK=BLOCK, GREEDY=temperature == 0, BAN=allowed is not None, FLOORED=floor is not None,
            TIES=ties is not None, num_warps=WARPS,
        )  # fmt: skip
    highest = best.amax(dim=1)
    lowest_id = torch.where(best == highest[:, None], token, torch.iinfo(torch.int64).max).amin(dim=1)
    chosen = torch.where(token == lowest_id[:, None], chosen, float("-inf")).amax(dim=1)
    whole = merge_parts(stats[0], stats[1], None, dim=1)[0]
    survived = merge_parts(stats[2], stats[3], None, dim=1)[0] if narrowed else whole
    return highest, lowest_id, chosen, whole, survived


def _kth_largest(z: Tensor, k: int, group: ProcessGroup | None) -> Tensor:
    """The k-th largest logit of the whole row, float32 [B], from every rank's k largest."""
    largest = z.topk(min(k, z.size(1)), dim=1).values
    largest = torch.nn.functional.pad(largest, (0, k - largest.size(1)), value=float("-inf"))
    if group is not None:
        largest = of_ranks(largest, group).flatten(1).topk(k, dim=1).values
    return largest[:, -1].contiguous()


def _merge(
    best: Tensor, token: Tensor, chosen: Tensor, whole: Tensor, kept: Tensor, size: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Merge the ranks' candidates with one collective of five float64 per row (ids are exact in float64)."""
    packed = torch.stack([t.double() for t in (best, token, chosen, whole, kept)], dim=1)
    everyone = packed.new_empty(size * packed.size(0), 5)
    all_gather_into_tensor(everyone, packed, group=group)
    everyone = everyone.view(size, -1, 5)
    winner = everyone[:, :, 0].argmax(dim=0)
    rows = torch.arange(winner.numel(), device=winner.device)
    picked = everyone[winner, rows]
    whole = torch.logsumexp(everyone[:, :, 3], dim=0).float()
    kept = torch.logsumexp(everyone[:, :, 4], dim=0).float()
    return picked[:, 0].float(), picked[:, 1].long(), picked[:, 2].float(), whole, kept
