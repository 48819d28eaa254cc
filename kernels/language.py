"""What Triton functions share: a stand-in where Triton is missing, and operations that the interpreter gets wrong.

The interpreter multiplies the raw bits of bfloat16 operands in ``tl.dot`` and truncates when it rounds to bfloat16.
:func:`dot` and :func:`narrow` are right in both worlds; kernels load low precision, cast to float32 at once, and
narrow when they store.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # plain PyTorch is all there is, for example on macOS
    triton = tl = None
    HAS_TRITON = False


def jit(function: Any = None, *, varying: Sequence[str] = ()) -> Any:
    """``triton.jit``; without triton the function stays as it is, for nothing calls it.

    ``varying``: integers that differ from call to call. Triton compiles a kernel anew, for seconds, where one of its
    other integers is 1, or a multiple of 16, for the first time.
    """
    if function is None:
        return lambda function: jit(function, varying=varying)
    return triton.jit(function, do_not_specialize=list(varying)) if HAS_TRITON else function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton functions of this process are interpreted: decided once, when triton is imported."""


@jit
def dot(a, b, acc, INTERP: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a @ b in float32."""
    if INTERP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@jit
def narrow(x, dtype: tl.constexpr, INTERP: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 -> ``dtype``, to nearest even."""
    if INTERP:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
        else:
            return x.to(dtype)
    else:
        return x.to(dtype)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def set_scratch(device: torch.device) -> None:
    """Let kernels that make tensor descriptors find scratch memory. The setting belongs to a thread's context, and the
    backward pass runs in another thread: call it before each launch."""
    if HAS_TRITON and not INTERPRETED:
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
