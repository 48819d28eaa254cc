"""Draw a token and say with which probability: Gumbel-max over vocabulary shards.

Formula: token = argmax_v (z_v / T + g_v) with g_v standard Gumbel noise keyed by (seed, counter, v), restricted to the
ids that survive the ban list, top-k and top-p (in this order). Each row has a temperature of its own. Five numbers per
row and rank are exchanged; top-k gathers k numbers a row from each rank, top-p searches as ``top_p.py`` says. No row is
gathered. This file is the plain definition; the Triton launches are in ``draw.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank, get_world_size

from mstar_mega.kernels import draw
from mstar_mega.kernels.dispatch import native_for, uses_triton
from mstar_mega.kernels.noise import gumbel, mix
from mstar_mega.kernels.top_p import Split, allowed_logits, of_ranks, top_p_kept


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
    temperature: float | Tensor,
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
        temperature: above 0; 0 means greedy (lowest id wins a tie), with log-probs at temperature 1. float64 [B]: of
            each row.
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
    split = draw.split_of(B, local) if uses_triton("sampling", logits) else None
    allowed = allowed_ids(banned, start, local, device)
    floor, ties = narrowed(logits, temperature, top_k, top_p, allowed, valid, split, group)
    counter = mix(counters + seed)
    if split is None:
        drawn = conclude(draw_rows(logits, temperature, allowed, floor, ties, counter, valid, start), group)
    else:
        temperature = temperature if isinstance(temperature, Tensor) else _of_rows(temperature, B, device)
        scratch = draw.Scratch.of(B, local, device)
        packed = draw.candidates(
            logits, temperature, allowed, floor, ties, counter, valid, start, split, scratch
        )  # fmt: skip
        drawn = draw.conclude(draw.gathered(packed, group), torch.empty(4, B, dtype=torch.float64, device=device))
    token, log_prob, behaviour, mass = drawn
    return Sampled(token.long(), behaviour.float(), log_prob.float(), mass.float())


def _of_rows(temperature: float, rows: int, device: torch.device) -> Tensor:
    return torch.full((rows,), temperature, dtype=torch.float64, device=device)


def allowed_ids(banned: Tensor | None, start: int, local: int, device: torch.device) -> Tensor | None:
    """uint8 [local], 0 at the banned ids of the slice that begins at ``start``; None where none is banned."""
    if banned is None or not banned.numel():
        return None
    # No boolean index: the host would wait for its size. Ids of other ranks go to a place of their own.
    here = torch.where((banned >= start) & (banned < start + local), banned - start, local)
    return torch.ones(local + 1, dtype=torch.uint8, device=device).index_fill_(0, here, 0)[:local]


def narrowed(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int,
    top_p: float,
    allowed: Tensor | None,
    valid: int,
    split: Split | None,
    group: ProcessGroup | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What top-k and top-p leave: logits from a floor [B] on, of those equal to it the first ``ties`` [B, parts]."""
    floor = ties = None
    size = 1 if group is None else get_world_size(group)
    if 0 < top_k < logits.size(1) * size:
        floor = _kth_largest(allowed_logits(logits, allowed, valid), top_k, group)
    if top_p < 1.0:
        kept = top_p_kept(
            logits, top_p=top_p, temperature=temperature, allowed=allowed, floor=floor, valid=valid, split=split,
            group=group,
        )  # fmt: skip
        floor, ties = kept.floor, kept.ties
    return floor, ties


Drawn = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of one slice, [B] each: highest noisy logit, its id, its logit without noise, log-sum-exp of all and of the allowed.
"""


def draw_rows(
    logits: Tensor,
    temperature: float | Tensor,
    allowed: Tensor | None,
    floor: Tensor | None,
    ties: Tensor | None,
    counter: Tensor,
    valid: int,
    start: int,
) -> Drawn:
    """The definition. ``allowed`` uint8 [V_local]; lower logits than ``floor`` [B] are left out; of those equal to it
    the first ``ties`` [B, 1] stay, or all. On the CPU ``native.c`` does the same in two passes over a row."""
    if (lib := native_for("sampling", logits)) is not None:
        B, local = logits.shape
        hot = temperature if isinstance(temperature, Tensor) else _of_rows(temperature, B, logits.device)
        given = [logits, hot, allowed, floor, ties, counter]
        token, found = torch.empty(B, dtype=torch.int64), torch.empty(4, B)
        given = [None if x is None else x.contiguous() for x in given]
        lib.draw_rows(
            *(None if x is None else x.data_ptr() for x in given), B, local, valid, start, token.data_ptr(),
            found.data_ptr(),
        )  # fmt: skip
        best, chosen, whole, survived = found.unbind(0)
        return best, token, chosen, whole, survived
    raw = logits.float()
    greedy: bool | Tensor
    if isinstance(temperature, Tensor):
        greedy = (temperature == 0)[:, None]
        z = raw / torch.where(greedy, 1.0, temperature[:, None]).float()
    else:
        greedy = temperature == 0
        z = raw / (temperature or 1.0)
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
    if isinstance(greedy, Tensor):
        noisy = gumbel(counter, ids).masked_fill_(greedy, 0.0).add_(kept)
    else:
        noisy = kept if greedy else gumbel(counter, ids).add_(kept)
    best, column = noisy.max(dim=1)
    token = ids[column]
    chosen = kept.gather(1, column[:, None]).squeeze(1)
    whole = torch.logsumexp(z, dim=1)
    survived = whole if kept is z else torch.logsumexp(kept, dim=1)
    return best, token, chosen, whole, survived


def conclude(drawn: Drawn, group: ProcessGroup | None) -> Tensor:
    """float64 [4, B] from every rank's slice: token (exact in float64), log-prob over the whole vocabulary and of the
    distribution that was sampled from, and the mass that survived."""
    if group is not None:
        packed = torch.stack([t.double() for t in drawn], dim=1)
        everyone = draw.gathered(packed, group)
        rows = torch.arange(packed.size(0), device=packed.device)
        _, token, chosen, _, _ = everyone[everyone[:, :, 0].argmax(dim=0), rows].unbind(1)
        whole, survived = (torch.logsumexp(everyone[:, :, i], dim=0).float() for i in (3, 4))
        chosen = chosen.float()
    else:
        _, token, chosen, whole, survived = drawn
    parts = (token, chosen - whole, chosen - survived, torch.exp(survived - whole))
    return torch.stack([part.double() for part in parts])


def _kth_largest(z: Tensor, k: int, group: ProcessGroup | None) -> Tensor:
    """The k-th largest logit of the whole row, float32 [B], from every rank's k largest."""
    largest = z.topk(min(k, z.size(1)), dim=1).values
    largest = torch.nn.functional.pad(largest, (0, k - largest.size(1)), value=float("-inf"))
    if group is not None:
        largest = of_ranks(largest, group).flatten(1).topk(k, dim=1).values
    return largest[:, -1].contiguous()
