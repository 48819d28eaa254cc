"""The running samples of the engine: per-slot state, caches, and the moves between them.

Slots [0, count) are running and contiguous, so that decoding works on views. A finished slot's place is taken by the
last running one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.models.attention import DecodePlan, KeyValues, bias_from_mask


@dataclass
class Entry:
    """A prompt in the prefix cache and how many of its samples are not finished."""

    prompt_length: int
    unfinished: int


class Prefixes:
    """Keys and values of the prompts in flight, [entries, Hk, P, D] per layer."""

    def __init__(self) -> None:
        self.cache: dict[int, KeyValues] = {}
        self.entries: list[Entry] = []
        self.bias = torch.empty(0)

    def add(self, new: dict[int, KeyValues], entries: list[Entry]) -> int:
        """Append prompts; returns the first one's index."""
        first = len(self.entries)
        self.entries += entries
        for layer, kv in new.items():
            old = self.cache.get(layer)
            self.cache[layer] = kv if old is None else KeyValues(_stack(old.k, kv.k), _stack(old.v, kv.v))
        self._set_bias()
        return first

    def keep(self, live: list[int]) -> None:
        """Drop all entries but these, in this order."""
        index = torch.tensor(live, dtype=torch.int64)
        self.cache = {n: KeyValues(kv.k[index], kv.v[index]) for n, kv in self.cache.items()}
        self.entries = [self.entries[i] for i in live]
        self._set_bias()

    def _set_bias(self) -> None:
        # Every stage holds at least one layer; any of them tells the padded length.
        length = next(iter(self.cache.values())).k.size(2) if self.cache else 0
        lengths = torch.tensor([entry.prompt_length for entry in self.entries], dtype=torch.int64)
        self.bias = bias_from_mask(torch.arange(length) < lengths[:, None])


def _stack(old: Tensor, new: Tensor) -> Tensor:
    length = max(old.size(2), new.size(2))
    grow = torch.nn.functional.pad
    return torch.cat([grow(x, (0, 0, 0, length - x.size(2))) for x in (old, new)])


class Slots:
    """State of up to ``capacity`` running samples of at most ``limit`` own tokens each."""

    def __init__(self, capacity: int, limit: int) -> None:
        self.capacity, self.limit, self.count = capacity, limit, 0
        # What the host decides by it keeps itself: to ask a GPU it would have to wait for it, at every token.
        self.sample = [0] * capacity
        """Caller's index of the sample in each slot."""
        self.entry = [0] * capacity
        """The sample's place in the prefix cache."""
        self.forced = [0] * capacity
        """Own tokens that were given, not drawn."""
        self.own = [0] * capacity
        """Own tokens: a forced start and the drawn ones."""
        self.length = torch.zeros(capacity, dtype=torch.int64)
        """The same numbers as ``own``."""
        self.prompt_length = torch.zeros(capacity, dtype=torch.int64)
        self.key = torch.zeros(capacity, dtype=torch.int64)
        self.tokens = torch.zeros(capacity, limit, dtype=torch.int64)
        self.log_probs = torch.zeros(capacity, limit)
        self.cache: dict[int, KeyValues] = {}

    @property
    def free(self) -> int:
        return self.capacity - self.count

    def allocate(self, like: dict[int, KeyValues]) -> None:
        """Make the own-token caches, shaped after the prefix caches of the same layers."""
        for layer, kv in like.items():
            if layer not in self.cache:
                shape = (self.capacity, kv.k.size(1), self.limit, kv.k.size(3))
                self.cache[layer] = KeyValues(kv.k.new_zeros(shape), kv.v.new_zeros(shape))

    def remove(self, finished: list[int]) -> None:
        """Free slots (ascending); running ones from the end move into the holes."""
        remaining = self.count - len(finished)
        gone = set(finished)
        holes = [slot for slot in finished if slot < remaining]
        movers = [slot for slot in range(remaining, self.count) if slot not in gone]
        self.count = remaining
        if not holes:
            return
        to, source = torch.tensor(holes), torch.tensor(movers)
        for state in (self.length, self.prompt_length, self.key, self.tokens, self.log_probs):
            state[to] = state[source]
        for hole, mover in zip(holes, movers, strict=True):
            for of_slots in (self.sample, self.entry, self.forced, self.own):
                of_slots[hole] = of_slots[mover]
        used = max(self.own[hole] for hole in holes)
        for kv in self.cache.values():
            kv.k[to, :, :used] = kv.k[source, :, :used]
            kv.v[to, :, :used] = kv.v[source, :, :used]

    def decode_plan(self, prefixes: Prefixes) -> DecodePlan:
        """Plan for feeding every running slot its newest token (already counted in ``length``)."""
        B = self.count
        cached = self.length[:B] - 1
        own_bias = bias_from_mask(torch.arange(max(self.own[:B])) <= cached[:, None])
        groups = group_table(torch.tensor(self.entry[:B], device="cpu"), len(prefixes.entries))
        table, place = (x.to(cached.device) for x in groups)
        return DecodePlan(prefixes.cache, prefixes.bias, self.cache, cached, own_bias, table, place)


def group_table(entry: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Slots by prefix entry: (table int64 [groups, most slots of one entry], place int64 [B])."""
    order = torch.argsort(entry, stable=True)
    counts = torch.bincount(entry, minlength=groups)
    width = int(counts.max())
    first = torch.cumsum(counts, 0) - counts
    slots = torch.arange(entry.numel(), device=entry.device)
    column = slots - first[entry[order]]
    place = torch.empty_like(entry)
    place[order] = entry[order] * width + column
    table = torch.zeros(groups * width, dtype=torch.int64, device=entry.device)
    table[place] = slots
    return table.view(groups, width), place
