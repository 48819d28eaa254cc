"""Weight maps: which Hugging Face tensors become which of our parameters, and the same bytes back.

A map is a list of :class:`Mapping`, one for every parameter of the whole model (not cut over ranks, layers numbered
over all pipeline stages, as ``canonical_name`` writes them). Every source tensor stands in exactly one mapping. All
functions only move values: the dtype is kept, and ``to_hf(to_ours(x))`` is ``x``, byte for byte.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

Layout = Literal["replicated", "column", "row", "gated"]
"""How a parameter is cut over tensor ranks: not at all; along dimension 0; along dimension 1; or gate and up rows
([gate; up] when whole) each cut along dimension 0 and stacked again per rank, which is megatron's gated MLP."""

Head = Literal["vocabulary", "linear", "likelihood"]
"""What the trunk ends in: the policy's vocabulary head, or one of the PRM's two score heads (see ``LMM.step_logits``).
"""


@dataclass(frozen=True)
class Source:
    """A tensor of the Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]


class Transform(Protocol):
    """A rearrangement of whole tensors that loses nothing."""

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def to_hf(self, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Stacked:
    """One tensor as it is, or several one above the other (gate above up)."""

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))

    def to_hf(self, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return [tensor] if len(shapes) == 1 else list(tensor.split([shape[0] for shape in shapes]))


@dataclass(frozen=True)
class Interleaved:
    """Blocks [all q, all k, all v], fused or as three tensors -> per key-value head its queries, its key, its value."""

    groups: int
    per_group: int
    """Query heads that share one key-value head."""

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        fused = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        dim = fused.size(0) // (self.groups * (self.per_group + 2))
        rest = fused.shape[1:]
        q, k, v = fused.split([self.groups * self.per_group * dim, self.groups * dim, self.groups * dim])
        parts = [x.reshape(self.groups, -1, dim, *rest) for x in (q, k, v)]
        return torch.cat(parts, dim=1).reshape(fused.shape)

    def to_hf(self, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        grouped = tensor.reshape(self.groups, self.per_group + 2, -1, *tensor.shape[1:])
        q, k, v = grouped.split([self.per_group, 1, 1], dim=1)
        fused = torch.cat([x.flatten(0, 2) for x in (q, k, v)])
        return list(fused.split([shape[0] for shape in shapes]))


@dataclass(frozen=True)
class PaddedRows:
    """Vocabulary rows, padded with zeros up to ``rows``; the padding never goes back."""

    rows: int

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, self.rows - tensors[0].size(0)))

    def to_hf(self, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return [tensor[: shapes[0][0]]]


@dataclass(frozen=True)
class Transposed:
    """A matrix used as x @ w there and as x @ w.T here."""

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].T.contiguous()

    def to_hf(self, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return [tensor.T.contiguous()]


@dataclass(frozen=True)
class Mapping:
    """One of our parameters and the tensors it is made of."""

    name: str
    """Canonical name of the parameter in the whole model."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    sources: tuple[Source, ...]
    layout: Layout = "replicated"
    transform: Transform = field(default_factory=Stacked)

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        """The whole parameter from its sources, in their order. Raises ValueError naming a tensor of another shape."""
        for source, tensor in zip(self.sources, tensors, strict=True):
            if tuple(tensor.shape) != source.shape:
                raise ValueError(f"{source.name} has shape {list(tensor.shape)}, expected {list(source.shape)}")
        ours = self.transform.to_ours(tensors)
        return ours.reshape(self.shape)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """The sources from the whole parameter, contiguous. Raises ValueError if it has another shape."""
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name} has shape {list(tensor.shape)}, expected {list(self.shape)}")
        shapes = [source.shape for source in self.sources]
        parts = self.transform.to_hf(tensor, shapes)
        return [part.reshape(shape).contiguous() for part, shape in zip(parts, shapes, strict=True)]

    def cut(self, whole: Tensor, size: int, rank: int) -> Tensor:
        """This tensor rank's part of the whole parameter."""
        if self.layout == "replicated" or size == 1:
            return whole
        if self.layout == "gated":
            return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
        return whole.chunk(size, dim=0 if self.layout == "column" else 1)[rank]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole parameter from all tensor ranks' parts; the inverse of :meth:`cut`."""
        if self.layout == "replicated" or len(parts) == 1:
            return parts[0]
        if self.layout == "gated":
            return torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
        return torch.cat(list(parts), dim=0 if self.layout == "column" else 1)


def same(ours: str, theirs: str, *shape: int, layout: Layout = "replicated") -> Mapping:
    """A parameter that is stored as it is."""
    return Mapping(ours, shape, (Source(theirs, shape),), layout)


def linear(ours: str, theirs: str, outputs: int, inputs: int, layout: Layout, bias: bool = True) -> list[Mapping]:
    """Weight and bias of a linear layer stored as it is. The bias of a row-cut layer is replicated."""
    weight = same(f"{ours}.weight", f"{theirs}.weight", outputs, inputs, layout=layout)
    of_bias: Layout = "column" if layout == "column" else "replicated"
    return [weight, *([same(f"{ours}.bias", f"{theirs}.bias", outputs, layout=of_bias)] if bias else [])]


def interleaved(ours: str, sources: Sequence[Source], groups: int, per_group: int) -> Mapping:
    """Query, key and value rows, in blocks there and per key-value head here; weights and biases alike."""
    rows = sum(source.shape[0] for source in sources)
    shape = (rows, *sources[0].shape[1:])
    return Mapping(ours, shape, tuple(sources), "column", Interleaved(groups, per_group))


def vocabulary(ours: str, theirs: str, rows: int, padded: int, channels: int) -> Mapping:
    """Embedding or head rows with our padding below."""
    return Mapping(ours, (padded, channels), (Source(theirs, (rows, channels)),), "column", PaddedRows(padded))


def head_of(names: Collection[str]) -> Head:
    """What a checkpoint's model ends in, by the names of its parameters, ours or Hugging Face's."""
    if "likelihood_weights" in names:
        return "likelihood"
    return "linear" if any(name.startswith("score_head") for name in names) else "vocabulary"


def score_heads(hidden: int, head: Head) -> list[Mapping]:
    """What a PRM has besides the policy's trunk. No original has these: the names on both sides are ours."""
    maps = [same("score_head", "score_head.weight", 2, hidden)] if head != "vocabulary" else []
    return maps + ([same("likelihood_weights", "likelihood_weights", 2)] if head == "likelihood" else [])
