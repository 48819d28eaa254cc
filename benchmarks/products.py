"""The matrix products of a piece of work, and the time that they take by themselves on this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu"}
_LEAST_SECONDS = 1e-3
"""A product is repeated for so long."""


class Products(TorchDispatchMode):
    """Counts the products inside by operation, shapes and other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _NAMES:
            given = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            overload = func._overloadpacket.default
            self.count[overload, tuple(map(_described, args)), tuple(sorted(given.items()))] += 1
        return func(*args, **(kwargs or {}))

    def seconds(self) -> float:
        """Processor time of all of them, each shape timed by itself on contiguous numbers."""
        return sum(count * _seconds(*product) for product, count in self.count.items())


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        turned = value.dim() > 1 and value.stride(-1) != 1 and value.stride(-2) == 1
        return "tensor", tuple(value.shape), value.dtype, turned
    return tuple(value) if isinstance(value, list) else value


def _made(value: Any) -> Any:
    if not (isinstance(value, tuple) and value and value[0] == "tensor"):
        return list(value) if isinstance(value, tuple) else value
    _, shape, dtype, turned = value
    x = torch.randn(shape, dtype=torch.float32).to(dtype)
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if turned else x


def _seconds(func: Any, args: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> float:
    made, named = [_made(arg) for arg in args], dict(options)

    def run() -> None:
        func(*made, **named)

    run()
    return _time_of(run)


def _time_of(run: Callable[[], None]) -> float:
    repeats = 1
    while True:
        start = time.process_time()
        for _ in range(repeats):
            run()
        seconds = time.process_time() - start
        if seconds >= _LEAST_SECONDS:
            return seconds / repeats
        repeats *= 4
