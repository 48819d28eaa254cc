"""The coupled generation engine: samples responses with the training weights, where they lie.

Each image is encoded once, each prompt prefilled once, its samples decode together on the shared prefix cache, and a
finished sample's slot is refilled with waiting work. Every rank of a model copy runs the same schedule; tokens are
drawn on the last pipeline stage, identically on its tensor ranks, and broadcast to the other stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Protocol

import torch
from torch import Tensor

from mstar_mega.config import GenerationConfig
from mstar_mega.generation.cache import CacheManager, slab_tokens
from mstar_mega.generation.runner import Drawing, Runner, kernels_fit
from mstar_mega.models.attention import GroupPlan
from mstar_mega.models.inference import inference, run_packed
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


@dataclass
class _Running:
    """A sample in a slot."""

    index: int
    """In the work."""
    own: int
    """Own tokens: a given start and the drawn ones."""


class Engine:
    """Samples responses from a model; see the module's text."""

    def __init__(self, model: LMM, vocabulary: Vocabulary, config: GenerationConfig, seed: int) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.device = next(model.parameters()).device
        self._stop = vocabulary.stop_tokens
        self._banned = torch.tensor(vocabulary.banned_tokens, dtype=torch.int64, device=self.device)
        self.tokens_decoded = 0
        """Tokens drawn since construction, for rates."""

    def generate(self, requests: Sequence[Request], temperature: float) -> list[list[Sample]]:
        """Draw every sample of every request; ``temperature`` 0 is greedy. Results in the requests' order."""
        with inference(self.model):
            return _Run(self, requests, temperature).finish()


