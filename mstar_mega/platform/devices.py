"""Numbers between host and device without waiting for either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(values: Sequence[Any] | np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of host numbers; on CUDA the host goes on while it is copied."""
    if device.type != "cuda" or not torch.cuda.is_available():  # a rehearsal has CUDA tensors without CUDA
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Readback:
    """A device tensor on its way to the host. What is done to the tensor afterwards does not change what arrives."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._host = values.clone()
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def result(self) -> list[Any]:
        """The values as (nested) lists, as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        found: list[Any] = self._host.tolist()
        return found
