"""Rotary position angles for arbitrary positions of a packed stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.models.attention import AttentionPlan


@dataclass
class RotatedPlan:
    """An attention plan whose queries and keys are rotated to their positions first.

    The tables are made once per forward pass; megatron's ``apply_rotary_pos_emb`` makes them twice in every layer.
    """

    plan: AttentionPlan
    cos: Tensor
    """[T, 1, head_dim]"""
    sin: Tensor
    """[T, 1, head_dim], the first half negated: x cos + swap(x) sin is the rotation."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.plan.attend(layer, self._rotate(q), self._rotate(k), v, scale)

    def _rotate(self, x: Tensor) -> Tensor:
        return torch.addcmul(x * self.cos, x.roll(x.size(-1) // 2, -1), self.sin)


class Rope:
    """Plain RoPE: angle of channel pair j at position p is p * theta^(-2j / head_dim), rotate-half layout."""

    def __init__(self, head_dim: int, theta: float) -> None:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.inverse_frequency = theta**-exponent

    def angles(self, positions: Tensor) -> Tensor:
        """int64 [T] -> float32 [T, 1, 1, head_dim], as megatron's ``apply_rotary_pos_emb`` wants them."""
        frequency = self.inverse_frequency.to(positions.device)
        half = positions.to(torch.float32)[:, None] * frequency
        return torch.cat([half, half], dim=-1)[:, None, None, :]

    def rotating(self, plan: AttentionPlan, positions: Tensor, dtype: torch.dtype) -> RotatedPlan:
        """The plan for queries and keys of ``dtype`` at ``positions``, int64 [T], that are not rotated yet."""
        angles = self.angles(positions).squeeze(1)
        sign = torch.ones(angles.size(-1), device=angles.device)
        sign[: sign.numel() // 2] = -1.0
        return RotatedPlan(plan, angles.cos().to(dtype), (angles.sin() * sign).to(dtype))