class _Run:
    """The scheduler: state of one ``generate`` call."""

    def __init__(self, engine: Engine, requests: Sequence[Request], temperature: float) -> None:
        self.engine, self.model, self.config = engine, engine.model, engine.config
        self.limit = self.config.max_new_tokens
        self.results: list[list[Sample | None]] = [[None] * len(r.samples) for r in requests]
        self.regimes = self.model.rope.regimes
        self.requests: list[Request] = []
        self.work: list[_Waiting] = []
        for i, request in enumerate(requests):
            self._accept(i, request)
        self.queue = deque(range(len(self.work)))
        self.prefilled: dict[int, _Prefilled] = {}
        self.capacity = min(self.config.slots, max(1, len(self.work)))
        self.free = list(range(self.capacity))
        """Slots without a sample; the lowest is taken first (a heap)."""
        self.running: dict[int, _Running] = {}
        """By slot, ascending."""
        self.changed = False
        """Samples came or went since the last step."""
        self.tokens = torch.zeros(self.capacity, self.limit, dtype=torch.int64)
        self.log_probs = torch.zeros(self.capacity, self.limit)
        if not self.work:
            return
        drawing = Drawing(temperature, self.config.top_k, self.config.top_p, engine._banned, engine.seed)
        lengths = [len(r.prompt.tokens) for r in requests]
        longest = max(lengths)
        # Plain PyTorch sees the slab as rows of one length.
        granule = 16 if kernels_fit(self.model, engine.device) else longest
        wanted = min(len(lengths) * longest, sum(-(-n // granule) * granule for n in lengths))
        tokens = max(longest, slab_tokens(self.model, wanted, self.capacity * self.limit, engine.device))
        self.cache = CacheManager(self.model, self.capacity, self.limit, tokens, granule, engine.device)
        self.runner = Runner(self.model, self.cache, self.capacity, longest + self.limit, drawing, engine.device)

    def finish(self) -> list[list[Sample]]:
        refill_at = max(1, self.capacity // 8)
        while self.queue or self.running:
            # Refilling in batches keeps prefills large; the last samples are not worth waiting for.
            wanted = self.queue and (len(self.free) >= refill_at or not self.running)
            if not (wanted and self._admit()):
                if self.changed:
                    entries = [self.cache.entries[self.work[r.index].request] for r in self.running.values()]
                    self.runner.run_over(list(self.running), entries)
                    self.changed = False
                self._collect(list(self.running), self.runner.step(max(r.own for r in self.running.values())))
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
        leaving = []
        for slot, running in self.running.items():
            work = self.work[running.index]
            length = running.own
            prompt = self.requests[work.request].prompt
            if not self.model.rope.enters_regime(len(prompt.tokens) + length):
                continue
            spec = self._add_request(prompt, work.spec.key, self.tokens[slot, :length].tolist())
            log_probs = self.log_probs[slot, :length].clone()
            self.work.append(_Waiting(len(self.requests) - 1, work.home, spec, work.forced, log_probs))
            self.queue.appendleft(len(self.work) - 1)
            leaving.append(slot)
        self._free(leaving)

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Give free slots to waiting samples and draw their first tokens; False where no prompt finds room."""
        taken, missing = self._take()
        if not taken:
            assert self.running, "the slab is empty and has no room for a prompt"
            return False
        for batch in cut_by_size(missing, self._tokens_of, self.config.prefill_tokens):
            self._prefill(batch)
        slots = [heappop(self.free) for _ in taken]
        hidden = self._start(slots, taken)
        self.running = dict(sorted({**self.running, **self._new(slots, taken)}.items()))
        self.changed = True
        self._forget_prefills()
        self._collect(slots, self.runner.draw(torch.tensor(slots, device=self.engine.device), hidden))
        return True

    def _take(self) -> tuple[list[int], list[int]]:
        """Waiting samples for the free slots, in order, and the requests among them that are to be prefilled."""
        taken: list[int] = []
        missing: list[int] = []
        passed: list[int] = []
        while self.queue and len(taken) < len(self.free):
            index = self.queue.popleft()
            request = self.work[index].request
            if request not in self.cache.entries:
                of = self.requests[request]
                # Once there is no room for a prompt, only samples of those that are there go past it.
                if passed or not self.cache.admit(request, len(of.prompt.tokens), len(of.samples)):
                    passed.append(index)
                    continue
                missing.append(request)
            taken.append(index)
        self.queue.extendleft(reversed(passed))
        return taken, missing

    def _tokens_of(self, i: int) -> int:
        """What a request's prefill reads."""
        request = self.requests[i]
        return len(request.prompt.tokens) + sum(map(len, request.drafts))

    def _prefill(self, requests: list[int]) -> None:
        chosen = [self.requests[i] for i in requests]
        batch = pack([r.prompt for r in chosen], [r.drafts for r in chosen], self.model.stream_multiple, self.regimes)
        batch.plan.keep = True
        hidden = run_packed(self.model, batch)
        self.cache.store_prompts(batch.plan, requests)
        for row, (i, last) in enumerate(zip(requests, batch.last_prompt.tolist(), strict=True)):
            self.prefilled[i] = _Prefilled(batch, row, last, hidden)

    def _new(self, slots: list[int], taken: list[int]) -> dict[int, _Running]:
        return {slot: _Running(index, self.work[index].spec.length) for slot, index in zip(slots, taken, strict=True)}

    def _start(self, slots: list[int], taken: list[int]) -> Tensor | None:
        """Put samples into slots; returns the hidden rows that predict their first tokens (last stage)."""
        works = [self.work[index] for index in taken]
        prompts = [len(self.requests[work.request].prompt.tokens) for work in works]
        self.runner.start(slots, [w.spec.length for w in works], prompts, [w.spec.key for w in works])
        rows: list[Tensor] = []
        starts: dict[int, tuple[GroupPlan, list[int], list[int], list[int]]] = {}
        for slot, work in zip(slots, works, strict=True):
            ready, spec = self.prefilled[work.request], work.spec
            position = ready.last_prompt
            if spec.length:
                plan = ready.batch.plan
                assert plan.response_index is not None
                of_batch = starts.setdefault(id(plan), (plan, [], [], []))
                row = ready.row * plan.response_index.size(1) + spec.draft
                for numbers, number in zip(of_batch[1:], (row, slot, spec.length), strict=True):
                    numbers.append(number)
                position = ready.batch.response_start[ready.row][spec.draft] + spec.length - 1
                start = self.requests[work.request].drafts[spec.draft][: spec.length]
                self.tokens[slot, : spec.length] = torch.tensor(start)
            if work.log_probs is not None:
                self.log_probs[slot, : spec.length] = work.log_probs
            if ready.hidden is not None:
                rows.append(ready.hidden[position])
        for plan, of_plan, to, lengths in starts.values():
            self.cache.store_starts(plan, of_plan, to, max(lengths))
        return torch.stack(rows) if rows else None

    def _forget_prefills(self) -> None:
        """Drop prefill results that no waiting sample needs."""
        needed = {self.work[i].request for i in self.queue}
        self.prefilled = {i: ready for i, ready in self.prefilled.items() if i in needed}

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _collect(self, slots: list[int], drawn: Tensor) -> None:
        """Note what was drawn for slots, and free those whose samples are finished."""
        tokens, log_probs = drawn.tolist()
        finished = []
        own = [self.running[slot].own for slot in slots]
        index = torch.tensor(slots), torch.tensor(own)
        self.tokens[index], self.log_probs[index] = torch.tensor(tokens).long(), torch.tensor(log_probs)
        for slot, token in zip(slots, tokens, strict=True):
            running = self.running[slot]
            running.own += 1
            if token in self.engine._stop or running.own >= self.limit:
                finished.append(slot)
                self._keep(slot, running, token not in self.engine._stop)
        self.engine.tokens_decoded += len(slots)
        self._free(finished)

    def _keep(self, slot: int, running: _Running, truncated: bool) -> None:
        """The slot's sample is finished."""
        work = self.work[running.index]
        own = slice(work.forced, running.own)
        sample = Sample(self.tokens[slot, own].tolist(), self.log_probs[slot, own].tolist(), truncated)
        self.results[work.home[0]][work.home[1]] = sample

    def _free(self, slots: list[int]) -> None:
        for slot in slots:
            self.changed = True
            heappush(self.free, slot)
            self.cache.finish(self.work[self.running.pop(slot).index].request)
