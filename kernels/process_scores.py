"""PRM scores: only the two rows of the score head, only at the ends of steps; the vocabulary head never runs."""

from __future__ import annotations

import torch
from torch import Tensor


def step_scores(hidden: Tensor, positions: Tensor, head_weight: Tensor) -> Tensor:
    """Logit that a step is good: z_good - z_bad, float32 [K]; its sigmoid is the two-class softmax.

    Args:
        hidden: [T, H], the trunk's output. Differentiable.
        positions: int64 [K], rows of ``hidden`` at the last token of each step.
        head_weight: [2, H], rows (good, bad). Differentiable.
    """
    z = torch.nn.functional.linear(hidden[positions].float(), head_weight.float())
    return z[:, 0] - z[:, 1]


def span_sums(values: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Sums of ``values[start[k]:end[k]]``, float32 [K], from one running sum in float64. Differentiable.

    Args:
        values: float [N].
        start, end: int64 [K] with 0 <= start <= end <= N; spans may overlap.
    """
    running = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
    return (running[end] - running[start]).float()
