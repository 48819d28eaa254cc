"""A job in the test process whose policy writes what a test tells it to: for the recipe's stages by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstar_mega.config import Config
from mstar_mega.data.prefetch import Ahead
from mstar_mega.data.types import Query, Task
from mstar_mega.generation.engine import Request, Sample
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.models.packing import Prompt
from mstar_mega.platform import distributed
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.rollouts import Actors
from mstar_mega.report.metrics import NullMetrics
from mstar_mega.report.progress import Progress
from mstar_mega.rewards.checker import AnswerChecker


class Events(NullMetrics):
    """A log that is kept in memory."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def append(self, event: str, **fields: Any) -> None:
        self.all.append({"event": event, **fields})

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of one name."""
        return [each for each in self.all if each["event"] == event]


def make_task(
    labelled: Sequence[Query] = (), unlabelled: Sequence[Query] = (), validation: Sequence[Query] = ()
) -> Task:
    """A task that has these sets; the others are empty."""
    return Task([], list(labelled), list(unlabelled), list(validation), [])


@contextmanager
def make_job(directory: Path, config: Config, task: Task, family: InternVL2 | None = None) -> Iterator[Job]:
    """A job of one rank. A prompt's tokens are the letters of its query's id. Needs the fixture ``job_of_one``."""
    prompt = Ahead(lambda query: Prompt(list(query.id.encode()), [], None), lambda _: 1, 0, 0)
    with Progress(False) as progress, AnswerChecker() as checker:
        family = family or InternVL2("digits")
        yield Job(config, directory, distributed.layout(), family, prompt, task, Events(), progress, checker)


@dataclass(frozen=True)
class Asked:
    """One sample that the policy is asked for."""

    id: str
    """The query's."""
    start: str
    """What it continues."""
    number: int
    """Which of the request's samples with this start it is."""
    temperature: float


class Scripted(Actors):
    """Actors whose policy answers with ``write``; a text that ends with ``<cut>`` was cut at the length limit."""

    def __init__(self, job: Job, write: Callable[[Asked], str], prm: Any = None) -> None:
        self.engine: Any = self
        self.policy: Any = None
        self.prm = prm
        self.asked: list[Asked] = []
        self.weights = "scripted"
        """In place of a fingerprint."""
        self._job, self._write = job, write

    def fingerprint(self) -> str:
        return self.weights

    def generate(self, requests: Sequence[Request], temperature: float) -> list[list[Sample]]:
        """As :meth:`Engine.generate`."""
        return [self._answer(request, temperature) for request in requests]

    def stream(
        self, requests: Iterable[Request | None], temperature: float, samples: int | None = None, longest: int = 0
    ) -> Iterator[tuple[int, list[Sample]]]:
        """As :meth:`Engine.stream`."""
        number = 0
        for request in requests:
            assert request is not None, "every answer is out before the next request"
            yield number, self._answer(request, temperature)
            number += 1

    def _answer(self, request: Request, temperature: float) -> list[Sample]:
        counts: dict[tuple[str, float], int] = {}
        samples = []
        for spec in request.samples:
            start = self._job.family.tokenizer.decode(request.drafts[spec.draft][: spec.length]) if spec.length else ""
            hot = temperature if spec.temperature is None else spec.temperature
            number = counts.get((start, hot), 0)
            asked = Asked(bytes(request.prompt.tokens).decode(), start, number, hot)
            counts[start, hot] = number + 1
            self.asked.append(asked)
            text = self._write(asked)
            tokens = self._job.family.response_tokens(text.removesuffix("<cut>"))
            samples.append(Sample(tokens, [-0.5] * len(tokens), text.endswith("<cut>")))
        return samples
