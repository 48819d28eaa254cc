"""The block manager: where prompts and running samples have their keys and values, and who may use which place.

Own tokens have a row of ``limit`` tokens for each slot. Prompts have runs of tokens in one slab, first fit. What is
written stays where it is until its last sample is finished: admission and refill move nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mstar_mega.models.attention import GroupPlan, KeyValues
from mstar_mega.models.decoder import Cache, aligned
from mstar_mega.models.lmm import LMM
from mstar_mega.platform.devices import to_device


@dataclass
class Entry:
    """A prompt in the slab and how many of its samples are not finished."""

    start: int
    """Its first token in the slab."""
    capacity: int
    length: int
    unfinished: int


class Slab:
    """First-fit allocation of runs of ``tokens`` places, in multiples of ``granule``."""

    def __init__(self, tokens: int, granule: int) -> None:
        self.granule = granule
        self.tokens = -(-tokens // granule) * granule
        self._free = [(0, self.tokens)]
        """(start, size) of the holes, ascending."""

    def allocate(self, length: int) -> tuple[int, int] | None:
        """(start, size) of a run of at least ``length``; None when no hole is large enough."""
        size = -(-length // self.granule) * self.granule
        for i, (start, hole) in enumerate(self._free):
            if hole >= size:
                self._free[i : i + 1] = [(start + size, hole - size)] if hole > size else []
                return start, size
        return None

    def release(self, start: int, size: int) -> None:
        """Give a run back; it joins the holes beside it."""
        holes = sorted([*self._free, (start, size)])
        joined = holes[:1]
        for start, size in holes[1:]:
            last, length = joined[-1]
            assert last + length <= start, "a run was given back twice"
            if last + length == start:
                joined[-1] = (last, length + size)
            else:
                joined.append((start, size))
        self._free = joined


class CacheManager:
    """Keys and values of one ``generate`` call on this pipeline stage."""

    def __init__(
        self, model: LMM, slots: int, limit: int, tokens: int, granule: int, device: torch.device, padded: bool = True
    ) -> None:
        """``tokens``: of the slab; it must hold the longest prompt. ``padded``: more is read than was written."""
        size, ranks = model.size, model.tensor_group.size()
        self.heads, self.channels = size.kv_heads // ranks, size.head_dim
        self.slab = Slab(tokens, granule)
        self.entries: dict[int, Entry] = {}
        """By request."""
        self.layers = [layer.layer_number for layer in model.language.decoder.layers]
        self.cache = Cache({}, {})
        dtype = model.config.params_dtype
        own = aligned(limit)

        def pair(*shape: int) -> KeyValues:
            # Zeros: padding is multiplied by weights of 0, and must not be NaN.
            make = torch.zeros if padded else torch.empty
            return KeyValues(*(make(shape, dtype=dtype, device=device) for _ in range(2)))

        for n in self.layers:
            self.cache.prefix[n] = pair(self.slab.tokens * self.heads * self.channels)
            self.cache.own[n] = pair(slots, self.heads, own, self.channels)

    def admit(self, request: int, length: int, samples: int) -> bool:
        """Find a place for a request's prompt; False when there is none now."""
        place = self.slab.allocate(length)
        if place is not None:
            self.entries[request] = Entry(*place, length, samples)
        return place is not None

    def finish(self, request: int) -> bool:
        """One of the request's samples is finished; the last one's end frees the prompt. Whether it was the last."""
        entry = self.entries[request]
        entry.unfinished -= 1
        if not entry.unfinished:
            self.slab.release(entry.start, entry.capacity)
            del self.entries[request]
        return not entry.unfinished

    def store_prompts(self, plan: GroupPlan, requests: list[int]) -> None:
        """Put a prefill's prompts (its groups are these requests) where they were admitted."""
        P = plan.prompt_index.size(1)
        entries = [self.entries[i] for i in requests]
        # Found on the host, which knows all lengths: a device would have to be waited for.
        place = np.array([(e.start, e.capacity, e.length) for e in entries])[:, :, None, None]
        head, token = np.arange(self.heads)[:, None], np.arange(P)
        to = (place[:, 0] * self.heads + head * place[:, 1] + token).ravel()
        there = np.broadcast_to(token < place[:, 2], (len(entries), self.heads, P)).ravel()
        device = plan.prompt_index.device
        source = None if there.all() else to_device(np.flatnonzero(there), device)
        to = to_device(to[there], device)
        for layer, kv in plan.prompts.items():
            slab = self.cache.prefix[layer]
            for cached, new in ((slab.k, kv.k), (slab.v, kv.v)):
                new = new.view(-1, self.channels)
                cached.view(-1, self.channels).index_copy_(0, to, new if source is None else new[source])
        plan.prompts.clear()

    def store_starts(self, plan: GroupPlan, rows: list[int], slots: list[int], length: int) -> None:
        """Copy the beginnings of prefilled drafts (rows of ``plan.responses``) to slots; ``length``: of the longest."""
        source, to = to_device([rows, slots], plan.prompt_index.device)
        for layer, kv in plan.responses.items():
            own = self.cache.own[layer]
            own.k[to, :, :length] = kv.k[source, :, :length]
            own.v[to, :, :length] = kv.v[source, :, :length]


def group_table(group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Rows by group: (table int64 [groups, most rows of one group], place int64 [B]) of ``group``, int64 [B]."""
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group, minlength=groups)
    width = int(counts.max())
    first = torch.cumsum(counts, 0) - counts
    rows = torch.arange(group.numel(), device=group.device)
    column = rows - first[group[order]]
    place = torch.empty_like(group)
    place[order] = group[order] * width + column
    table = torch.zeros(groups * width, dtype=torch.int64, device=group.device)
    table[place] = rows
    return table.view(groups, width), place
