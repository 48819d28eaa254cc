"""Who holds a directory: a record in a file, kept fresh while its holder lives, beside a file lock where there are any.

A file lock alone is not enough on a cluster: a node that is cut off may keep it, a file system may have none or keep it
to each node, and a network file system gives a dead node's lock back only after a while. So the record says who holds
(host, boot, process, batch job) and has a counter that a thread raises. Whoever comes next judges by both: one that
lives is never displaced; one that is dead, or has shown no sign of life for ``stale`` seconds, is. A holder that finds
itself displaced, or cannot tell for ``stale`` seconds, ends at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from mstar_mega.platform.terminal import one_line, say

_MOST_BYTES = 4096
_BEATS = 6
"""Signs of life within the time after which a silent holder is given up."""


class InUseError(ValueError):
    """Somebody else holds it, and lives."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a directory."""

    id: str
    host: str
    boot: str
    """Names the host's present start: after a restart its processes are gone."""
    space: str
    """Names the process numbers' space: containers on one host have their own."""
    process: int
    started: str
    """When the process began, in the host's ticks: numbers are used again."""
    job: str
    """The batch job; empty: none."""
    restarts: int
    """How often the batch system had put the job back into the queue."""
    beat: int = 0

    @classmethod
    def this(cls) -> Holder:
        """The present process."""
        number = os.getpid()
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            uuid4().hex, socket.gethostname(), _boot(), _space(), number, _start_of(number),
            os.environ.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdigit() else 0,
        )  # fmt: skip

    def __str__(self) -> str:
        of_job = f", job {self.job}" if self.job else ""
        return one_line(f"process {self.process} on {self.host}{of_job}")

    def lives(self) -> bool | None:
        """Whether the process runs; None: it cannot be told from here."""
        if self.host != socket.gethostname():
            return None
        if self.boot != _boot():
            return False
        return _start_of(self.process) == self.started if self.space == _space() else None

    def is_before(self, other: Holder) -> bool:
        """Whether this is an earlier start of the other's batch job, which the batch system has declared over."""
        return bool(self.job) and self.job == other.job and self.restarts < other.restarts


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _space() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _start_of(process: int) -> str:
    """The process's start in ticks; empty where there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _read(descriptor: int) -> Holder | None:
    """The record; None: nobody's. An unreadable one, half-written, is a holder of whom nothing is known."""
    text = os.pread(descriptor, _MOST_BYTES, 0).decode(errors="replace").strip("\0 \n")
    if not text:
        return None
    with contextlib.suppress(ValueError, TypeError):
        found = Holder(**json.loads(text))
        if all(type(value) is type(asdict(_NOBODY)[name]) for name, value in asdict(found).items()):
            return found
    return replace(_NOBODY, host=text[:80])


_NOBODY = Holder("", "", "", "", 0, "", "", 0)


def _try_lock(descriptor: int) -> bool | None:
    """True: locked; False: another process has the lock; None: this file system has no locks.

    The lock is the open file's, not the process's: a record lock would end when the record is read through another.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


class Hold:
    """A held directory, kept by a thread until :meth:`release`."""

    def __init__(self, path: Path, descriptor: int, holder: Holder, stale: float) -> None:
        self._path, self._descriptor, self._holder, self._stale = path, descriptor, holder, stale
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="holder", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let the next one have it."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine():
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _is_mine(self) -> bool:
        """Whether the record under the name is this holder's: opened anew, as network file systems see it then."""
        found = _look(self._path)
        return found is not None and found.id == self._holder.id

    def _keep(self) -> None:
        beat = self._holder
        last = time.monotonic()
        while not self._over.wait(self._stale / _BEATS):
            problem = ""
            try:
                if not self._is_mine():
                    _end(self._path, f"{_look(self._path) or 'another job'} has taken it over")
                beat = replace(beat, beat=beat.beat + 1)
                _write(self._descriptor, beat)
                last = time.monotonic()
            except OSError as error:
                problem = error.strerror or str(error)
            if time.monotonic() - last > self._stale:
                _end(self._path, f"it could not be reached for {self._stale:.0f} s ({problem})")


