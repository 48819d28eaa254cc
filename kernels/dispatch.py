"""Which implementation of a kernel runs: compiled Triton, Triton's interpreter, or plain PyTorch.

Left to itself a kernel is Triton on CUDA tensors and plain PyTorch on all others; on the CPU a decode step's kernels
are compiled C (``native.py``) where there is a compiler. :func:`force_backend` chooses for
every kernel; :func:`turn_off` leaves single kernels to plain PyTorch. Triton's interpreter runs the same kernels on the
CPU, for tests: it needs ``TRITON_INTERPRET=1`` in the environment before anything imports triton.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from mstar_mega.config import KernelsConfig
from mstar_mega.kernels import native
from mstar_mega.kernels.language import HAS_TRITON, INTERPRETED

Backend = Literal["triton", "interpreter", "torch"]

KERNELS = (
    "linear_logprob",
    "linear_cross_entropy",
    "vocab_parallel_logprob",
    "sampling",
    "step_scores",
    "selection",
    "norms",
    "attention",
    "decode",
    "flash_attention",
)
"""Each is also a switch of the ``kernels`` settings."""

_forced: Backend | None = None
_off: frozenset[str] = frozenset()
_chunk_bytes = KernelsConfig().chunk_mb * 2**20


def backend(device: torch.device | str | None = None) -> Backend:
    """What kernels run as on ``device`` (None: CUDA where there is one, else the CPU)."""
    if _forced is not None:
        return _forced
    on_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if not (on_cuda and HAS_TRITON):
        return "torch"
    return "interpreter" if INTERPRETED else "triton"


def force_backend(name: str | None) -> None:
    """Run every kernel as ``name``; None or "auto" ends it. Raises ValueError for what cannot run here."""
    global _forced
    if name is None or name == "auto":
        _forced = None
        return
    if name not in ("triton", "interpreter", "torch"):
        raise ValueError(f"kernels.backend is {name!r}; it must be auto, triton, interpreter or torch")
    if name != "torch" and not HAS_TRITON:
        raise ValueError(f"kernels.backend is {name!r}, but triton is not installed: pip install triton, or use auto")
    if name == "interpreter" and not INTERPRETED:
        raise ValueError("kernels.backend is 'interpreter': start with TRITON_INTERPRET=1 in the environment")
    if name == "triton" and (INTERPRETED or not torch.cuda.is_available()):
        reason = "TRITON_INTERPRET is set" if INTERPRETED else "there is no CUDA device"
        raise ValueError(f"kernels.backend is 'triton', but {reason}: use auto or torch")
    _forced = name  # type: ignore[assignment]


@contextmanager
def forced_backend(name: str | None) -> Iterator[None]:
    """:func:`force_backend` for a while."""
    global _forced
    before = _forced
    force_backend(name)
    try:
        yield
    finally:
        _forced = before


def turn_off(names: Iterable[str]) -> None:
    """Leave these kernels, and only these, to their plain definitions. Raises ValueError for an unknown name."""
    global _off
    off = frozenset(names)
    if unknown := sorted(off - frozenset(KERNELS)):
        raise ValueError(f"there is no kernel {unknown[0]!r}; known: {', '.join(KERNELS)}")
    _off = off


def is_on(kernel: str) -> bool:
    """False where the kernel was turned off."""
    assert kernel in KERNELS, kernel
    return kernel not in _off


def uses_triton(kernel: str, tensor: Tensor) -> bool:
    """Whether ``kernel`` runs as Triton (compiled or interpreted) on this tensor."""
    if _forced is None and not tensor.is_cuda:
        return False
    return is_on(kernel) and backend(tensor.device) != "torch"


def native_for(kernel: str, tensor: Tensor) -> ctypes.CDLL | None:
    """The compiled CPU kernels where ``kernel`` runs as one of them on this tensor: left to itself, in float32."""
    if _forced is not None or tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not is_on(kernel):
        return None
    return native.library()


def chunk_bytes() -> int:
    """Most bytes of logits, and of what is computed from them, that exist at once in the fused linear kernels."""
    return _chunk_bytes


def configure(settings: KernelsConfig) -> None:
    """Apply the ``kernels`` settings to this process. Raises ValueError for a backend that cannot run here."""
    global _chunk_bytes
    force_backend(settings.backend)
    turn_off(name for name in KERNELS if not getattr(settings, name))
    _chunk_bytes = settings.chunk_mb * 2**20
