"""flash-attn's attention over sequences of unlike lengths, where it is importable.

Tokens of all sequences stand one after another, without padding. Everywhere else attention is torch's own; a test
compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mstar_mega.kernels import dispatch
from mstar_mega.platform.devices import to_device

_WIDEST_HEAD = 256
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Spans:
    """Where sequences begin and end in a row of tokens."""

    ends: Tensor
    """int32 [sequences + 1], from 0 on."""
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Spans:
        """Sequences of these lengths, one after another."""
        return Spans(to_device([0, *accumulate(lengths)], device, torch.int32), max(lengths))


@lru_cache(maxsize=1)
def _module() -> Any:
    """``flash_attn``, or None where it is not installed or was built for another torch."""
    try:
        import flash_attn
    except (ImportError, OSError):
        return None
    return flash_attn


def takes(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether there is a flash-attn that takes heads of so many channels here, and it is not turned off."""
    fits = device.type == "cuda" and dtype in _DTYPES and channels <= _WIDEST_HEAD and channels % 8 == 0
    return fits and dispatch.is_on("flash_attention") and _module() is not None


def attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, *, causal: bool, scale: float | None = None) -> Tensor:
    """Attention inside each sequence.

    Args:
        q: [tokens, Hq, D], 16 bits; k, v: [tokens, Hk, D]. Query head h reads key head h // (Hq / Hk).
        spans: the sequences.
        causal: a token attends to itself and those before it, instead of to all.
        scale: factor on the scores; None: 1 / sqrt(D).

    Returns:
        [tokens, Hq, D].
    """
    out: Tensor = _module().flash_attn_varlen_func(
        q, k, v, spans.ends, spans.ends, spans.longest, spans.longest, softmax_scale=scale, causal=causal
    )
    return out