def _look(path: Path) -> Holder | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _end(path: Path, why: str) -> None:
    say(f"mstar: error: {path.parent} is no longer this job's: {why}. This job ends", sys.stderr)
    os._exit(1)


def _write(descriptor: int, holder: Holder) -> None:
    text = json.dumps(asdict(holder)).encode().ljust(600) + b"\n"
    os.pwrite(descriptor, text, 0)
    os.fsync(descriptor)


def take(path: Path, stale: float, patience: float, tell: Callable[[str], None]) -> Hold:
    """Hold the directory of the record ``path``, of which an earlier holder's death has been made sure.

    ``stale``: seconds of silence after which a holder that cannot be asked is given up. ``patience``: seconds to wait
    for a living one. ``tell`` is given a line for each thing worth knowing. Raises :class:`InUseError`, OSError.
    """
    me, begun, watch = Holder.this(), time.monotonic(), _Watch()
    waiting = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        locked = _try_lock(descriptor)
        other = _read(descriptor)
        silent = watch.silent(other)
        if locked is False and other is None and silent < stale:
            pass  # somebody is just about to write his name
        elif other is None or (gone := _is_gone(other, me, locked, silent, stale)):
            if other is not None:
                tell(f"{path.parent} was held by {other}, which {gone}: taken over")
            hold = _claim(path, descriptor, me, stale, locked, other)
            if hold is not None:
                return hold
            continue  # another was quicker
        elif other.lives() or watch.has_moved:
            if time.monotonic() - begun >= patience:
                os.close(descriptor)
                raise InUseError(
                    f"{path.parent} is in use by another job ({other}). Wait for its end or stop it, or choose another "
                    "--run.dir"
                )
            if not waiting:
                tell(f"{path.parent} is in use by another job ({other}): waiting up to {patience:.0f} s for its end")
                waiting = True
        elif not waiting:
            tell(f"{path.parent} is held by {other}: watching for {stale:.0f} s whether it lives")
            waiting = True
        os.close(descriptor)
        time.sleep(min(0.5, stale / 10))


class _Watch:
    """How long a record has stood still."""

    def __init__(self) -> None:
        self._seen: Holder | None = None
        self._since = time.monotonic()
        self.has_moved = False
        """Its holder showed a sign of life while it was watched."""

    def silent(self, now: Holder | None) -> float:
        """Seconds since the record changed, as far as it was watched."""
        if now != self._seen:
            self.has_moved = now is not None and self._seen is not None and now.id == self._seen.id
            self._seen, self._since = now, time.monotonic()
        return time.monotonic() - self._since


def _is_gone(other: Holder, me: Holder, locked: bool | None, silent: float, stale: float) -> str:
    """Why the holder is one no longer; empty: it may live."""
    lives = other.lives()
    if lives:
        return ""
    if lives is False:
        return "has ended"
    if other.is_before(me):
        return "is an earlier start of this job"
    if locked and not other.id:
        return "has left no readable name and no lock"
    if silent >= stale:
        return f"has shown no sign of life for {stale:.0f} s"
    return ""


def _claim(
    path: Path, descriptor: int, me: Holder, stale: float, locked: bool | None, other: Holder | None
) -> Hold | None:
    """Write the own name; None where another was quicker."""
    if locked is False:  # the old file's lock is not to be had: a new file in its place
        os.close(descriptor)
        fresh = path.with_name(f".{path.name}.{me.id}.tmp")
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT, 0o644)
        _try_lock(descriptor)
        _write(descriptor, me)
        os.replace(fresh, path)
    else:
        _write(descriptor, me)
    if other is not None and other.id and other.lives() is None:
        time.sleep(2 * stale / _BEATS)  # one that is cut off, but not from the disk, reads this and ends
    elif not locked:
        time.sleep(min(2.0, stale / _BEATS))  # two at once: the later name stands
    found = _look(path)
    if found is None or found.id != me.id or os.fstat(descriptor).st_ino != os.stat(path).st_ino:
        os.close(descriptor)
        return None
    return Hold(path, descriptor, me, stale)
