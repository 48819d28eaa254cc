"""What the trainer consumes: queries with the responses to learn from, cut into steps and microbatches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from mstar_mega.data.types import Query
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import (
    PackedBatch,
    Prompt,
    Regimes,
    StepIndex,
    cut_by_size,
    next_token_targets,
    pack,
    step_index,
)


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


@dataclass(frozen=True)
class Examples:
    """What a stage trains on. Of each group its query's id and its size are in memory, and what ``read`` keeps."""

    ids: Sequence[str]
    sizes: Sequence[int]
    """Responses of each group."""
    read: Callable[[int], TrainGroup]
    """The group at a position, from where it lies."""

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def of(groups: Sequence[TrainGroup]) -> Examples:
        """Groups that are in memory."""
        return Examples([g.query.id for g in groups], [len(g.responses) for g in groups], groups.__getitem__)


class Batch(Sequence[TrainGroup]):
    """The groups of one optimizer step, each read when it is first asked for and kept as long as the batch is."""

    def __init__(self, examples: Examples, positions: np.ndarray) -> None:
        self._examples, self._positions = examples, positions
        self._read: dict[int, TrainGroup] = {}

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, place: int) -> TrainGroup: ...
    @overload
    def __getitem__(self, place: slice) -> list[TrainGroup]: ...
    def __getitem__(self, place: int | slice) -> TrainGroup | list[TrainGroup]:
        """One group, or those of a stretch; the others are not read."""
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        position = int(self._positions[place])
        if position not in self._read:
            self._read[position] = self._examples.read(position)
        return self._read[position]

    @property
    def responses(self) -> int:
        """Responses of all groups, without reading any."""
        return sum(self._examples.sizes[int(position)] for position in self._positions)


class Batches(Sequence[Batch]):
    """Optimizer steps in order: 8 bytes a group in memory. Every batch that is asked for is formed anew."""

    def __init__(self, examples: Examples, steps: Sequence[np.ndarray]) -> None:
        self._examples, self._steps = examples, steps

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, step: int) -> Batch: ...
    @overload
    def __getitem__(self, step: slice) -> Batches: ...
    def __getitem__(self, step: int | slice) -> Batch | Batches:
        """One step's batch, or a stretch of steps."""
        if isinstance(step, slice):
            return Batches(self._examples, self._steps[step])
        return Batch(self._examples, self._steps[step])


def split_into_epochs(examples: Examples, batch_size: int, epochs: float, seed_parts: tuple[object, ...]) -> Batches:
    """The steps of all epochs, each in an order of its own (:func:`split_into_steps`); a fraction is cut short."""
    steps: list[np.ndarray] = []
    for epoch in range(math.ceil(epochs)):
        cut = split_into_steps(examples, batch_size, (*seed_parts, epoch))
        steps += cut[: math.ceil(len(cut) * min(1.0, epochs - epoch) - 1e-9)]
    return Batches(examples, steps)


def split_into_steps(examples: Examples, batch_size: int, seed_parts: tuple[object, ...]) -> list[np.ndarray]:
    """Shuffle examples and cut them into optimizer steps of about ``batch_size`` responses: positions, int64 [groups].

    The order depends on the seed parts and the query ids alone. The number of steps is the responses' count over the
    batch size, rounded (at least one), and all steps are nearly equal: no small last batch with a large influence.
    """
    if not len(examples):
        return []
    keys = np.fromiter((key_of(*seed_parts, id) for id in examples.ids), np.int64, len(examples))
    order = np.argsort(keys, kind="stable")
    sizes = np.asarray(examples.sizes, np.int64)[order]
    total = int(sizes.sum())
    steps = max(1, round(total / batch_size))
    seen = np.cumsum(sizes) - sizes
    step_of = np.minimum(steps - 1, seen * steps // total)
    return np.split(order, np.flatnonzero(np.diff(step_of)) + 1)


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
    cuts = cut_by_size(order, sizes.__getitem__, max_tokens)
    return [_microbatch([groups[i] for i in cut], [prompts[i] for i in cut], multiple, regimes) for cut in cuts]


def _microbatch(groups: list[TrainGroup], prompts: list[Prompt], multiple: int, regimes: Regimes | None) -> Microbatch:
    responses = [group.responses for group in groups]
    packed = pack(prompts, responses, multiple, regimes)
    if groups[0].step_ends is None:
        return Microbatch(packed, TokenLoss(*next_token_targets(packed, responses)))
    steps = step_index(packed, responses, [group.step_ends or [] for group in groups])
    label = [label for group in groups for labels in group.step_labels or [] for label in labels]
    return Microbatch(packed, StepLoss(steps, torch.tensor(label)))
