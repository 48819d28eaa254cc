"""The coupled generation engine: samples responses with the training weights, where they lie.

Each image is encoded once, each prompt prefilled once, its samples decode together on the shared prefix cache, and a
finished sample's slot is refilled with waiting work. Every rank of a model copy runs the same schedule; tokens are
drawn on the last pipeline stage, identically on its tensor ranks, and broadcast to the other stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

from mstar_mega.config import GenerationConfig
from mstar_mega.generation.slots import Entry, Prefixes, Slots
from mstar_mega.kernels.noise import counters
from mstar_mega.kernels.sampling import sample_with_logprob
from mstar_mega.models.inference import from_last_stage, inference, run_packed, run_stages
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import PackedBatch, Prompt, cut_by_size, pack


class Vocabulary(Protocol):
    """What the engine needs of a policy family."""

    stop_tokens: frozenset[int]
    banned_tokens: list[int]


@dataclass(frozen=True)
class SampleSpec:
    """One sample to draw."""

    key: int
    """Names its random numbers; with the position it is the whole source of randomness."""
    draft: int = -1
    """Which of the request's drafts it continues; -1: none."""
    length: int = 0
    """How many of the draft's tokens it keeps."""


@dataclass
class Request:
    """A prompt and the samples wanted of it."""

    prompt: Prompt
    samples: list[SampleSpec]
    drafts: list[list[int]] = field(default_factory=list)
    """Responses whose beginnings are continued (Monte-Carlo rollouts); each is prefilled once."""


@dataclass
class Sample:
    """A drawn continuation."""

    tokens: list[int]
    """Drawn token ids, without the draft's; the stop token included when one was drawn."""
    log_probs: list[float]
    """Per drawn token, at the sampling temperature over the whole vocabulary."""
    truncated: bool
    """The length limit ended it."""


@dataclass
class _Waiting:
    """A sample whose prompt is prefilled (or about to be) and that has no slot yet."""

    request: int
    """What is prefilled for it."""
    home: tuple[int, int]
    """The caller's request and the number in it."""
    spec: SampleSpec
    forced: int
    """Tokens of the start that were given; the rest of it was drawn before."""
    log_probs: Tensor | None = None
    """Of the start, where a part of it was drawn."""


@dataclass
class _Prefilled:
    """What waiting samples need of their request's prefill."""

    batch: PackedBatch
    row: int
    """The request's place in that batch."""
    last_prompt: int
    """Stream position of its prompt's last token."""
    hidden: Tensor | None
    """[T, hidden] of the batch, last stage only."""
    entry: int


class Engine:
    """Samples responses from a model; see the module's text."""

    def __init__(self, model: LMM, vocabulary: Vocabulary, config: GenerationConfig, seed: int) -> None:
        self.model, self.config, self.seed = model, config, seed
        self._stop = torch.tensor(sorted(vocabulary.stop_tokens))
        self._banned = torch.tensor(vocabulary.banned_tokens)
        self.tokens_decoded = 0
        """Tokens drawn since construction, for rates."""

    def generate(self, requests: Sequence[Request], temperature: float) -> list[list[Sample]]:
        """Draw every sample of every request; ``temperature`` 0 is greedy. Results in the requests' order."""
        with inference(self.model):
            return _Run(self, requests, temperature).finish()


