"""The model runner: what the device knows of the running samples, and the step that draws a token for each of them.

Slots never move. A step runs over rows, each naming its slot; the rows and what they read are lists of fixed places
that the host fills when samples come or go. Between two such moments a step depends on nothing that the host knows.
Where the kernels run, steps come in **buckets** of rows, filled up with rows that are none: within a bucket every step
is the same launches on the same addresses, so that it is recorded once and replayed (``replay.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mstar_mega.generation.cache import CacheManager, Entry, group_table
from mstar_mega.generation.drawing import Drawer, Drawing
from mstar_mega.generation.replay import Replay
from mstar_mega.kernels.decode_attention import FIELDS, PlainReading, Reading, fits, native, work_items
from mstar_mega.kernels.draw import Slots
from mstar_mega.models.attention import bias_from_mask
from mstar_mega.models.decoder import Decoder, StepInput, aligned
from mstar_mega.models.lmm import LMM
from mstar_mega.platform.devices import Readback, to_device

_PARTS = 8
"""Most parts that the attention to one prompt is computed in."""


def kernels_fit(model: LMM, device: torch.device) -> bool:
    """Whether a step's rotation and attention run as kernels."""
    queries = torch.empty(1, 1, model.size.head_dim, dtype=model.config.params_dtype, device=device)
    return fits(queries)


