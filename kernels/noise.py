"""Counter-based random numbers: a token's noise depends on the sample it belongs to, never on the machine.

The generator is SplitMix64's finaliser applied to counters, in wrapping int64 arithmetic, so that CPU and CUDA give the
same bits and any subset of the vocabulary can be drawn on any rank.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def key_of(*parts: object) -> int:
    """A 63-bit key of any printable values: ``key_of(seed, "rollout", iteration, query_id, sample_index)``."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64 finaliser: int64 [...] -> int64 [...], a bijection that looks random."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def counters(keys: Tensor, positions: Tensor) -> Tensor:
    """One counter per (sample key, token position), both int64 [B] -> int64 [B]."""
    return mix(keys + (positions + 1) * _GOLDEN)


def uniform(counter: Tensor, ids: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float32 [B, V], for counters int64 [B] and vocabulary ids int64 [V].

    They are the top 23 bits of :func:`mix`, in place: a large vocabulary's noise is a matter of memory traffic. Its
    last step leaves these bits as they are and is left out.
    """
    x = counter[:, None] + (ids[None, :] + 1) * _GOLDEN
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        x.bitwise_xor_(_shift_right(x, bits)).mul_(factor)
    # 23 bits and a half fill float32's mantissa exactly: both ends stay open, so log(u) and log(-log(u)) are finite.
    return _shift_right(x, 41).to(torch.float32).add_(0.5).mul_(2.0**-23)


def gumbel(counter: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [B, V]."""
    return uniform(counter, ids).log_().neg_().log_().neg_()
