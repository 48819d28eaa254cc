"""Where kernel tests run: on the GPU where there is one, else Triton's interpreter on the CPU."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton" if DEVICE == "cuda" else "interpreter")


def _older(package: str, *wanted: int) -> bool:
    try:
        return tuple(int(part) for part in version(package).split(".")[:2]) < wanted
    except PackageNotFoundError:
        return True


needs_interpreter = pytest.mark.skipif(
    _older("triton", 3, 7) and not _older("numpy", 2, 4),
    reason="triton 3.6 interprets with numpy below 2.4 only",
)
"""For what Triton's interpreter runs, on machines with a GPU too: ranks of a group never see it."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(DEVICE)


def randint(low: int, high: int, size: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(DEVICE)


def relative_error(got: Tensor, wanted: Tensor, least: float = 1e-6) -> float:
    """Largest deviation over the largest value, or over ``least`` where all values are smaller: what remains of terms
    that cancel is as large as the rounding of the terms."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if not wanted.numel():
        return 0.0
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=least))