class _Run:
    """State of one ``generate`` call."""

    def __init__(self, engine: Engine, requests: Sequence[Request], temperature: float) -> None:
        self.engine, self.temperature = engine, temperature
        self.model, self.config = engine.model, engine.config
        limit = self.config.max_new_tokens
        self.results: list[list[Sample | None]] = [[None] * len(r.samples) for r in requests]
        self.regimes = self.model.rope.regimes
        self.requests: list[Request] = []
        self.work: list[_Waiting] = []
        for i, request in enumerate(requests):
            self._accept(i, request)
        self.queue = deque(range(len(self.work)))
        self.slots = Slots(min(self.config.slots, max(1, len(self.work))), limit)
        self.prefixes = Prefixes()
        self.prefilled: dict[int, _Prefilled] = {}

    def finish(self) -> list[list[Sample]]:
        slots = self.slots
        refill_at = max(1, slots.capacity // 8)
        while self.queue or slots.count:
            # Refilling in batches keeps prefills large; the last samples are not worth waiting for.
            if self.queue and (slots.free >= refill_at or not slots.count):
                self._admit()
            elif slots.count:
                self._draw(range(slots.count), self._decode())
            self._retire()
            if self.regimes is not None:
                self._renew()
        return [[sample for sample in samples if sample is not None] for samples in self.results]

    # -- sequences whose length changes how positions turn -----------------------------------------------------------

    def _accept(self, i: int, request: Request) -> None:
        """Note a request's samples as waiting; those whose starts are in different regimes share no prefill."""
        starts = [len(draft) for draft in request.drafts] + [spec.length for spec in request.samples]
        P = len(request.prompt.tokens)
        divided = bool(request.drafts) and self.regimes is not None and len({self.regimes(P + n) for n in starts}) > 1
        first = len(self.requests)
        if not divided:
            self.requests.append(request)
        for j, spec in enumerate(request.samples):
            if divided:
                start = request.drafts[spec.draft][: spec.length] if spec.length else []
                spec = self._add_request(request.prompt, spec.key, start)
            index = len(self.requests) - 1 if divided else first
            self.work.append(_Waiting(index, (i, j), spec, spec.length))

    def _add_request(self, prompt: Prompt, key: int, start: list[int]) -> SampleSpec:
        """A request of one sample that continues ``start``."""
        spec = SampleSpec(key, 0, len(start)) if start else SampleSpec(key)
        self.requests.append(Request(prompt, [spec], [start] if start else []))
        return spec

    def _renew(self) -> None:
        """Put samples that have grown into another regime back to be prefilled anew.

        Their earlier positions turn differently from now on, so that nothing in the caches holds: the original throws
        its cache away at this point, or computes without one.
        """
        slots = self.slots
        B = slots.count
        grown = self.model.rope.enters_regime(slots.prompt_length[:B] + slots.length[:B])
        leaving = torch.nonzero(grown).flatten().tolist()
        for slot in leaving:
            work = self.work[slots.sample[slot]]
            length = slots.own[slot]
            prompt = self.requests[work.request].prompt
            spec = self._add_request(prompt, work.spec.key, slots.tokens[slot, :length].tolist())
            log_probs = slots.log_probs[slot, :length].clone()
            self.work.append(_Waiting(len(self.requests) - 1, work.home, spec, work.forced, log_probs))
            self.queue.appendleft(len(self.work) - 1)
            self.prefixes.entries[slots.entry[slot]].unfinished -= 1
        if leaving:
            slots.remove(leaving)

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give free slots to waiting samples and draw their first tokens."""
        taken = [self.queue.popleft() for _ in range(min(self.slots.free, len(self.queue)))]
        missing = dict.fromkeys(self.work[i].request for i in taken if self.work[i].request not in self.prefilled)
        for batch in cut_by_size(missing, self._tokens_of, self.config.prefill_tokens):
            self._prefill(batch)
        new = range(self.slots.count, self.slots.count + len(taken))
        self.slots.count += len(taken)
        started = [self._start(slot, index) for slot, index in zip(new, taken, strict=True)]
        self._forget_prefills()
        rows = [row for row in started if row is not None]  # all of them on the last stage, none elsewhere
        self._draw(new, torch.stack(rows) if rows else None)

    def _tokens_of(self, i: int) -> int:
        """What a request's prefill reads."""
        request = self.requests[i]
        return len(request.prompt.tokens) + sum(map(len, request.drafts))

    def _prefill(self, requests: list[int]) -> None:
        chosen = [self.requests[i] for i in requests]
        batch = pack([r.prompt for r in chosen], [r.drafts for r in chosen], self.model.stream_multiple, self.regimes)
        batch.plan.keep = True
        hidden = run_packed(self.model, batch)
        self._compact_prefixes()
        entries = [Entry(len(r.prompt.tokens), len(r.samples)) for r in chosen]
        first = self.prefixes.add(batch.plan.prompts, entries)
        self.slots.allocate(batch.plan.prompts)
        for row, (i, last) in enumerate(zip(requests, batch.last_prompt.tolist(), strict=True)):
            self.prefilled[i] = _Prefilled(batch, row, last, hidden, first + row)

    def _start(self, slot: int, index: int) -> Tensor | None:
        """Put a sample into a slot; returns the hidden row that predicts its first token (last stage)."""
        work, slots = self.work[index], self.slots
        ready = self.prefilled[work.request]
        spec, plan = work.spec, ready.batch.plan
        slots.sample[slot] = index
        slots.entry[slot], slots.forced[slot] = ready.entry, work.forced
        slots.own[slot] = spec.length
        slots.length[slot] = spec.length
        if self.regimes is not None and spec.length:
            # It may have to be prefilled again, with its start.
            start = self.requests[work.request].drafts[spec.draft][: spec.length]
            slots.tokens[slot, : spec.length] = torch.tensor(start)
        if work.log_probs is not None:
            slots.log_probs[slot, : spec.length] = work.log_probs
        slots.prompt_length[slot] = len(self.requests[work.request].prompt.tokens)
        slots.key[slot] = spec.key
        position = ready.last_prompt
        if spec.length:
            assert plan.response_index is not None
            draft_row = ready.row * plan.response_index.size(1) + spec.draft
            for layer, kv in plan.responses.items():
                slots.cache[layer].k[slot, :, : spec.length] = kv.k[draft_row, :, : spec.length]
                slots.cache[layer].v[slot, :, : spec.length] = kv.v[draft_row, :, : spec.length]
            position = ready.batch.response_start[ready.row][spec.draft] + spec.length - 1
        return None if ready.hidden is None else ready.hidden[position]

    def _forget_prefills(self) -> None:
        """Drop prefill results that no waiting sample needs."""
        needed = {self.work[i].request for i in self.queue}
        self.prefilled = {i: ready for i, ready in self.prefilled.items() if i in needed}

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _decode(self) -> Tensor | None:
        """Feed every running slot its newest token; returns hidden rows [count, hidden] on the last stage."""
        slots, model = self.slots, self.model
        B = slots.count
        plan = slots.decode_plan(self.prefixes)
        padding = -B % model.stream_multiple
        tokens = slots.tokens[torch.arange(B), plan.lengths]
        tokens = torch.nn.functional.pad(tokens, (0, padding))
        positions = torch.nn.functional.pad(slots.prompt_length[:B] + plan.lengths, (0, padding))
        hidden = run_stages(model, lambda: model.embed_tokens(tokens), positions, plan)
        return None if hidden is None else hidden[:B]

    def _draw(self, rows: range, hidden: Tensor | None) -> None:
        """Draw the next token of some slots, from hidden rows [len(rows), hidden] on the last stage."""
        slots = self.slots
        index = torch.arange(rows.start, rows.stop)
        drawn = torch.empty(len(rows), 2, dtype=torch.float64)
        if hidden is not None:
            sampled = sample_with_logprob(
                self.model.logits(hidden),
                temperature=self.temperature,
                top_k=self.config.top_k,
                top_p=self.config.top_p,
                banned=self.engine._banned,
                seed=self.engine.seed,
                counters=counters(slots.key[index], slots.length[index]),
                valid_vocab=self.model.size.vocab,
                group=parallel_state.get_tensor_model_parallel_group(),
            )
            drawn = torch.stack([sampled.token.double(), sampled.log_prob.double()], dim=1)
        drawn = from_last_stage(drawn)
        slots.tokens[index, slots.length[index]] = drawn[:, 0].long()
        slots.log_probs[index, slots.length[index]] = drawn[:, 1].float()
        slots.length[index] += 1
        for slot in rows:
            slots.own[slot] += 1
        self.engine.tokens_decoded += len(rows)

    def _retire(self) -> None:
        """Collect finished samples and free their slots."""
        slots = self.slots
        B = slots.count
        newest = slots.tokens[torch.arange(B), slots.length[:B] - 1]
        stopped = torch.isin(newest, self.engine._stop).tolist()
        finished = [slot for slot in range(B) if stopped[slot] or slots.own[slot] >= slots.limit]
        tokens, log_probs = (
            x[torch.tensor(finished, dtype=torch.int64)].tolist() if finished else []
            for x in (slots.tokens, slots.log_probs)
        )
        for slot, of_tokens, of_log_probs in zip(finished, tokens, log_probs, strict=True):
            work = self.work[slots.sample[slot]]
            own = slice(slots.forced[slot], slots.own[slot])
            self.results[work.home[0]][work.home[1]] = Sample(of_tokens[own], of_log_probs[own], not stopped[slot])
            self.prefixes.entries[slots.entry[slot]].unfinished -= 1
        if finished:
            slots.remove(finished)
            live = sum(entry.unfinished > 0 for entry in self.prefixes.entries)
            if live * 2 <= len(self.prefixes.entries):
                self._compact_prefixes()

    def _compact_prefixes(self) -> None:
        """Drop the prompts whose samples are all finished, and renumber the rest."""
        live = [i for i, entry in enumerate(self.prefixes.entries) if entry.unfinished]
        if len(live) == len(self.prefixes.entries):
            return
        renumbered = {entry: number for number, entry in enumerate(live)}
        self.prefixes.keep(live)
        slots = self.slots
        slots.entry[: slots.count] = [renumbered[entry] for entry in slots.entry[: slots.count]]
        for ready in self.prefilled.values():
            ready.entry = renumbered.get(ready.entry, 0)
