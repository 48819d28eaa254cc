"""What a decode step launches, seen at torch's dispatcher and at the kernels; and a stand-in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mstar_mega.kernels import decode_attention, decode_layer, draw

KERNELS = {
    decode_attention: ("decode_prefix_kernel", "decode_own_kernel"),
    decode_layer: ("add_norm_kernel", "rotate_store_kernel", "swiglu_kernel"),
    draw: ("begin_kernel", "sample_kernel", "merge_kernel", "conclude_kernel", "advance_kernel"),
}
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view"}
HOST = {"_local_scalar_dense", "nonzero", "_to_copy", "lift_fresh", "masked_select", "item", "is_nonzero", "equal"}
"""Where the host would wait for the device, or copy to or from it."""


class Watch(TorchDispatchMode):
    """Notes every launch inside; with ``strict`` nothing may ask the host or take memory.

    ``actions`` replays them: the same operations on the same tensors.
    """

    active: list[Watch] = []  # noqa: RUF012

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.seen: list[tuple[Any, ...]] = []
        self.actions: list[Callable[[], Any]] = []

    def __enter__(self) -> Watch:
        Watch.active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        Watch.active.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        inputs = list(tensors((args, kwargs)))
        if self.strict:
            assert name not in HOST, f"{name}: the host would wait"
            assert "index" not in name or not any(x.dtype == torch.bool for x in inputs[1:]), f"{name} by booleans"
        out = func(*args, **kwargs)
        if self.strict:
            known = {x.untyped_storage().data_ptr() for x in inputs}
            fresh = [x for x in tensors(out) if x.numel() and x.untyped_storage().data_ptr() not in known]
            assert not fresh, f"{name} takes memory for {[tuple(x.shape) for x in fresh]}"
        if not func.is_view and name not in NO_LAUNCH:
            self.seen.append((name, *signature((args, kwargs))))
            self.actions.append(partial(again, func, args, kwargs, out))
        return out


def again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Do an operation once more, into the tensors that it gave the first time."""
    for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from tensors(part)


def signature(tree: Any) -> Iterator[Any]:
    """Shapes, strides and addresses of tensors, and all numbers, of an operation's arguments."""
    if isinstance(tree, Tensor):
        yield tuple(tree.shape), tree.stride(), tree.dtype, tree.data_ptr()
    elif isinstance(tree, dict):
        for name, part in tree.items():
            yield name, *signature(part)
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from signature(part)
    else:
        yield tree


class _Kernel:
    """A kernel whose launches are noted; ``run`` is false where they need not happen."""

    def __init__(self, name: str, real: Any, run: bool) -> None:
        self.name, self.real, self.run = name, real, run

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            def act() -> None:
                with _disable_current_modes():
                    self.real[grid](*args, **constants)

            for watch in Watch.active:
                watch.seen.append((self.name, grid, *signature((args, constants))))
                watch.actions.append(act)
            if self.run:
                act()

        return launch


@contextmanager
def kernels_watched(run: bool = True) -> Iterator[None]:
    """Inside, a :class:`Watch` sees the decode step's kernels; with ``run`` false their launches do nothing."""
    real = {(module, name): getattr(module, name) for module, names in KERNELS.items() for name in names}
    for (module, name), kernel in real.items():
        setattr(module, name, _Kernel(name, kernel, run))
    try:
        yield
    finally:
        for (module, name), kernel in real.items():
            setattr(module, name, kernel)


class Tape:
    """A stand-in for CUDA graphs: what a step launched while it was recorded is launched again, and nothing else."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        with Watch() as watch:
            step()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for action in watch.actions:
                action()

        return replay
