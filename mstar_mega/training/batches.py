"""What the trainer consumes: queries with the responses to learn from, cut into steps and microbatches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import groupby
from typing import overload

import numpy as np
import torch
from torch import Tensor

from mstar_mega.config import LossMean, OptimizerConfig
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
from mstar_mega.platform.devices import to_device


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
    weights: list[float] | None = None
    """What each response counts in the loss; below 0 it is made less likely. None: 1 for each."""

    def only(self, numbers: Sequence[int]) -> TrainGroup:
        """The same query with the responses at these places."""
        if len(numbers) == len(self.responses) and list(numbers) == list(range(len(numbers))):
            return self
        ends = self.step_ends and [self.step_ends[i] for i in numbers]
        labels = self.step_labels and [self.step_labels[i] for i in numbers]
        weights = self.weights and [self.weights[i] for i in numbers]
        return TrainGroup(self.query, [self.responses[i] for i in numbers], ends, labels, weights)


@dataclass
class TokenLoss:
    """SFT: negative log-likelihood of the response tokens."""

    source: Tensor
    target: Tensor
    weight: Tensor | None
    """float32, of each token; None: 1."""
    count: int
    """What the sum of losses is divided by, together with that of the batch's other microbatches."""

    def __call__(self, model: LMM, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted sum of losses, ``count``) on the last stage."""
        if not self.source.numel():
            return model.no_loss(hidden), hidden.new_zeros((), dtype=torch.int)
        loss = model.token_loss(hidden[self.source], self.target, self.weight)
        return loss, hidden.new_full((), self.count, dtype=torch.int)

    @property
    def tokens(self) -> int:
        """Counted tokens."""
        return self.target.numel()


@dataclass
class StepLoss:
    """PRM: binary cross-entropy at the end of every step."""

    steps: StepIndex
    label: Tensor
    weight: Tensor | None
    """float32, of each step; None: 1."""
    count: int
    """As in :class:`TokenLoss`."""

    def __call__(self, model: LMM, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted sum of losses, ``count``) on the last stage."""
        if not self.label.numel():
            return model.no_loss(hidden), hidden.new_zeros((), dtype=torch.int)
        logits = model.step_logits(hidden, self.steps)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        loss = entropy(logits, self.label, self.weight, reduction="sum")
        return loss, hidden.new_full((), self.count, dtype=torch.int)

    @property
    def tokens(self) -> int:
        """Counted steps."""
        return self.label.numel()


@dataclass
class Microbatch:
    """One forward and backward pass of one rank."""

    packed: PackedBatch
    loss: TokenLoss | StepLoss
    tokens: int
    """Of prompts and responses, without padding."""


@dataclass(frozen=True)
class Examples:
    """What a stage trains on. Of each group its query's id and its size are in memory, and what ``read`` keeps."""

    ids: Sequence[str]
    sizes: Sequence[int]
    """Responses of each group."""
    read: Callable[[int], TrainGroup]
    """The group at a position, from where it lies."""
    tokens: Sequence[int] | None = None
    """About how many tokens a group with all its responses has, prompt included; None: nobody knows. It says how a
    step's work is shared out, and changes no result."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [groups]: responses are numbered group after group; one past each group's last."""
        return np.cumsum(np.asarray(self.sizes, np.int64), dtype=np.int64)

    @property
    def responses(self) -> int:
        return int(self.ends[-1]) if len(self.ids) else 0

    @staticmethod
    def of(groups: Sequence[TrainGroup]) -> Examples:
        """Groups that are in memory."""
        return Examples([g.query.id for g in groups], [len(g.responses) for g in groups], groups.__getitem__)


