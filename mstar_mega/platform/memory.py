"""How much memory the job used, and how freed memory is kept."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """Peak resident set of this process; on CUDA plus the peak of the memory torch allocated on its device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    resident = peak if sys.platform == "darwin" else peak * 1024
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # what every version accepts
_TRIM_THRESHOLD = 512 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep freed buffers for the next tensor instead of giving them back to the system. Elsewhere: nothing.

    On the CPU each activation is a fresh buffer; having the system zero its pages again for every operation costs more
    than many of the operations.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
