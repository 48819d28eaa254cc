"""The model runner: what the device knows of the running samples, and the step that draws a token for each of them.

Slots never move. A step runs over rows, each naming its slot; the rows and what they read are lists of fixed places
that the host fills when samples come or go. Between two such moments a step depends on nothing that the host knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mstar_mega.generation.cache import CacheManager, Entry, group_table
from mstar_mega.kernels.decode_attention import PlainReading, Reading, fits, work_items
from mstar_mega.kernels.noise import counters
from mstar_mega.kernels.sampling import sample_with_logprob
from mstar_mega.models.attention import bias_from_mask
from mstar_mega.models.decoder import Decoder, StepInput
from mstar_mega.models.inference import from_last_stage
from mstar_mega.models.lmm import LMM

_PARTS = 8
"""Most parts that the attention to one prompt is computed in."""


def kernels_fit(model: LMM, device: torch.device) -> bool:
    """Whether a step's rotation and attention run as kernels."""
    queries = torch.empty(1, 1, model.size.head_dim, dtype=model.config.params_dtype, device=device)
    return fits(queries)


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn."""

    temperature: float
    top_k: int
    top_p: float
    banned: Tensor
    seed: int


class Runner:
    """State of up to ``slots`` running samples on this rank's device."""

    def __init__(
        self, model: LMM, cache: CacheManager, slots: int, positions: int, drawing: Drawing, device: torch.device
    ) -> None:
        """``positions``: tokens of the longest sequence."""
        self.model, self.cache, self.drawing, self.slots = model, cache, drawing, slots
        self.fused = kernels_fit(model, device)
        self.decoder = Decoder(model, slots, positions, _PARTS if self.fused else 1, device)
        # One place more than there are slots: rows that are none write there.
        state = torch.zeros(4, slots + 1, dtype=torch.int64, device=device)
        self.length, self.prompt_length, self.key, self.token = state
        self._plain: PlainReading | None = None
        self._rows = torch.empty(0, dtype=torch.int64, device=device)
        self._reading = Reading(self._rows, self.length, *[self._rows] * 4)
        self.device = device

    def start(self, slots: Sequence[int], lengths: Sequence[int], prompts: Sequence[int], keys: Sequence[int]) -> None:
        """New samples: own tokens given, prompt tokens and noise key of each."""
        index = self._to_device(slots)
        for state, values in ((self.length, lengths), (self.prompt_length, prompts), (self.key, keys)):
            state[index] = self._to_device(values)

    def run_over(self, slots: list[int], entries: Sequence[Entry]) -> None:
        """From now on steps run over these slots (ascending), whose prompts are ``entries``."""
        self._rows = self._to_device(slots)
        if self.fused:
            self._reading = self._lists(entries)
            return
        self._reading.rows = self._rows
        capacity = entries[0].capacity
        live = {entry.start // capacity: entry for entry in entries}
        used = max(live) + 1
        dense = 2 * len(live) > used
        number = {place: place if dense else i for i, place in enumerate(live)}
        groups = used if dense else len(live)
        lengths = torch.zeros(groups, dtype=torch.int64)
        for place, entry in live.items():
            lengths[number[place]] = entry.length
        of_row = torch.tensor([number[entry.start // capacity] for entry in entries])
        bias = bias_from_mask(torch.arange(int(lengths.max())) < lengths[:, None])
        table, column = group_table(of_row, groups)
        last = slots[-1] + 1
        packed = 2 * len(slots) > last
        self._plain = PlainReading(
            table.to(self.device), column.to(self.device), slice(0, used) if dense else self._to_device(list(live)),
            capacity, bias.to(self.device), slice(0, last) if packed else self._rows,
            self._rows if packed and last > len(slots) else None, bias,
        )  # fmt: skip

    def _lists(self, entries: Sequence[Entry]) -> Reading:
        """What the kernels read for rows of these prompts."""
        of_prompt: dict[int, list[int]] = {}
        prompts: dict[int, tuple[int, int, int]] = {}
        for row, entry in enumerate(entries):
            of_prompt.setdefault(entry.start, []).append(row)
            prompts[entry.start] = entry.start, entry.capacity, entry.length
        decoder, counts = self.decoder, [len(rows) for rows in of_prompt.values()]
        rep = decoder.heads // decoder.key_heads
        work, cuts = work_items(list(prompts.values()), counts, rep, decoder.key_heads, _PARTS)
        parts = [0] * len(entries)
        for rows, cut in zip(of_prompt.values(), cuts, strict=True):
            for row in rows:
                parts[row] = cut
        members = [row for rows in of_prompt.values() for row in rows]
        lists = (members, parts, work, [len(work)])
        return Reading(self._rows, self.length, *(torch.tensor(x, device=self.device) for x in lists))

    def step(self, longest: int) -> Tensor:
        """Feed every row its newest token and draw the next one; ``longest``: most own tokens. See :meth:`draw`."""
        rows, plain = self._rows, self._plain
        if plain is not None:
            lengths = self.length.index_select(0, rows)
            plain.own_bias = bias_from_mask(torch.arange(longest, device=self.device) < lengths[:, None])
        step = StepInput(self.token.index_select(0, rows), self.prompt_length, self._reading, plain)
        return self.draw(rows, self._hidden(step, rows.numel()))

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

    def draw(self, rows: Tensor, hidden: Tensor | None) -> Tensor:
        """Draw the next token of some slots (int64 [B]) from hidden rows, which the last stage has.

        Returns:
            float64 [2, B]: tokens and their log-probabilities; the slots' state is moved on.
        """
        drawn = torch.empty(2, rows.numel(), dtype=torch.float64, device=self.device)
        lengths = self.length.index_select(0, rows)
        if hidden is not None:
            how = self.drawing
            sampled = sample_with_logprob(
                self.model.logits(hidden),
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                banned=how.banned,
                seed=how.seed,
                counters=counters(self.key.index_select(0, rows), lengths),
                valid_vocab=self.model.size.vocab,
                group=self.model.tensor_group,
            )
            drawn[0], drawn[1] = sampled.token, sampled.log_prob
        drawn = from_last_stage(drawn)
        self.token[rows] = drawn[0].long()
        self.length[rows] = lengths + 1
        return drawn

    def _to_device(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
