"""Rotary position angles for arbitrary positions of a packed stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.models.attention import AttentionPlan
from mstar_mega.models.sizes import DynamicNTK, LongRope


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
    """RoPE in rotate-half layout: the angle of channel pair j at position p is p * frequency[j].

    Plainly, frequency[j] is theta^(-2j / head_dim). With a scaling, all positions of a sequence share frequencies that
    depend on the whole sequence's length: where the length enters another **regime**, earlier positions turn
    differently too, so nothing computed for a shorter sequence may be shared or cached.

    longrope (Phi-3): frequency[j] / short[j] up to the original context, / long[j] beyond; cos and sin are scaled.
    dynamic NTK (InternLM2): beyond the limit theta grows with the length. The original keeps the largest base that it
    ever saw and, with a cache, older keys as they are; here every sequence is what it would be if computed alone.
    """

    def __init__(self, head_dim: int, theta: float, scaling: LongRope | DynamicNTK | None = None) -> None:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.inverse_frequency = theta**-exponent
        self.scaling = scaling
        self._theta, self._exponent, self._head_dim = theta, exponent, head_dim

    @property
    def regimes(self) -> Callable[[int], int] | None:
        """Sequence length -> regime (equal ones may share keys and values); None: there is only one."""
        return None if self.scaling is None else self.regime

    def regime(self, length: int) -> int:
        """The regime of a sequence of ``length`` tokens."""
        if isinstance(self.scaling, LongRope):
            return int(length > self.scaling.original)
        if isinstance(self.scaling, DynamicNTK):
            return length if length > self.scaling.limit else 0
        return 0

    @property
    def first_regime(self) -> float:
        """Tokens of the longest sequence in the first regime."""
        if isinstance(self.scaling, LongRope):
            return self.scaling.original
        return self.scaling.limit if isinstance(self.scaling, DynamicNTK) else float("inf")

    def enters_regime(self, length: int) -> bool:
        """Whether a sequence of ``length`` tokens is in another regime than one token earlier."""
        return self.regime(length) != self.regime(length - 1)

    def angles(self, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """int64 [T] -> float32 [T, 1, 1, head_dim], as megatron's ``apply_rotary_pos_emb`` wants them.

        ``lengths``, int64 [T], is the length of each token's sequence; None: it ends with the token.
        """
        if self.scaling is None:
            frequency = self.inverse_frequency.to(positions.device)
        else:
            frequency = self._frequencies(positions + 1 if lengths is None else lengths)
        half = positions.to(torch.float32)[:, None] * frequency
        return torch.cat([half, half], dim=-1)[:, None, None, :]

    def rotating(
        self, plan: AttentionPlan, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None = None
    ) -> RotatedPlan:
        """The plan for queries and keys of ``dtype`` at ``positions``, int64 [T], that are not rotated yet."""
        return RotatedPlan(plan, *self._cos_sin(positions, dtype, lengths))

    def table(self, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """What :class:`RotatedPlan` holds, for the last tokens of sequences of 1 to ``count`` tokens: cos and sin
        [count, head_dim] of ``dtype``."""
        cos, sin = self._cos_sin(torch.arange(count, device=device), dtype, None)
        return cos.squeeze(1), sin.squeeze(1)

    def _cos_sin(self, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        angles = self.angles(positions, lengths).squeeze(1)
        sign = torch.ones(angles.size(-1), device=angles.device)
        sign[: sign.numel() // 2] = -1.0
        cos, sin = angles.cos(), angles.sin() * sign
        if isinstance(self.scaling, LongRope):
            cos, sin = cos * self.scaling.attention_scale, sin * self.scaling.attention_scale
        return cos.to(dtype), sin.to(dtype)

    def _frequencies(self, lengths: Tensor) -> Tensor:
        """float32 [T, head_dim / 2] for tokens of sequences of these lengths."""
        plain = self.inverse_frequency.to(lengths.device)
        if isinstance(self.scaling, LongRope):
            short, long = (torch.tensor(x, device=lengths.device) for x in (self.scaling.short, self.scaling.long))
            return torch.where((lengths > self.scaling.original)[:, None], plain / long, plain / short)
        assert isinstance(self.scaling, DynamicNTK)
        factor, limit = self.scaling.factor, self.scaling.limit
        growth = (factor * lengths.double() / limit - (factor - 1)).clamp_min(1.0)
        base = self._theta * growth ** (self._head_dim / (self._head_dim - 2))
        grown = (base[:, None] ** -self._exponent.to(lengths.device).double()).float()
        return torch.where((lengths > limit)[:, None], grown, plain)
