"""What every stage needs: settings, family, queries, where to write, and how to tell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mstar_mega.config import Config
from mstar_mega.data.prefetch import Ahead
from mstar_mega.data.types import Task
from mstar_mega.models.families.base import Family
from mstar_mega.models.packing import Prompt
from mstar_mega.platform.distributed import Layout, device
from mstar_mega.platform.memory import peak_memory_bytes
from mstar_mega.report.metrics import MetricsLog, NullMetrics
from mstar_mega.report.progress import Progress
from mstar_mega.rewards.checker import AnswerChecker


@dataclass
class Job:
    """One run of the recipe on this rank."""

    config: Config
    dir: Path
    layout: Layout
    family: Family
    prompt: Ahead[Prompt]
    """A query as the policy reads it, its images decoded ahead where that was asked for."""
    task: Task
    metrics: MetricsLog | NullMetrics
    progress: Progress
    checker: AnswerChecker
    muted: bool = False
    """True while a resumed run passes through what an earlier one already logged."""
    recovered_seconds: float = 0.0
    """Time that blocks of an earlier start, read back from disk, took when they were made: see :class:`Timer`."""
    score_seconds: float = 0.0
    """Time spent in the PRM, that of such blocks included."""
    streams_begun: int = 0
    """Rollouts so far whose blocks model copies took from a common store: the same on every rank."""
    counted_rollouts: set[Path] = field(default_factory=set)
    """Directories of blocks whose time is counted already."""

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.dir / "rollouts"

    @property
    def writes_files(self) -> bool:
        """This rank writes its model copy's rollouts: first tensor rank of the first stage."""
        return self.layout.tensor_rank == 0 and self.layout.pipeline_rank == 0

    def log(self, event: str, **fields: Any) -> None:
        """Append an event to metrics.jsonl (rank 0; see ``report.metrics`` for the events)."""
        if not self.muted:
            self.metrics.append(event, **fields)

    def say(self, text: str) -> None:
        """One line for the person who watches (rank 0)."""
        if not self.muted:
            self.progress.say(text)

    def warn(self, text: str) -> None:
        """One line that a resumed run must not swallow (rank 0)."""
        self.progress.say(f"WARNING: {text}")

    @contextmanager
    def quiet(self, when: bool) -> Iterator[None]:
        """Log nothing inside, if ``when``."""
        before = self.muted
        self.muted = before or when
        try:
            yield
        finally:
            self.muted = before

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and log its end."""
        started = time.monotonic()
        self.say(f"== {name}")
        yield
        seconds = round(time.monotonic() - started, 2)
        memory = torch.tensor(float(peak_memory_bytes()), dtype=torch.float64, device=device())
        dist.all_reduce(memory)
        self.log("stage", stage=name, seconds=seconds, peak_memory_bytes=int(memory))


class Timer:
    """Seconds of work since its construction; work that was read back from disk counts with what it took then."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._started = time.monotonic() + job.recovered_seconds

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._started + self._job.recovered_seconds, 3)
