"""RMSNorm and LayerNorm against their definitions in float64, also with rows spread over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, needs_interpreter, randn, relative_error
from parallel import run_parallel
from torch import Tensor
from torch.distributed import get_rank, get_world_size, group

from mstar_mega.kernels import forced_backend, layer_norm, rms_norm


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is None:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 37), (1, 1), (300, 16)])
def test_values_and_gradients_against_float64(
    backend: str, dtype: torch.dtype, centred: bool, shape: tuple[int, ...]
) -> None:
    if backend == "interpreter" and shape[0] == 300 and (dtype != torch.float32 or centred):
        pytest.skip("one case of more rows than programs is enough")
    x, weight, bias = 3 + randn(*shape), randn(shape[-1], seed=1), randn(shape[-1], seed=2)
    inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias)[: 2 + centred]]
    y = layer_norm(inputs[0], inputs[1], inputs[2], 1e-3) if centred else rms_norm(inputs[0], inputs[1], 1e-3)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = definition(exact[0], exact[1], exact[2] if centred else None, 1e-3)
    upstream = randn(*shape, seed=3).to(dtype)
    rounding = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    assert y.dtype == dtype and relative_error(y, wanted) < rounding
    if backend == "torch" and dtype != torch.float32:
        return  # torch's own gradients in low precision are rounded on the way
    expected = torch.autograd.grad(wanted, exact, upstream.double())
    for got, value in zip(torch.autograd.grad(y, inputs, upstream), expected, strict=True):
        assert got.dtype == dtype and (relative_error(got, value) < 2 * rounding or value.abs().max() < 1e-4)


def rows_of_a_rank(backend: str) -> list[Tensor]:
    size, rank = get_world_size(), get_rank()
    x, upstream = randn(8, 24).cpu(), randn(8, 24, seed=3).cpu().chunk(size)[rank]
    weight, bias = (randn(24, seed=seed).cpu().requires_grad_() for seed in (1, 2))
    part = x.chunk(size)[rank]
    with forced_backend(backend):
        settings: dict[str, Any] = {"sequence_group": group.WORLD}
        total = (rms_norm(part, weight, **settings) + layer_norm(part, weight, bias, **settings)) * upstream
        return list(torch.autograd.grad(total.sum(), (weight, bias)))


@pytest.mark.parametrize("backend", ["torch", pytest.param("interpreter", marks=needs_interpreter)])
def test_parameters_shared_by_sequence_parallel_ranks(backend: str) -> None:
    whole = run_parallel(1, "test_norm_kernels:rows_of_a_rank", "torch")[0]
    for rank in run_parallel(2, "test_norm_kernels:rows_of_a_rank", backend):
        for got, expected in zip(rank, whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
