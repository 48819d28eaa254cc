"""Progress of a stage on the main process: rich bars on a terminal, occasional plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from mstar_mega.platform.terminal import say, visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

LINE_EVERY = 10.0
"""Seconds between two plain lines of one task."""


class Task:
    """One running piece of work. Advance it; it ends by itself at its total, or when closed before."""

    def __init__(self, owner: Progress, description: str, total: int, unit: str, done: int) -> None:
        self._owner, self._description, self._total, self._unit = owner, description, total, unit
        self._done = self._done_before = done
        self._fields: dict[str, object] = {}
        self._start = self._last_line = time.monotonic()
        self._closed = False
        self._bar = None
        if owner.bars is not None:
            self._bar = owner.bars.add_task(description, total=total, completed=done, note="")
        else:
            owner.say(f"{description}: {done} of {total} {unit}")

    def advance(self, n: int = 1, **fields: object) -> None:
        """``n`` more units are done; ``fields`` (loss=0.31) are shown beside the count until they change."""
        self._done += n
        self._fields.update(fields)
        now = time.monotonic()
        if self._owner.bars is not None and self._bar is not None:
            self._owner.bars.update(self._bar, completed=self._done, note=self._note())
        elif now - self._last_line >= LINE_EVERY and self._done < self._total:
            self._last_line = now
            self._owner.say(f"{self._description}: {self._done} of {self._total} {self._unit}, {self._note()}")
        if self._done >= self._total:
            self.close()

    def close(self, interrupted: bool = False) -> None:
        """End the task with one line that stays. Does nothing when it has ended already."""
        if self._closed:
            return
        self._closed = True
        if self._owner.bars is not None and self._bar is not None:
            self._owner.bars.remove_task(self._bar)
        did = f"interrupted after {self._done} of {self._total}" if interrupted else str(self._done)
        parts = [f"{did} {self._unit} in {clock(time.monotonic() - self._start)}", *self._details(ended=True)]
        self._owner.say(f"{self._description}: {', '.join(parts)}")

    def _note(self) -> str:
        return ", ".join(self._details(ended=False))

    def _details(self, ended: bool) -> list[str]:
        """Rate, time left and the caller's fields. The rate counts only what this process did, not a resumed part."""
        done, seconds = self._done - self._done_before, time.monotonic() - self._start
        details = []
        if done > 0 and seconds > 0:
            details.append(f"{_short(done / seconds)} {self._unit}/s")
            if not ended:
                details.append(f"{clock((self._total - self._done) * seconds / done)} left")
        return details + [f"{key.replace('_', ' ')} {_short(value)}" for key, value in self._fields.items()]

    def __enter__(self) -> Task:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(interrupted=kind is not None)


class _NullTask(Task):
    """The task of a process that shows nothing."""

    def __init__(self) -> None:
        pass

    def advance(self, n: int = 1, **fields: object) -> None:
        pass

    def close(self, interrupted: bool = False) -> None:
        pass


class Progress:
    """Shows what runs. ``with Progress(rank == 0) as progress``; a disabled one is silent and costs nothing."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.bars: Bars | None = None

    def __enter__(self) -> Progress:
        if self.enabled and sys.stdout.isatty():
            self.bars = _bars()
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def task(self, description: str, total: int, unit: str, done: int = 0) -> Task:
        """Begin a task of ``total`` units, of which a resumed one has ``done`` some before."""
        return Task(self, description, total, unit, done) if self.enabled else _NullTask()

    def say(self, text: str) -> None:
        """Print one line above the bars."""
        if not self.enabled:
            return
        if self.bars is not None:
            self.bars.console.print(visible(text), markup=False, highlight=False)
        else:
            say(text)


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        console=Console(file=sys.stdout),
        transient=True,
    )


def clock(seconds: float) -> str:
    """A duration as a person reads it: 8.2 s, 1:05, 2:03:10."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
