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
