"""A process does not outlive the one that would have to end it: a rank its launcher, a run of a ladder the ladder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
"""Opened here: between fork and exec, where this may be called, nothing is to be loaded."""


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however that dies. Linux only; elsewhere nothing."""
    if _LIBC is None:
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended in between
        os.kill(os.getpid(), signal.SIGKILL)