class Batch(Sequence[TrainGroup]):
    """The responses of one optimizer step, those of a query together, whose image and prompt they share.

    A group is read when it is first asked for and kept as long as the batch is.
    """

    def __init__(self, examples: Examples, numbers: np.ndarray) -> None:
        self._examples = examples
        self.responses = len(numbers)
        owners = np.searchsorted(examples.ends, numbers, side="right")
        members: dict[int, list[int]] = {}
        for owner, number in zip(owners.tolist(), numbers.tolist(), strict=True):
            members.setdefault(owner, []).append(number - int(examples.ends[owner]) + examples.sizes[owner])
        self._members = [(owner, sorted(of_group)) for owner, of_group in members.items()]
        self._read: dict[int, TrainGroup] = {}

    @property
    def costs(self) -> list[int]:
        """About how much work each group is; nothing is read for it."""
        if self._examples.tokens is None:
            return [len(numbers) for _, numbers in self._members]
        return [self._examples.tokens[owner] for owner, _ in self._members]

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, place: int) -> TrainGroup: ...
    @overload
    def __getitem__(self, place: slice) -> list[TrainGroup]: ...
    def __getitem__(self, place: int | slice) -> TrainGroup | list[TrainGroup]:
        """One group, or those of a stretch; the others are not read."""
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        owner, numbers = self._members[place]
        if owner not in self._read:
            self._read[owner] = self._examples.read(owner).only(numbers)
        return self._read[owner]


class Batches(Sequence[Batch]):
    """Optimizer steps in order: 8 bytes a response in memory. Every batch that is asked for is formed anew."""

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


