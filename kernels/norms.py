"""RMSNorm and LayerNorm over the last dimension, with parameters that sequence-parallel ranks share.

    rms_norm:   y = x / sqrt(mean(x^2) + eps) * weight
    layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

In Triton a row stays in registers: the forward reads and writes each element once, the backward reads x and dy and
writes dx; the parameters' gradients are summed in float32 by a fixed number of programs and then over these, in a fixed
order. Under sequence parallelism every rank sees a part of the rows, so these gradients are partial: pass the group, or
mark the parameters ``sequence_parallel`` and let megatron sum them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_world_size

from mstar_mega.kernels.dispatch import uses_triton
from mstar_mega.kernels.language import INTERPRETED, jit, narrow, next_power_of_2, tl
from mstar_mega.kernels.sum_gradient import SumGradient

_PROGRAMS = 264
"""Two for each multiprocessor of an H100."""
_MAX_WIDTH = 16_384
"""A row must fit into the registers of one program."""


@jit
def norm_kernel(  # type: ignore[no-untyped-def]
    X, WEIGHT, BIAS, Y, MEAN, RSTD, width, eps,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(X + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, 0) / width
        x = tl.where(inside, x - mean, 0.0)
        tl.store(MEAN + row, mean)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(RSTD + row, rstd)
    y = x * rstd * tl.load(WEIGHT + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        y += tl.load(BIAS + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * width + at, narrow(y, Y.dtype.element_ty, INTERP), mask=inside)


@jit(varying=("rows",))
def norm_backward_kernel(  # type: ignore[no-untyped-def]
    X, WEIGHT, DY, MEAN, RSTD, DX, DWEIGHT, DBIAS, rows, width,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: rows program, program + programs, ...; and its share of the parameters' gradients."""
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < width
    weight = tl.load(WEIGHT + at, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for index in range(program, rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        x = tl.load(X + row * width + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * width + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        if CENTRED:
            x = tl.where(inside, x - tl.load(MEAN + row), 0.0)
            dbias += dy
        normal = x * rstd
        dweight += dy * normal
        g = dy * weight
        dx = g - normal * (tl.sum(g * normal, 0) / width)
        if CENTRED:
            dx -= tl.sum(g, 0) / width
        tl.store(DX + row * width + at, narrow(dx * rstd, DX.dtype.element_ty, INTERP), mask=inside)
    tl.store(DWEIGHT + program * width + at, dweight, mask=inside)
    if CENTRED:
        tl.store(DBIAS + program * width + at, dbias, mask=inside)


def warps_for(block: int) -> int:
    """16 elements or so per thread."""
    return min(16, max(1, block // 512))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        rows, weight = x.contiguous().view(-1, x.size(-1)), weight.contiguous()
        N, width = rows.shape
        y = torch.empty_like(rows)
        stats = torch.empty(2, N, device=x.device)
        block = next_power_of_2(width)
        if N:
            norm_kernel[(N,)](
                rows, weight, weight if bias is None else bias.contiguous(), y, stats[0], stats[1], width, eps,
                BLOCK=block, CENTRED=bias is not None, INTERP=INTERPRETED, num_warps=warps_for(block),
            )  # fmt: skip
        ctx.save_for_backward(rows, weight, stats)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, stats = ctx.saved_tensors
        N, width = rows.shape
        dy = grad_outputs[0].contiguous().view(N, width)
        centred, block, programs = ctx.bias_dtype is not None, next_power_of_2(width), min(max(N, 1), _PROGRAMS)
        dx = torch.empty_like(rows)
        parts = torch.zeros(1 + centred, programs, width, device=rows.device)
        if N:
            norm_backward_kernel[(programs,)](
                rows, weight, dy, stats[0], stats[1], dx, parts[0], parts[-1], N, width,
                BLOCK=block, CENTRED=centred, INTERP=INTERPRETED, num_warps=warps_for(block),
            )  # fmt: skip
        sums = parts.sum(dim=1)
        dbias = sums[1].to(ctx.bias_dtype) if centred else None
        return dx.view(grad_outputs[0].shape), sums[0].to(weight.dtype), dbias, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, sequence_group: ProcessGroup | None = None) -> Tensor:
    """float [..., H] -> the same shape and dtype; computed in float32.

    Args:
        weight: [H].
        sequence_group: ranks that hold the other rows of the same sequence: weight's gradient is summed over them.
    """
    weight = _shared(weight, sequence_group)
    if uses_triton("norms", x) and x.size(-1) <= _MAX_WIDTH:
        return _Norm.apply(x, weight, None, eps)
    return torch.nn.functional.rms_norm(x, (x.size(-1),), weight, eps)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, sequence_group: ProcessGroup | None = None
) -> Tensor:
    """float [..., H] -> the same shape and dtype; weight and bias [H]. See :func:`rms_norm`."""
    weight, bias = _shared(weight, sequence_group), _shared(bias, sequence_group)
    if uses_triton("norms", x) and x.size(-1) <= _MAX_WIDTH:
        return _Norm.apply(x, weight, bias, eps)
    return torch.nn.functional.layer_norm(x, (x.size(-1),), weight, bias, eps)


def _shared(parameter: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is None or get_world_size(group) == 1:
        return parameter
    return SumGradient.apply(parameter, group)
