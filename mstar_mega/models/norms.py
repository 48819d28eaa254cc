"""The model's norms, on our kernels (megatron refuses torch's own RMSNorm under sequence parallelism)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mstar_mega.kernels.norms import layer_norm, rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        # Under sequence parallelism each rank sees a part of the tokens: megatron sums these gradients over the group.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """float [..., hidden] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension: vision towers and connectors."""

    def forward(self, x: Tensor) -> Tensor:
        """float [..., hidden] -> the same shape and dtype."""
        return layer_norm(x, self.weight, self.bias, self.eps)
