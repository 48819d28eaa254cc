"""What the trainer consumes: queries with the responses to learn from, cut into steps and microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.data.types import Query
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import PackedBatch, Prompt, Regimes, StepIndex, next_token_targets, pack, step_index


@dataclass
class TrainGroup:
    """A query and its responses to train on; they share one pass over image and prompt."""

    query: Query
    responses: list[list[int]]
    """Token ids per response, stop token included."""
    step_ends: list[list[int]] | None = None
    """PRM training: per response, the index one past each step's last token."""
    step_labels: list[list[float]] | None = None
    """PRM training: per response, the labels of those steps in [0, 1]."""


@dataclass
class TokenLoss:
    """SFT: negative log-likelihood of the response tokens."""

    source: Tensor
    target: Tensor

    def __call__(self, model: LMM, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of losses, number of counted tokens) on the last stage."""
        if not self.source.numel():
            return hidden.sum() * 0.0, torch.tensor(0, dtype=torch.int)
        loss = model.token_loss(hidden[self.source], self.target)
        return loss, torch.tensor(self.target.numel(), dtype=torch.int)


@dataclass
class StepLoss:
    """PRM: binary cross-entropy at the end of every step."""

    steps: StepIndex
    label: Tensor

    def __call__(self, model: LMM, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of losses, number of steps) on the last stage."""
        if not self.label.numel():
            nothing = sum((parameter.sum() * 0.0 for parameter in model.score_parameters()), hidden.sum() * 0.0)
            return nothing, torch.tensor(0, dtype=torch.int)
        logits = model.step_logits(hidden, self.steps)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, self.label, reduction="sum")
        return loss, torch.tensor(self.label.numel(), dtype=torch.int)


@dataclass
class Microbatch:
    """One forward and backward pass of one rank."""

    packed: PackedBatch
    loss: TokenLoss | StepLoss


def split_into_steps(
    groups: Sequence[TrainGroup], batch_size: int, seed_parts: tuple[object, ...]
) -> list[list[TrainGroup]]:
    """Shuffle groups and cut them into optimizer steps of about ``batch_size`` responses.

    The order depends on the seed parts and the query ids alone. The number of steps is the responses' count over the
    batch size, rounded (at least one), and all steps are nearly equal: no small last batch with a large influence.
    """
    if not groups:
        return []
    order = sorted(groups, key=lambda group: key_of(*seed_parts, group.query.id))
    total = sum(len(group.responses) for group in order)
    steps = max(1, round(total / batch_size))
    batches: list[list[TrainGroup]] = [[] for _ in range(steps)]
    seen = 0
    for group in order:
        batches[min(steps - 1, seen * steps // total)].append(group)
        seen += len(group.responses)
    return [batch for batch in batches if batch]


def microbatches(
    groups: Sequence[TrainGroup],
    prompt_of: Callable[[Query], Prompt],
    max_tokens: int,
    multiple: int,
    regimes: Regimes | None = None,
) -> list[Microbatch]:
    """Cut one rank's share of a step into packed microbatches of at most ``max_tokens`` tokens (one group at least)."""
    prompts = [prompt_of(group.query) for group in groups]
    sizes = [len(p.tokens) + sum(map(len, g.responses)) for p, g in zip(prompts, groups, strict=True)]
    # Neighbours of like length waste less padding inside attention.
    order = sorted(range(len(groups)), key=lambda i: (sizes[i], i))
    cuts: list[list[int]] = []
    room = 0
    for i in order:
        if not cuts or room < sizes[i]:
            cuts.append([])
            room = max_tokens
        cuts[-1].append(i)
        room -= sizes[i]
    return [_microbatch([groups[i] for i in cut], [prompts[i] for i in cut], multiple, regimes) for cut in cuts]


def _microbatch(groups: list[TrainGroup], prompts: list[Prompt], multiple: int, regimes: Regimes | None) -> Microbatch:
    responses = [group.responses for group in groups]
    packed = pack(prompts, responses, multiple, regimes)
    if groups[0].step_ends is None:
        return Microbatch(packed, TokenLoss(*next_token_targets(packed, responses)))
    steps = step_index(packed, responses, [group.step_ends or [] for group in groups])
    label = [label for group in groups for labels in group.step_labels or [] for label in labels]
    return Microbatch(packed, StepLoss(steps, torch.tensor(label)))
