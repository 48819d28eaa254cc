"""Draw a token and say with which probability: Gumbel-max over vocabulary shards.

Formula: token = argmax_v (z_v / T + g_v) with g_v standard Gumbel noise keyed by (seed, counter, v), restricted to the
ids that survive the ban list, top-k and top-p. Five numbers per row and rank are exchanged; plain PyTorch gathers the
whole row where top-k or top-p is on, and top-p is always plain PyTorch.

In Triton one kernel reads each logit once (top-k: twice) and makes noise, both log-sum-exps and the draw on the way:
4 B V bytes for float32 logits, where the plain definition takes about ten passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_into_tensor, get_world_size

from mstar_mega.kernels.dispatch import uses_triton
from mstar_mega.kernels.language import cdiv, jit, tl
from mstar_mega.kernels.noise import gumbel, mix
from mstar_mega.kernels.row_stats import merge_parts

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
        top_k: keep the k most likely ids; 0 keeps all.
        top_p: keep the smallest set of most likely ids whose mass reaches top_p.
        banned: int64 [n] global ids that are never drawn.
        seed, counters: the noise's key; counters int64 [B]. The draw depends on nothing else of the machine.
        valid_vocab: ids at or above it (padding rows) do not exist.
        group: tensor-parallel group; None where the vocabulary is whole.
    """
    size = 1 if group is None else get_world_size(group)
    rank = 0 if size == 1 else torch.distributed.get_rank(group)
    if banned is not None and not banned.numel():
        banned = None
    if top_p >= 1.0 and uses_triton("sampling", logits):
        local = _draw_triton(logits, temperature, top_k, banned, mix(counters + seed), valid_vocab, rank, size, group)
    else:
        if group is not None and size > 1 and (top_k > 0 or top_p < 1.0):
            logits, rank, size = _gather_columns(logits.float(), group), 0, 1
        local = _draw(logits, temperature, top_k, top_p, banned, counters, seed, valid_vocab, rank)
    _, token, chosen, whole, kept = local if size == 1 else _merge(*local, size, group)
    return Sampled(token, chosen - kept, chosen - whole, torch.exp(kept - whole))


Drawn = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of one slice, [B] each: highest noisy logit, its id, its logit without noise, log-sum-exp of all and of the allowed.
"""


def _draw(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    banned: Tensor | None,
    counters: Tensor,
    seed: int,
    valid_vocab: int | None,
    rank: int,
) -> Drawn:
    """The definition."""
    greedy = temperature == 0
    z = logits.float() / (1.0 if greedy else temperature)
    local = z.size(1)
    start = rank * local
    ids = torch.arange(start, start + local, device=z.device)
    if valid_vocab is not None and start + local > valid_vocab:
        z[:, max(0, valid_vocab - start) :] = float("-inf")
    allowed = z
    if banned is not None:
        columns = banned[(banned >= start) & (banned < start + local)] - start
        allowed = z.index_fill(1, columns, float("-inf"))
    allowed = _truncate(allowed, top_k, top_p)
    noisy = allowed if greedy else gumbel(mix(counters + seed), ids).add_(allowed)
    best, column = noisy.max(dim=1)
    token = ids[column]
    chosen = allowed.gather(1, column[:, None]).squeeze(1)
    whole = torch.logsumexp(z, dim=1)
    kept = whole if allowed is z else torch.logsumexp(allowed, dim=1)
    return best, token, chosen, whole, kept


def _truncate(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """Minus infinity outside the top-k ids and the top-p nucleus (applied in this order, as transformers does)."""
    if 0 < top_k < z.size(1):
        z = z.masked_fill(z < z.topk(top_k, dim=1).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ordered, order = z.sort(dim=1, descending=True, stable=True)
        probs = ordered.softmax(dim=1)
        outside = probs.cumsum(dim=1) - probs >= top_p
        z = z.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
    return z


@jit
def sample_kernel(  # type: ignore[no-untyped-def]
    Z, ALLOWED, FLOOR, COUNTER, BEST, TOKEN, CHOSEN, STATS, stride, valid, start, span, inverse_temperature,
    BLOCK: tl.constexpr, GREEDY: tl.constexpr, BAN: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """One program: columns [split * span, ...) of one row. STATS: [2 or 4, B, splits] maxima and sums, all then kept.

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
    if TOP_K:
        floor = tl.load(FLOOR + row)
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
        total = total * tl.exp(high - base) + tl.exp(x - base)
        high = new
        if BAN:
            x = tl.where(tl.load(ALLOWED + at, mask=at < end, other=0) != 0, x, -float("inf"))
        if TOP_K:
            x = tl.where(raw < floor, -float("inf"), x)
        if BAN or TOP_K:
            new = tl.maximum(kept_high, x)
            base = tl.where(new == -float("inf"), 0.0, new)
            kept_total = kept_total * tl.exp(kept_high - base) + tl.exp(x - base)
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
    tl.store(STATS + plane + place, tl.sum(total * tl.exp(high - tl.where(m == -float("inf"), 0.0, m)), 0))
    if BAN or TOP_K:
        m = tl.max(kept_high, 0)
        sums = kept_total * tl.exp(kept_high - tl.where(m == -float("inf"), 0.0, m))
        tl.store(STATS + 2 * plane + place, m)
        tl.store(STATS + 3 * plane + place, tl.sum(sums, 0))


