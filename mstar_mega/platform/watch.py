"""A rank that hangs is noticed: every rank shows signs of life, and rank 0 reads those of all.

A thread of each rank writes into the job's store what the rank does (:func:`beat`) and for how long nothing has moved.
A rank whose thread is silent is stopped or cut off; where no rank has moved for the limit, some wait for others that
never come. In both cases rank 0 says so, rank by rank, and the job ends. The others watch rank 0. On the CPU a rank
that computes moves by itself; one that waits for others, or for a device, does not. The same thread carries a request
to stop (``platform/stopping.py``) from one rank to all.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from mstar_mega.platform import stopping
from mstar_mega.platform.terminal import one_line, say

HUNG = 1
"""Exit code after a rank has hung."""
_SHOWN = 8
"""So many ranks are named."""

_beats = 0
_doing = "starting"
_alone = 0
"""Depth of the phases in which one rank computes on the CPU for all."""


def beat(what: str = "") -> None:
    """This rank has come on; ``what`` it does now. Cheap."""
    global _beats, _doing
    _beats += 1
    if what:
        _doing = what


@contextmanager
def computing(what: str) -> Iterator[None]:
    """A phase without beats in which this rank computes on the CPU: its CPU time and its disk counts as progress."""
    global _alone
    beat(what)
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1
        beat()


class Store(Protocol):
    """What is needed of the job's store; every call may raise RuntimeError where it cannot be reached."""

    def set(self, key: str, value: str, /) -> Any:
        """Keep a value."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys have values."""

    def get(self, key: str, /) -> bytes:
        """A value that is there."""


class LocalStore:
    """The store of a job of one rank."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        """Keep a value."""
        self._values[key] = value.encode()

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys have values."""
        return all(key in self._values for key in keys)

    def get(self, key: str, /) -> bytes:
        """A value that is there."""
        return self._values[key]


@dataclass
class _Sign:
    """What was last read of a rank, and when that was new."""

    text: bytes
    at: float

    def fields(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads(self.text)
        return found


class Watch:
    """The thread of one rank. ``limit``: seconds; ``end`` is called with what to say when the job must end."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        limit: float,
        end: Callable[[str], None],
        cpu_counts: bool = True,
    ) -> None:
        self._store, self._rank, self._limit, self._end = store, rank, limit, end
        self._ranks = range(world_size) if rank == 0 else range(1)
        self._cpu_counts, self._main = cpu_counts, threading.main_thread()
        self._interval = min(limit / 10, 5.0)
        self._signs: dict[int, _Sign] = {}
        self._spoke, self._reached = 0, time.monotonic()
        self._work, self._moved = self._measure(), time.monotonic()
        self._over = threading.Event()
        with contextlib.suppress(RuntimeError):  # which the thread will meet again, and count from
            self._look(time.monotonic())  # so that a rank that stops soon has a name
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        last = 0.0
        while not self._over.wait(min(1.0, self._interval)):
            now = time.monotonic()
            try:
                self._pass_on_stops()
                if now - last >= self._interval:
                    last = now
                    self._look(now)
                self._reached = now
            except RuntimeError as error:
                if now - self._reached > self._limit:
                    self._end(f"the first node cannot be reached for {_words(self._limit)} ({_first_line(error)})")
                    return

    def _pass_on_stops(self) -> None:
        key = "mstar/stop"
        if stopping.asked():
            if not self._store.check([key]):
                self._store.set(key, stopping.asked())
        elif self._store.check([key]):
            stopping.ask(self._store.get(key).decode(errors="replace"))

    def _look(self, now: float) -> None:
        work = self._measure()
        if work != self._work:
            self._work, self._moved = work, now
        self._spoke += 1
        sign = {"n": self._spoke, "still": round(now - self._moved, 1), "doing": _doing, "host": socket.gethostname()}
        self._store.set(f"mstar/life/{self._rank}", json.dumps(sign))
        for rank in self._ranks:
            key = f"mstar/life/{rank}"
            text = self._store.get(key) if self._store.check([key]) else b"{}"
            if rank not in self._signs or self._signs[rank].text != text:
                self._signs[rank] = _Sign(text, now)
        problem = self._problem(now)
        if problem:
            self._end(problem)
            self._over.set()

    def _problem(self, now: float) -> str:
        # The others give rank 0 the time to speak first.
        limit = self._limit if self._rank == 0 else 1.5 * self._limit
        silent = [rank for rank, sign in self._signs.items() if now - sign.at > limit]
        if silent:
            return f"no sign of life for {_words(limit)} from {self._named(silent)}"
        if self._rank == 0 and all(sign.fields().get("still", 0.0) > limit for sign in self._signs.values()):
            return f"no progress for {_words(limit)}: {self._named(list(self._signs))}"
        return ""

    def _named(self, ranks: list[int]) -> str:
        def words(rank: int) -> str:
            fields = self._signs[rank].fields()
            host, what = fields.get("host", "an unknown node"), fields.get("doing", "starting")
            return one_line(f"rank {rank} on {host} ({what})")

        more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
        return ", ".join(map(words, ranks[:_SHOWN])) + more

    def _measure(self) -> tuple[int, int, int]:
        """Changes where the main thread has come on: beats, a tenth of a second of CPU, a MiB of files."""
        if not (self._cpu_counts or _alone):
            return _beats, 0, 0
        return _beats, int(_cpu_seconds(self._main) * 10), _disk_bytes() >> 20


def _cpu_seconds(thread: threading.Thread) -> float:
    with contextlib.suppress(OSError, AttributeError):
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    return 0.0


def _disk_bytes() -> int:
    """Bytes that this process has read from and written to disks."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/io") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("read_bytes", "write_bytes")))
    return 0


def _words(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


def _first_line(error: Exception) -> str:
    return one_line(str(error).partition("\n")[0])[:120]


def end_job(problem: str) -> None:
    """Say it, and end this process: the main thread is stuck."""
    say(f"mstar: error: {problem}. The job ends (run.hang_minutes), and the same command goes on", sys.stderr)
    os._exit(HUNG)