def dealt(costs: Sequence[int], shares: int) -> list[list[int]]:
    """Items by their costs over so many shares, the largest first and each to the share that has least so far.

    Returns each share's items, ascending.
    """
    found: list[list[int]] = [[] for _ in range(shares)]
    least = [(0, share) for share in range(shares)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, share = heappop(least)
        found[share].append(item)
        heappush(least, (cost + costs[item], share))
    return [sorted(items) for items in found]


def split_into_epochs(
    examples: Examples, settings: OptimizerConfig, epochs: float, seed_parts: tuple[object, ...]
) -> Batches:
    """The steps of all epochs, each in an order of its own (:func:`split_into_steps`); a fraction is cut short."""
    steps: list[np.ndarray] = []
    for epoch in range(math.ceil(epochs)):
        cut = split_into_steps(examples, settings, (*seed_parts, epoch))
        steps += cut[: math.ceil(len(cut) * min(1.0, epochs - epoch) - 1e-9)]
    return Batches(examples, steps)


def split_into_steps(examples: Examples, settings: OptimizerConfig, seed_parts: tuple[object, ...]) -> list[np.ndarray]:
    """Shuffle responses and cut them into optimizer steps of about ``batch_size``: numbers, int64 [responses] each.

    ``settings.shuffle`` says whether each response finds its step by itself or follows its query's others. The order
    depends on the seed parts and the query ids alone. The number of steps is the responses' count over the batch size,
    rounded (at least one), and all steps are nearly equal: no small last batch with a large influence.
    """
    total = examples.responses
    if not total:
        return []
    steps = max(1, round(total / settings.batch_size))
    sizes, together = np.asarray(examples.sizes, np.int64), settings.shuffle == "queries"
    names = _names(examples.ids, None if together else examples.sizes)
    keys = np.fromiter((key_of(*seed_parts, *name) for name in names), np.int64)
    order = np.argsort(keys, kind="stable")
    if not together:
        step_of = np.arange(total) * steps // total
        return np.split(order, np.flatnonzero(np.diff(step_of)) + 1)
    seen = np.cumsum(sizes[order]) - sizes[order]
    step_of = np.minimum(steps - 1, seen * steps // total)
    parts = np.split(order, np.flatnonzero(np.diff(step_of)) + 1)
    return [np.concatenate([np.arange(examples.ends[i] - sizes[i], examples.ends[i]) for i in part]) for part in parts]


def _names(ids: Sequence[str], sizes: Sequence[int] | None) -> Iterator[tuple[object, ...]]:
    """What is shuffled: queries, or with ``sizes`` each of their responses."""
    if sizes is None:
        return ((id,) for id in ids)
    return ((id, number) for id, size in zip(ids, sizes, strict=True) for number in range(size))


def microbatches(
    groups: Sequence[TrainGroup],
    prompt_of: Callable[[Query], Prompt],
    settings: OptimizerConfig,
    multiple: int,
    regimes: Regimes | None = None,
    device: torch.device | None = None,
    unpadded: bool = False,
) -> list[Microbatch]:
    """Cut one rank's share of a step into packed microbatches of at most ``microbatch_tokens`` tokens.

    A query's responses that do not fit together are divided, each part behind a prompt of its own: the same loss and
    gradients. Only a prompt with a single response may be longer than the bound. Others: see :func:`pack`.
    """
    parts = [
        (part, prompt)
        for group in groups
        for prompt in [prompt_of(group.query)]
        for part in _divided(group, len(prompt.tokens), settings.microbatch_tokens, regimes)
    ]
    sizes = [_size(*part) for part in parts]
    # Neighbours of like length waste less padding inside attention.
    order = sorted(range(len(parts)), key=lambda i: (sizes[i], i))
    cuts = cut_by_size(order, sizes.__getitem__, settings.microbatch_tokens)
    return [
        _microbatch([parts[i] for i in cut], settings.loss_mean, multiple, regimes, device, unpadded) for cut in cuts
    ]


def _size(group: TrainGroup, prompt: Prompt) -> int:
    """Tokens of the prompt and all responses."""
    return len(prompt.tokens) + sum(map(len, group.responses))


def _divided(group: TrainGroup, prompt: int, limit: int, regimes: Regimes | None) -> Iterator[TrainGroup]:
    """A group in parts of at most ``limit`` tokens, the prompt's included; in none of them does it stand twice."""

    def regime(i: int) -> int:
        return regimes(prompt + len(group.responses[i])) if regimes else 0

    for _, alike in groupby(sorted(range(len(group.responses)), key=regime), key=regime):
        for part in cut_by_size(alike, lambda i: len(group.responses[i]), limit - prompt):
            yield group.only(part)


def _microbatch(
    parts: Sequence[tuple[TrainGroup, Prompt]], loss_mean: LossMean, multiple: int, regimes: Regimes | None,
    device: torch.device | None, unpadded: bool,
) -> Microbatch:  # fmt: skip
    groups = [group for group, _ in parts]
    responses = [group.responses for group in groups]
    packed = pack([prompt for _, prompt in parts], responses, multiple, regimes, device=device, unpadded=unpadded)
    tokens = sum(_size(group, prompt) for group, prompt in parts)
    own = None
    if any(group.weights is not None for group in groups):
        own = [weight for group in groups for weight in group.weights or [1.0] * len(group.responses)]
    if groups[0].step_ends is None:
        counts = [len(response) for of_group in responses for response in of_group]
        weight, count = _weights(counts, loss_mean, own, packed.tokens.device)
        return Microbatch(packed, TokenLoss(*next_token_targets(packed, responses), weight, count), tokens)
    steps = step_index(packed, responses, [group.step_ends or [] for group in groups])
    labels = [labels for group in groups for labels in group.step_labels or []]
    where = packed.tokens.device
    weight, count = _weights([len(of_response) for of_response in labels], loss_mean, own, where)
    label = to_device([label for of_response in labels for label in of_response], where, torch.float32)
    return Microbatch(packed, StepLoss(steps, label, weight, count), tokens)


def _weights(
    counts: Sequence[int], loss_mean: LossMean, own: Sequence[float] | None, device: torch.device
) -> tuple[Tensor | None, int]:
    """Weight of each token or step of responses that have so many, and what their weighted sum is divided by.

    ``own``: the responses' weights. What is divided by does not depend on them: with negative ones among them their sum
    may be 0.
    """
    if loss_mean == "token" and own is None:
        return None, sum(counts)
    by_token = loss_mean == "token"
    own = own or [1.0] * len(counts)
    weights = [
        weight / (1 if by_token else count) for count, weight in zip(counts, own, strict=True) for _ in range(count)
    ]
    divisor = sum(counts) if by_token else sum(count > 0 for count in counts)
    return to_device(weights, device, torch.float32) if weights else None, divisor
