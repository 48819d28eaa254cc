"""An identity whose gradient is summed over the ranks of a group."""

from __future__ import annotations

from typing import Any

from torch import Tensor, autograd, contiguous_format
from torch.distributed import ProcessGroup, all_reduce


class SumGradient(autograd.Function):
    """Every rank holds a part of the gradient of what all of them share: hidden states, or a norm's parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].clone(memory_format=contiguous_format)
        all_reduce(grad, group=ctx.group)
        return grad, None