def buckets(rows: int) -> list[int]:
    """Numbers of rows that steps run over, ascending: powers of two, from 16 on also those half way between."""
    sizes = {min(size, rows) for n in range(rows.bit_length() + 1) for size in (1 << n, (1 << n) + (1 << n) // 2)}
    return sorted(size for size in sizes if size in (1, 2, 4, 8, rows) or size >= 16)


class Runner:
    """State of up to ``slots`` running samples on this rank's device."""

    def __init__(
        self, model: LMM, cache: CacheManager, slots: int, positions: int, drawing: Drawing, replay: Replay
    ) -> None:
        """``positions``: tokens of the longest sequence."""
        device = next(model.parameters()).device
        self.model, self.cache, self.device = model, cache, device
        self.fused = kernels_fit(model, device)
        queries = torch.empty(1, dtype=model.config.params_dtype, device=device)
        self.native = self.fused and native(queries)
        self.parts = (1 if self.native else _PARTS) if self.fused else 0
        self.decoder = Decoder(model, slots, positions, self.parts, device)
        self.slots = Slots.of(slots, device)
        self.drawer = Drawer(model, self.slots, drawing, slots, device)
        self._hot: set[float] = set()
        self._plain: PlainReading | None = None
        self._rows = to_device([], device)
        numbers = 3 * slots + 1 + FIELDS * self.parts * slots
        self._lists = torch.zeros(numbers if self.fused else 0, dtype=torch.int64, device=device)
        self._buckets, self._replay = [*range(slots + 1)] if self.native else buckets(slots), replay
        self._steps: dict[int, Callable[[], None]] = {}
        """By bucket."""
        self._bucket = self._count = 0

    def start(
        self, slots: Sequence[int], lengths: Sequence[int], prompts: Sequence[int], keys: Sequence[int],
        temperatures: Sequence[float],
    ) -> None:  # fmt: skip
        """New samples: own tokens given, prompt tokens, noise key and temperature of each."""
        numbers = to_device([slots, lengths, prompts, keys], self.device)
        index = numbers[0]
        states = (self.slots.length, self.slots.prompt_length, self.slots.key)
        for state, values in zip(states, numbers[1:], strict=True):
            state[index] = values
        self.slots.temperature[index] = to_device(temperatures, self.device, torch.float64)
        self._hot |= set(temperatures)
        self.drawer.temperature = next(iter(self._hot)) if len(self._hot) == 1 else None

    def first(self, slots: Sequence[int], hidden: Tensor | None) -> Readback:
        """Draw the first tokens of new samples from hidden rows of their prefill (last stage). See :meth:`step`."""
        rows = to_device(slots, self.device)
        self.drawer.begin(rows)
        return Readback(self.drawer.draw(rows, hidden))

    def run_over(self, slots: list[int], entries: Sequence[Entry]) -> None:
        """From now on steps run over these slots (ascending), whose prompts are ``entries``."""
        self._count = len(slots)
        if not self.fused:
            self._rows = to_device(slots, self.device)
            self._plain = self._plain_lists(slots, entries)
            return
        self._bucket = next(size for size in self._buckets if size >= len(slots))
        if self._bucket not in self._steps:
            self._fill([], [])  # recording runs it: over rows that are none
            self._steps[self._bucket] = self._replay.record(partial(self._step, self._bucket))
        self._fill(slots, entries)

    def step(self, longest: int) -> Readback:
        """Feed every row its newest token and draw the next one; ``longest``: most own tokens.

        Returns:
            float64 [2, rows]: tokens and their log-probabilities, in the order of :meth:`run_over`'s slots.
        """
        if self.fused:
            self._steps[self._bucket]()
            return Readback(self.drawer.drawn[: 2 * self._bucket].view(2, -1)[:, : self._count])
        plain, rows = self._plain, self._rows
        assert plain is not None
        lengths = self.slots.length.index_select(0, rows)
        plain.own_bias = bias_from_mask(torch.arange(aligned(longest), device=self.device) < lengths[:, None])
        reading = Reading(rows, self.slots.length, rows, rows, rows, rows)
        fed = self.drawer.begin(rows)
        hidden = self._hidden(StepInput(fed, self.slots.prompt_length, reading, plain), rows.numel())
        return Readback(self.drawer.draw(rows, hidden))

    # -- where the kernels run ---------------------------------------------------------------------------------------

    def _step(self, bucket: int) -> None:
        """One step over the first ``bucket`` rows of the lists: fixed places, no host."""
        reading = self._reading(bucket)
        fed = self.drawer.begin(reading.rows)
        hidden = self._hidden(StepInput(fed, self.slots.prompt_length, reading, None), bucket)
        self.drawer.draw(reading.rows, hidden)

    def _reading(self, bucket: int) -> Reading:
        slots = self.slots.count
        rows, parts, members = (self._lists[i * slots : i * slots + bucket] for i in range(3))
        number, work = self._lists[3 * slots : 3 * slots + 1], self._lists[3 * slots + 1 :].view(-1, FIELDS)
        return Reading(rows, self.slots.length, members, parts, work, number)

    def _fill(self, slots: list[int], entries: Sequence[Entry]) -> None:
        """What the kernels read for these slots, in one copy."""
        of_prompt: dict[int, list[int]] = {}
        prompts: dict[int, tuple[int, int, int]] = {}
        for row, entry in enumerate(entries):
            of_prompt.setdefault(entry.start, []).append(row)
            prompts[entry.start] = entry.start, entry.capacity, entry.length
        decoder, counts = self.decoder, [len(rows) for rows in of_prompt.values()]
        rep = decoder.heads // decoder.key_heads
        work, cuts = work_items(list(prompts.values()), counts, rep, decoder.key_heads, self.parts)
        parts = [0] * len(entries)
        for rows, cut in zip(of_prompt.values(), cuts, strict=True):
            for row in rows:
                parts[row] = cut
        members = [row for rows in of_prompt.values() for row in rows]
        none = self.slots.count - len(slots)
        numbers = [*slots, *[self.slots.count] * none, *parts, *[0] * none, *members, *[0] * none, len(work)]
        numbers += [number for item in work for number in item]
        self._lists[: len(numbers)].copy_(to_device(numbers, self.device))

    # -- plain PyTorch -----------------------------------------------------------------------------------------------

    def _plain_lists(self, slots: list[int], entries: Sequence[Entry]) -> PlainReading:
        capacity = entries[0].capacity
        live = {entry.start // capacity: entry for entry in entries}
        used = max(live) + 1
        dense = 2 * len(live) > used
        number = {place: place if dense else i for i, place in enumerate(live)}
        groups = used if dense else len(live)
        lengths = torch.zeros(groups, dtype=torch.int64, device="cpu")
        for place, entry in live.items():
            lengths[number[place]] = entry.length
        of_row = torch.tensor([number[entry.start // capacity] for entry in entries], device="cpu")
        keys = torch.arange(aligned(int(lengths.max())), device="cpu")
        table, column = group_table(of_row, groups)
        last = slots[-1] + 1
        packed = 2 * len(slots) > last
        return PlainReading(
            table.to(self.device), column.to(self.device),
            slice(0, used) if dense else to_device(list(live), self.device), capacity,
            bias_from_mask(keys < lengths[:, None]).to(self.device), slice(0, last) if packed else self._rows,
            self._rows if packed and last > len(slots) else None, self._rows,
        )  # fmt: skip

    def _hidden(self, step: StepInput, B: int) -> Tensor | None:
        """[B, hidden] on the last stage."""
        decoder, model = self.decoder, self.model
        if model.pre_process:
            x = decoder.embed(step.tokens)
        else:
            x = decoder.x[:B]
            dist.recv(x, parallel_state.get_pipeline_model_parallel_prev_rank())
        hidden = decoder.layers_forward(x, step, self.cache.cache)
        if model.post_process:
            return hidden
        dist.send(hidden, parallel_state.get_pipeline_model_parallel_next_rank())
        return None
