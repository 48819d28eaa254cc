"""The coupled generation engine: samples responses with the training weights, where they lie.

Each image is encoded once, each prompt prefilled once, its samples decode together on the shared prefix cache, and a
finished sample's slot is refilled with waiting work: requests come from a stream, and slots are not drained before it
ends. Every rank of a model copy runs the same schedule; tokens are drawn on the last pipeline stage, identically on its
tensor ranks, and broadcast to the other stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from mstar_mega.config import GenerationConfig
from mstar_mega.generation.replay import Replay, replay_for
from mstar_mega.generation.requests import Request, Sample, SampleSpec
from mstar_mega.generation.scheduler import Schedule, Terms
from mstar_mega.models.inference import inference
from mstar_mega.models.lmm import LMM

__all__ = ["Engine", "Request", "Sample", "SampleSpec", "SamplingAbandoned", "Vocabulary"]


class Vocabulary(Protocol):
    """What the engine needs of a policy family."""

    stop_tokens: frozenset[int]
    banned_tokens: list[int]


class SamplingAbandoned(Exception):
    """What :attr:`Engine.between_steps` raises to end sampling; what was drawn is lost."""


class Engine:
    """Samples responses from a model; see the module's text."""

    def __init__(self, model: LMM, vocabulary: Vocabulary, config: GenerationConfig, seed: int) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.device = next(model.parameters()).device
        self.stop_tokens, self.banned_tokens = vocabulary.stop_tokens, vocabulary.banned_tokens
        self.lag = 1 if self.device.type == "cuda" else 0
        """Steps under way while the host reads an earlier one's tokens: the device need not wait for it."""
        self.replay: Callable[[], Replay] = lambda: replay_for(self.device)
        """How steps are run; asked anew for each cache, for recorded steps go with it."""
        self.between_steps: Callable[[], None] = lambda: None
        """Called before every prefill and decode step, on every rank of the model copy alike."""
        self.tokens_decoded = 0
        """Tokens drawn since construction, for rates."""

    def generate(self, requests: Sequence[Request], temperature: float) -> list[list[Sample]]:
        """Draw every sample of every request; ``temperature`` 0 is greedy. Results in the requests' order."""
        results: list[list[Sample]] = [[] for _ in requests]
        samples = sum(len(request.samples) for request in requests)
        longest = max((len(request.prompt.tokens) for request in requests), default=0)
        for i, drawn in self.stream(requests, temperature, samples, longest):
            results[i] = drawn
        return results

    def stream(
        self, requests: Iterable[Request | None], temperature: float, samples: int | None = None, longest: int = 0
    ) -> Iterator[tuple[int, list[Sample]]]:
        """As :meth:`generate`, for requests that are asked for when there is room for them.

        A request may depend on results that are not yet there: in its place comes None, and what is there is worked on
        before it is asked for again. None counts as no request, and must not come when all results are out.

        ``samples``: how many there are at most, where that is known; ``longest``: tokens of the longest prompt.

        Yields:
            A request's number and its samples, when the last of them is finished. In between the caller may do what it
            likes, but not change the weights.
        """
        terms = Terms(
            self.config, temperature, self.stop_tokens, self.banned_tokens, self.seed, self.lag, self.replay
        )  # fmt: skip
        schedule = Schedule(self.model, terms, iter(requests), samples, longest)
        schedule.between_steps = self.between_steps
        while True:
            before = schedule.tokens_decoded
            with inference(self.model):
                done = schedule.advance()
            self.tokens_decoded += schedule.tokens_decoded - before
            if done is None:
                return
            yield from done