def _draw_triton(
    logits: Tensor,
    temperature: float,
    top_k: int,
    banned: Tensor | None,
    counter: Tensor,
    valid_vocab: int | None,
    rank: int,
    size: int,
    group: ProcessGroup | None,
) -> Drawn:
    B, local = logits.shape
    start, device = rank * local, logits.device
    valid = local if valid_vocab is None else max(0, min(local, valid_vocab - start))
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    allowed = floor = counter  # not read
    if banned is not None:
        allowed = torch.ones(local, dtype=torch.uint8, device=device)
        allowed[banned[(banned >= start) & (banned < start + local)] - start] = 0
    if limited := 0 < top_k < local * size:
        floor = _kth_largest(logits, None if banned is None else allowed, top_k, valid, size, group)
    splits = max(1, min(cdiv(local, BLOCK), _PROGRAMS // max(B, 1)))
    span = cdiv(cdiv(local, splits), BLOCK) * BLOCK
    splits = max(1, cdiv(local, span))
    best, chosen = torch.empty(2, B, splits, device=device)
    token = torch.empty(B, splits, dtype=torch.int64, device=device)
    narrowed = banned is not None or limited
    stats = torch.empty(4 if narrowed else 2, B, splits, device=device)
    if B:
        sample_kernel[(B, splits)](
            logits, allowed, floor, counter, best, token, chosen, stats, logits.stride(0), valid, start, span,
            1.0 / (temperature or 1.0), BLOCK=BLOCK, GREEDY=temperature == 0, BAN=banned is not None, TOP_K=limited,
            num_warps=WARPS,
        )  # fmt: skip
    highest = best.amax(dim=1)
    lowest_id = torch.where(best == highest[:, None], token, torch.iinfo(torch.int64).max).amin(dim=1)
    chosen = torch.where(token == lowest_id[:, None], chosen, float("-inf")).amax(dim=1)
    whole = merge_parts(stats[0], stats[1], None, dim=1)[0]
    kept = merge_parts(stats[2], stats[3], None, dim=1)[0] if narrowed else whole
    return highest, lowest_id, chosen, whole, kept


def _kth_largest(
    logits: Tensor, allowed: Tensor | None, k: int, valid: int, size: int, group: ProcessGroup | None
) -> Tensor:
    """The k-th largest allowed logit of the whole row, float32 [B], from every rank's k largest."""
    z = logits[:, :valid].float()
    if allowed is not None:
        z = z.masked_fill(allowed[:valid] == 0, float("-inf"))
    largest = z.topk(min(k, valid), dim=1).values
    largest = torch.nn.functional.pad(largest, (0, k - largest.size(1)), value=float("-inf"))
    if size > 1 and group is not None:
        largest = _gather_columns(largest, group).topk(k, dim=1).values
    return largest[:, -1].contiguous()


def _gather_columns(z: Tensor, group: ProcessGroup) -> Tensor:
    size = get_world_size(group)
    parts = z.new_empty(size * z.size(0), z.size(1))
    all_gather_into_tensor(parts, z.contiguous(), group=group)
    return parts.view(size, *z.shape).permute(1, 0, 2).reshape(z.size(0), -1)


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
