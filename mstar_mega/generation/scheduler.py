"""The scheduler of one stream of requests: which samples wait, which run in which slot, and what has come of them.

It sees numbers of the host only; ``cache.py`` says where keys and values lie, ``runner.py`` steps. A step's tokens may
arrive while the next one is under way (``Terms.lag``): what a finished sample draws in between is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import torch
from torch import Tensor

from mstar_mega.config import GenerationConfig
from mstar_mega.generation.cache import CacheManager
from mstar_mega.generation.capacity import slab_tokens, slots_of
from mstar_mega.generation.drawing import Drawing
from mstar_mega.generation.replay import Replay
from mstar_mega.generation.requests import Request, Sample, SampleSpec
from mstar_mega.generation.runner import Runner, kernels_fit
from mstar_mega.models.attention import GroupPlan
from mstar_mega.models.decoder import LEAST_ROWS, aligned
from mstar_mega.models.inference import run_packed
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import PackedBatch, Prompt, pack
from mstar_mega.platform.devices import Readback, to_device


@dataclass(frozen=True)
class Terms:
    """What all samples of a stream have in common."""

    config: GenerationConfig
    temperature: float
    """Of samples that have none of their own."""
    stop_tokens: frozenset[int]
    banned_tokens: list[int]
    seed: int
    lag: int
    """Steps under way while the host reads an earlier one's tokens."""
    replay: Callable[[], Replay]


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
    log_probs: list[float]
    """Of the start; zeros where it was given."""


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

    work: _Waiting
    prompt: int
    """Tokens of its prompt."""
    own: int
    """Own tokens, those of the steps under way included: a given start and the drawn ones."""
    tokens: list[int]
    """Own tokens that have arrived."""
    log_probs: list[float]


