"""Leaving in good order: a signal asks a job to stop, the ranks agree on where, save, and leave together.

SIGTERM (scancel, preemption, a launcher), SIGUSR1 (a batch system's warning before its time limit), SIGINT (Ctrl-C)
and SIGHUP set a flag. The recipe looks at it behind every optimizer step and in front of every block of queries. A
second SIGINT interrupts at once.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from mstar_mega.platform.exits import Stopped

__all__ = ["SIGNALS", "Stopped", "agreed", "ask", "asked", "leave_if", "listening", "reset", "seconds"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

_asked = ""
"""Who asked, in words; empty: nobody."""
_at = 0.0


def ask(who: str) -> None:
    """Ask this rank to stop; only the first time counts."""
    global _asked, _at
    if not _asked:
        _asked, _at = who, time.monotonic()


def asked() -> str:
    """Who asked this rank to stop; empty: nobody."""
    return _asked


def seconds() -> float:
    """Seconds since this rank was asked to stop; 0: it was not."""
    return time.monotonic() - _at if _asked else 0.0


def reset() -> None:
    """Forget that anybody asked."""
    global _asked
    _asked = ""


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _asked and number == signal.SIGINT:
        raise KeyboardInterrupt
    ask(f"{signal.Signals(number).name} on {socket.gethostname()}")


@contextmanager
def listening() -> Iterator[None]:
    """Signals ask to stop while the context lasts, and go on doing so where it ends in :class:`Stopped`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    reset()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield
    except Stopped:
        raise  # what else the launcher sends must not change the exit code
    except BaseException:
        restore()
        raise
    restore()


def agreed(group: dist.ProcessGroup | None = None, after: float = 0.0) -> bool:
    """Whether any rank of the group (None: of the job) was asked, at least ``after`` seconds ago. Collective."""
    mine = bool(_asked) and seconds() >= after
    if not dist.is_initialized() or (group.size() if group is not None else dist.get_world_size()) == 1:
        return mine
    on = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    flag = torch.tensor(float(mine), device=on)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag)


def leave_if(here: bool) -> None:
    """Raise :class:`Stopped` on every rank where any rank says so; otherwise a barrier. Collective over the job."""
    who: list[str] = [(_asked or "a signal") if here else ""]
    if dist.is_initialized() and dist.get_world_size() > 1:
        who = [""] * dist.get_world_size()
        dist.all_gather_object(who, (_asked or "") if here else "")
        who = [each for each in who if each]
    elif not here:
        who = []
    if who:
        raise Stopped(f"stopped by {who[0]}. What is finished is saved, and the same command goes on")
