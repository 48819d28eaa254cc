"""Draw a token and say with which probability: Gumbel-max over vocabulary shards.

Formula: token = argmax_v (z_v / T + g_v) with g_v standard Gumbel noise keyed by (seed, counter, v), restricted to the
ids that survive the ban list, top-k and top-p. Only three numbers per row and rank are exchanged, unless top-k or
top-p need the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_into_tensor, get_world_size

from mstar_mega.kernels.noise import gumbel, mix


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
    greedy = temperature == 0
    z = logits.float() / (1.0 if greedy else temperature)
    size = 1 if group is None else get_world_size(group)
    if group is not None and size > 1 and (top_k > 0 or top_p < 1.0):
        z, size, group = _gather_columns(z, group), 1, None
    local = z.size(1)
    start = 0 if size == 1 else torch.distributed.get_rank(group) * local
    ids = torch.arange(start, start + local, device=z.device)
    if valid_vocab is not None and start + local > valid_vocab:
        z[:, max(0, valid_vocab - start) :] = float("-inf")
    allowed = z
    if banned is not None and banned.numel():
        columns = banned[(banned >= start) & (banned < start + local)] - start
        allowed = z.index_fill(1, columns, float("-inf"))
    allowed = _truncate(allowed, top_k, top_p)
    noisy = allowed if greedy else gumbel(mix(counters + seed), ids).add_(allowed)
    best, column = noisy.max(dim=1)
    token = ids[column]
    chosen = allowed.gather(1, column[:, None]).squeeze(1)
    whole = torch.logsumexp(z, dim=1)
    kept = whole if allowed is z else torch.logsumexp(allowed, dim=1)
    if size > 1:
        best, token, chosen, whole, kept = _merge(best, token, chosen, whole, kept, size, group)
    return Sampled(token, chosen - kept, chosen - whole, torch.exp(kept - whole))


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