class Schedule:
    """The scheduler: the state of a stream."""

    def __init__(
        self, model: LMM, terms: Terms, source: Iterator[Request | None], samples: int | None, longest: int
    ) -> None:
        """See ``Engine.stream``."""
        self.model, self.terms, self.config = model, terms, terms.config
        self.limit, self.device = self.config.max_new_tokens, next(model.parameters()).device
        self.between_steps: Callable[[], None] = lambda: None
        self.rope = self.model.rope
        self.source: Iterator[Request | None] | None = source
        self.received = 0
        """Requests from the source so far."""
        slots = slots_of(model, self.config, self.device)
        self.capacity = min(slots, max(1, slots if samples is None else samples))
        self.refill_at, self.filling = max(1, self.capacity // 8), True
        self.longest = longest
        """Tokens of the longest prompt that the cache is made for."""
        self.results: dict[int, list[Sample | None]] = {}
        """Of the caller's requests that are not finished."""
        self.done: list[tuple[int, list[Sample]]] = []
        self.requests: dict[int, Request] = {}
        """What is prefilled, until its last sample is finished."""
        self.numbered = self.unread = 0
        """Requests so far, and tokens of their prompts that are not prefilled."""
        self.queue: deque[_Waiting] = deque()
        self.prefilled: dict[int, _Prefilled] = {}
        self.cache: CacheManager | None = None
        self.free = list(range(self.capacity))
        """Slots without a sample; the lowest is taken first (a heap)."""
        self.running: dict[int, _Running] = {}
        """By slot, ascending."""
        self.pending: deque[tuple[list[tuple[int, _Running]], Readback]] = deque()
        """Steps under way, with their rows."""
        self.changed = False
        """Samples came or went since the last step."""
        self.tokens_decoded = 0

    def advance(self) -> list[tuple[int, list[Sample]]] | None:
        """Work until some request is finished; None when there is no more to do."""
        while not self.done:
            self.between_steps()
            self._pull()
            if not (self.queue or self.running or self.pending):
                assert self.done or self.source is None, "the source waits for results, and there are none to come"
                break
            self._renew()
            if not (self._wants_samples() and self._admit()) and self.running:
                self._step()
            while len(self.pending) > (self.terms.lag if self.running else 0):
                self._collect()
        done, self.done = self.done, []
        return done or None

    def _pull(self) -> None:
        """Ask for requests while slots are free and no sample waits for them."""
        most = self.config.prefill_tokens
        while self.source is not None and self._may_fill() and len(self.queue) < len(self.free) and self.unread < most:
            try:
                request = next(self.source)
            except StopIteration:
                self.source = None
                return
            if request is None:
                return
            self._accept(self.received, request)
            self.received += 1

    def _may_fill(self) -> bool:
        return self.filling or len(self.free) >= self.refill_at or not self.running

    def _wants_samples(self) -> bool:
        """Refilling in batches keeps prefills large; the last samples are not worth waiting for."""
        self.filling = bool(self.queue and self.free) and self._may_fill()
        return self.filling

    # -- sequences whose length changes how positions turn -----------------------------------------------------------

    def _accept(self, i: int, request: Request) -> None:
        """Note a request's samples as waiting; those whose starts are in different regimes share no prefill."""
        if not request.samples:
            self.done.append((i, []))
            return
        self.results[i] = [None] * len(request.samples)
        starts = [len(draft) for draft in request.drafts] + [spec.length for spec in request.samples]
        P, regimes = len(request.prompt.tokens), self.rope.regimes
        divided = bool(request.drafts) and regimes is not None and len({regimes(P + n) for n in starts}) > 1
        shared = -1 if divided else self._add(request)
        for j, spec in enumerate(request.samples):
            if divided:
                start = request.drafts[spec.draft][: spec.length] if spec.length else []
                self.queue.append(self._alone(request.prompt, spec, start, (i, j), spec.length, [0.0] * spec.length))
            else:
                self.queue.append(_Waiting(shared, (i, j), spec, spec.length, [0.0] * spec.length))

    def _add(self, request: Request) -> int:
        self.numbered += 1
        self.requests[self.numbered] = request
        self.unread += len(request.prompt.tokens)
        return self.numbered

    def _alone(
        self, prompt: Prompt, spec: SampleSpec, start: list[int], home: tuple[int, int], forced: int, probs: list[float]
    ) -> _Waiting:
        """A sample with a request of its own, that continues ``start``."""
        spec = replace(spec, draft=0 if start else -1, length=len(start))
        return _Waiting(self._add(Request(prompt, [spec], [start] if start else [])), home, spec, forced, probs)

    def _renew(self) -> None:
        """Put samples that have grown into another regime back to be prefilled anew.

        Their earlier positions turn differently from now on, so that nothing in the caches holds: the original throws
        its cache away at this point, or computes without one.
        """
        if self.longest + self.limit <= self.rope.first_regime:
            return
        growing = [slot for slot, r in self.running.items() if self.rope.enters_regime(r.prompt + r.own)]
        while growing and self.pending:
            self._collect()
        leaving = [slot for slot in growing if slot in self.running]
        for slot in leaving:
            running = self.running[slot]
            work, prompt = running.work, self.requests[running.work.request].prompt
            again = self._alone(prompt, work.spec, running.tokens, work.home, work.forced, running.log_probs)
            self.queue.appendleft(again)
        self._leave(leaving)

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Give free slots to waiting samples and draw their first tokens; False where no prompt finds room."""
        taken, missing = self._take()
        if not taken and not self.running:
            while self.pending:
                self._collect()
            self._make_cache()
            taken, missing = self._take()
            assert taken, "a new cache has no room for a prompt"
        if not taken:
            self.filling = False
            return False
        if missing:
            self._prefill(missing)
        slots = [heappop(self.free) for _ in taken]
        hidden = self._start(slots, taken)
        new = {slot: self._new(work) for slot, work in zip(slots, taken, strict=True)}
        self.running = dict(sorted({**self.running, **new}.items()))
        self.changed = True
        needed = {work.request for work in self.queue}
        self.prefilled = {i: ready for i, ready in self.prefilled.items() if i in needed}
        self._launched(list(new.items()), self.runner.first(slots, hidden))
        return True

    def _make_cache(self) -> None:
        """A cache and a runner that the waiting prompts fit into. There is none yet, or it is empty and too small."""
        known = self.longest if self.cache is None else 0
        self.longest = known or 2 * max(len(self.requests[work.request].prompt.tokens) for work in self.queue)
        # Plain PyTorch sees the slab as rows of one length.
        kernels = kernels_fit(self.model, self.device)
        granule = 16 if kernels else aligned(self.longest)
        place = -(-self.longest // granule) * granule
        wanted = min(self.capacity, max(len(self.queue), self.capacity if self.source else 1)) * place
        tokens = max(place, slab_tokens(self.model, wanted, self.capacity * self.limit, self.device))
        self.cache = CacheManager(self.model, self.capacity, self.limit, tokens, granule, self.device, not kernels)
        how = Drawing(self.config.top_k, self.config.top_p, self.terms.banned_tokens, self.terms.seed)
        positions = self.longest + self.limit
        self.runner = Runner(self.model, self.cache, self.capacity, positions, how, self.terms.replay())

    def _take(self) -> tuple[list[_Waiting], list[int]]:
        """Waiting samples for the free slots, in order, and the requests among them that are to be prefilled: as many
        as one batch holds."""
        taken: list[_Waiting] = []
        missing: list[int] = []
        passed: list[_Waiting] = []
        room = self.config.prefill_tokens
        while self.queue and len(taken) < len(self.free) and self.cache is not None:
            work = self.queue.popleft()
            request = work.request
            if request not in self.cache.entries:
                of = self.requests[request]
                size = len(of.prompt.tokens) + sum(map(len, of.drafts))
                if missing and size > room:
                    self.queue.appendleft(work)
                    break
                fits = len(of.prompt.tokens) <= self.longest
                # Once there is no room for a prompt, only samples of those that are there go past it.
                if passed or not (fits and self.cache.admit(request, len(of.prompt.tokens), len(of.samples))):
                    passed.append(work)
                    continue
                missing.append(request)
                room -= size
            taken.append(work)
        self.queue.extendleft(reversed(passed))
        return taken, missing

    def _prefill(self, requests: list[int]) -> None:
        assert self.cache is not None
        chosen = [self.requests[i] for i in requests]
        multiple = self.model.stream_multiple
        batch = pack(
            [r.prompt for r in chosen], [r.drafts for r in chosen], -(-LEAST_ROWS // multiple) * multiple,
            self.rope.regimes, device=self.device, align=LEAST_ROWS, unpadded=self.model.unpadded_prompts,
        )  # fmt: skip
        batch.plan.keep = True
        hidden = run_packed(self.model, batch)
        self.cache.store_prompts(batch.plan, requests)
        for row, (i, request) in enumerate(zip(requests, chosen, strict=True)):
            self.unread -= len(request.prompt.tokens)
            self.prefilled[i] = _Prefilled(batch, row, batch.last_prompt[row], hidden)
            if len(request.prompt.tokens) + self.limit <= self.rope.first_regime:
                # Its pixels are of no more use.
                self.requests[i] = replace(request, prompt=replace(request.prompt, pixels=None, grids=None))
        batch.pixels = None

    def _new(self, work: _Waiting) -> _Running:
        spec, request = work.spec, self.requests[work.request]
        start = request.drafts[spec.draft][: spec.length] if spec.length else []
        return _Running(work, len(request.prompt.tokens), spec.length, list(start), list(work.log_probs))

    def _start(self, slots: list[int], works: list[_Waiting]) -> Tensor | None:
        """Put samples into slots; returns the hidden rows that predict their first tokens (last stage)."""
        assert self.cache is not None
        specs = [work.spec for work in works]
        prompts = [len(self.requests[work.request].prompt.tokens) for work in works]
        temperatures = [self.terms.temperature if spec.temperature is None else spec.temperature for spec in specs]
        self.runner.start(slots, [s.length for s in specs], prompts, [s.key for s in specs], temperatures)
        predictors: dict[int, tuple[Tensor | None, list[int], list[int]]] = {}
        starts: dict[int, tuple[GroupPlan, list[int], list[int], list[int]]] = {}
        for number, (slot, work) in enumerate(zip(slots, works, strict=True)):
            ready, spec = self.prefilled[work.request], work.spec
            position = ready.last_prompt
            if spec.length:
                plan = ready.batch.plan
                assert plan.response_index is not None
                of_batch = starts.setdefault(id(plan), (plan, [], [], []))
                row = ready.row * plan.response_index.size(1) + spec.draft
                for numbers, value in zip(of_batch[1:], (row, slot, spec.length), strict=True):
                    numbers.append(value)
                position = ready.batch.response_start[ready.row][spec.draft] + spec.length - 1
            _, positions, places = predictors.setdefault(id(ready.batch), (ready.hidden, [], []))
            positions.append(position)
            places.append(number)
        for plan, of_plan, to, lengths in starts.values():
            self.cache.store_starts(plan, of_plan, to, max(lengths))
        if not self.model.post_process:
            return None
        dtype = self.model.config.params_dtype
        rows = torch.empty(len(works), self.model.size.hidden, dtype=dtype, device=self.device)
        for hidden, positions, places in predictors.values():
            assert hidden is not None
            index = to_device([positions, places], self.device)
            rows.index_copy_(0, index[1], hidden.index_select(0, index[0]))
        return rows

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        assert self.cache is not None
        if self.changed:
            entries = [self.cache.entries[r.work.request] for r in self.running.values()]
            self.runner.run_over(list(self.running), entries)
            self.changed = False
        self._launched(list(self.running.items()), self.runner.step(max(r.own for r in self.running.values())))

    def _launched(self, rows: list[tuple[int, _Running]], drawn: Readback) -> None:
        for _, running in rows:
            running.own += 1
        self.pending.append((rows, drawn))

    def _collect(self) -> None:
        """Note what the oldest step under way has drawn, and free the slots whose samples are finished."""
        rows, readback = self.pending.popleft()
        tokens, log_probs = readback.result()
        finished = []
        for (slot, running), token, log_prob in zip(rows, map(int, tokens), log_probs, strict=True):
            if self.running.get(slot) is not running:
                continue  # it was finished before, which was not known yet when the step began
            running.tokens.append(token)
            running.log_probs.append(log_prob)
            self.tokens_decoded += 1
            stopped = token in self.terms.stop_tokens
            if stopped or len(running.tokens) >= self.limit:
                finished.append(slot)
                self._keep(running, not stopped)
        self._leave(finished)

    def _keep(self, running: _Running, truncated: bool) -> None:
        """A sample is finished."""
        work = running.work
        i, j = work.home
        samples = self.results[i]
        samples[j] = Sample(running.tokens[work.forced :], running.log_probs[work.forced :], truncated)
        if all(sample is not None for sample in samples):
            self.done.append((i, [sample for sample in samples if sample is not None]))
            del self.results[i]

    def _leave(self, slots: list[int]) -> None:
        for slot in slots:
            self.changed = True
            heappush(self.free, slot)
            request = self.running.pop(slot).work.request
            assert self.cache is not None
            if self.cache.finish(request):
                del self.requests[request]
