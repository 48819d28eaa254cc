"""The one place that knows megatron-core expects CUDA.

:func:`apply_cpu_platform` makes megatron-core (0.16 to 0.19) run on CPU tensors under gloo. Nothing here slows the hot
path down: ``device="cuda"`` is rewritten only inside the megatron modules that spell it out (a global
``TorchFunctionMode`` more than doubles the cost of every small torch call, 1.0 to 2.2 microseconds), and the ``Tensor``
methods act differently only when a megatron module calls them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mstar_mega.platform.quiet import silence_normal_warnings

# Modules that create tensors with a literal device="cuda", and what of them we reach.
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.optimizer.optimizer",  # scale and overflow buffers of the FP32 and the bf16 optimizer
    "megatron.core.optimizer.clip_grads",  # gradient norm, overflow buffer
    "megatron.core.pipeline_parallel.schedules",  # token counters of all three schedules
    "megatron.core.utils",  # local stand-in for apex's multi-tensor norm
)

_applied = False


def apply_cpu_platform() -> None:
    """Let megatron-core run on the CPU. Does nothing where CUDA is available, and nothing the second time."""
    global _applied
    if _applied or torch.cuda.is_available():
        return
    silence_normal_warnings()
    _patch_torch_cuda()
    _patch_tensor_methods()
    for name in _MODULES_WITH_CUDA_LITERALS:
        vars(importlib.import_module(name))["torch"] = _TorchOnCpu()
    _patch_random_states()
    _applied = True


def _patch_torch_cuda() -> None:
    cuda: Any = torch.cuda
    # Every megatron buffer and pipeline message is made with device=torch.cuda.current_device().
    cuda.current_device = lambda: torch.device("cpu")
    # Pipeline communication waits for the device.
    cuda.synchronize = lambda device=None: None
    stream: Callable[..., Any] = cuda.current_stream
    # Asked for before gradients are reduced (megatron-core 0.19), and used with recorded CUDA graphs only.
    cuda.current_stream = lambda device=None: None if _called_by_megatron() else stream(device)


def _called_by_megatron() -> bool:
    """True when the caller's caller is megatron-core: other libraries keep torch's own answers."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")


def _patch_tensor_methods() -> None:
    tensor_cuda: Callable[..., Any] = torch.Tensor.cuda
    tensor_type: Callable[..., Any] = torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Reloaded optimizer states are moved with .cuda().
        return self if _called_by_megatron() else tensor_cuda(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The mixed-precision optimizer and gradient clipping compare this string.
        answer = tensor_type(self, *args, **kwargs)
        if isinstance(answer, str) and _called_by_megatron():
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor: Any = torch.Tensor
    tensor.cuda = cuda
    tensor.type = type_


class _TorchOnCpu(types.ModuleType):
    """``torch`` as one megatron module sees it: tensors made with ``device="cuda"`` land on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for factory in ("tensor", "zeros", "ones", "empty"):
            setattr(self, factory, _on_cpu(getattr(torch, factory)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _patch_random_states() -> None:
    """Model-parallel random states (dropout, activation recomputation) live in the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        """Named generator states; ``fork`` swaps one into the CPU generator and back."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} with seed {seed} is already there")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    # Activation recomputation saves and restores "the CUDA state" besides the CPU's; on the CPU they are the same one.
    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    module: Any = megatron_random
    module.CudaRNGStatesTracker = CpuRNGStatesTracker
    module._get_cuda_rng_state = get_state
    module._set_cuda_rng_state = set_state
    # A tracker made before this moment would still be the CUDA one.
    module.initialize_rng_tracker(force_reset=True)
