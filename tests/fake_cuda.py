"""CUDA without a GPU: tensors of device cuda that have shapes and no contents (torch's FakeTensor).

An operation whose tensors are on two devices raises, and so does everything for which the host would have to wait for a
device's numbers: what runs through here does neither.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mstar_mega.kernels import forced_backend
from mstar_mega.platform import devices

SOURCE = Path(__file__).with_name("fake_guard.cpp")
CUDA = torch.device("cuda", 0)


@cache
def guard() -> None:
    """Compile and load the guard, once for a process; skips the test where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the rehearsal on fake CUDA tensors needs a C++ compiler")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        abi = int(torch.compiled_with_cxx11_abi())
        command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        command += [f"-I{root / 'include'}", str(SOURCE), "-o", str(library), f"-L{root / 'lib'}", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        torch.ops.load_library(library)


def moved(model: Any, mode: FakeTensorMode) -> Any:
    """The model with parameters and buffers of the same shapes on fake CUDA."""
    for part in model.modules():
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is None:
                    continue
                with mode:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                if isinstance(value, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, requires_grad=False)
                    fake.__dict__.update(value.__dict__)
                own[name] = fake
    return model


class Traffic:
    """Copies from the host, by what asked for them."""

    def __init__(self) -> None:
        self.copies: Counter[str] = Counter()


@contextmanager
def on_fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeTensorMode, Traffic]]:
    """Inside, tensors are fake; copies from the host are counted, and readbacks bring zeros."""
    guard()
    mode, traffic = FakeTensorMode(allow_non_fake_inputs=True), Traffic()
    real = devices.to_device

    def counted(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        traffic.copies[sys._getframe(1).f_code.co_name] += 1
        return real(values, device, dtype)

    class Zeros:
        def __init__(self, values: Tensor) -> None:
            assert values.device.type == "cuda"
            self.shape = values.shape

        def result(self) -> list[list[float]]:
            rows, columns = self.shape
            return [[0.0] * columns for _ in range(rows)]

    for name, module in list(sys.modules.items()):
        if name.startswith("mstar_mega.") and getattr(module, "to_device", None) is real:
            monkeypatch.setattr(module, "to_device", counted)
        if name.startswith("mstar_mega.generation") and hasattr(module, "Readback"):
            monkeypatch.setattr(module, "Readback", Zeros)
    with forced_backend("torch"), mode:
        yield mode, traffic
