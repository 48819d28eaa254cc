"""From prompts and responses to one packed token stream.

Layout of a stream: prompt 1, its responses one after another, prompt 2, its responses, ... then padding up to a
multiple (sequence parallelism). Positions of every response continue its prompt's, so that n responses of a query share
the prompt's keys and values exactly as if each had been run alone. Where rotary positions depend on the length of the
whole sequence (``Rope``), only responses of one regime share a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from mstar_mega.kernels.flash import Spans
from mstar_mega.models.attention import GroupPlan
from mstar_mega.platform.devices import to_device

T = TypeVar("T")


@dataclass
class Prompt:
    """A query as the model reads it."""

    tokens: list[int]
    image_positions: list[int]
    """Where image features replace token embeddings, in feature order. Said by the template, not by token ids."""
    pixels: Tensor | None
    """float32 [pieces, 3, S, S], or None without an image: tiles of the tower's size, or patches of strips."""
    grids: Tensor | None = None
    """int64 [units, numbers]: how the pieces belong together, for families that need to say it. Per image the rows and
    columns of its crops (HD transform); per slice its rows, columns and filled-up length in patches (strips)."""


def prompt_bytes(prompt: Prompt) -> int:
    """About how much memory a prompt takes."""
    pixels = 0 if prompt.pixels is None else prompt.pixels.numel() * prompt.pixels.element_size()
    return pixels + 16 * (len(prompt.tokens) + len(prompt.image_positions)) + 1024


def cut_by_size(items: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Items in their order, in lists whose sizes add up to at most ``limit``; a larger item stands alone.

    An item is asked for only when those of the lists before it are used up.
    """
    part: list[T] = []
    room = limit
    for item in items:
        size = size_of(item)
        if part and size > room:
            yield part
            part, room = [], limit
        part.append(item)
        room -= size
    if part:
        yield part


@dataclass
class PackedBatch:
    """One forward pass."""

    tokens: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    image_index: Tensor
    """int64 [features]: stream positions that image features overwrite."""
    pixels: Tensor | None
    """float32 [pieces, 3, S, S] of all prompts, in order."""
    plan: GroupPlan
    last_prompt: list[int]
    """Stream position of each prompt's last token."""
    response_start: list[list[int]] = field(default_factory=list)
    """Stream position of each response's first token, per group."""
    predictor: list[list[int]] = field(default_factory=list)
    """Stream position of the prompt token that predicts each response's first token, per group."""
    grids: Tensor | None = None
    """int64 [units, numbers] of all prompts, in order."""
    feature_index: Tensor | None = None
    """int64 [features]: which feature goes to each of ``image_index``; None: they are in order."""
    lengths: Tensor | None = None
    """int64 [T]: the length of each token's sequence, where positions turn differently in longer ones."""


Regimes = Callable[[int], int]
"""Sequence length -> regime, see ``Rope``: sequences of different regimes share nothing."""


@dataclass
class _Copy:
    """A prompt in the stream and the responses (group, number) that share it."""

    group: int
    responses: list[tuple[int, int]]
    length: int
    """Of its longest sequence."""


def pack(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Sequence[int]]],
    multiple: int = 1,
    regimes: Regimes | None = None,
    *,
    device: torch.device | None = None,
    align: int = 1,
    unpadded: bool = False,
) -> PackedBatch:
    """Pack groups into one stream.

    Args:
        prompts: G prompts.
        responses: for each prompt, the token ids of its responses (possibly none, possibly empty ones).
        multiple: the stream's length is padded up to a multiple of it.
        regimes: the model's ``rope.regimes``. A prompt whose responses fall into several regimes stands in the stream
            once for each; its images are still encoded once.
        device: where the indices go; None: the host. Pixels stay there until the model reads them.
        align: attention pads prompts and responses to a multiple of it.
        unpadded: attention within prompts is flash-attn's, which takes them without padding.
    """
    copies = _copies(prompts, responses, regimes)
    G = len(copies)
    n = max(len(copy.responses) for copy in copies)
    R = -(-max((len(r) for group in responses for r in group), default=0) // align) * align
    P = -(-max(len(p.tokens) for p in prompts) // align) * align
    prompt_index = torch.zeros(G, P, dtype=torch.int64, device="cpu")
    prompt_allowed = torch.zeros(G, P, dtype=torch.bool, device="cpu")
    response_index = torch.zeros(G, n, R, dtype=torch.int64, device="cpu")
    response_allowed = torch.zeros(G, n, R, dtype=torch.bool, device="cpu")
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    stream_from: list[int] = []
    image_index: list[int] = []
    feature_index: list[int] = []
    first_feature = [0]
    for prompt in prompts:
        first_feature.append(first_feature[-1] + len(prompt.image_positions))
    starts: list[list[int]] = [[0] * len(group) for group in responses]
    predictor: list[list[int]] = [[0] * len(group) for group in responses]
    last_prompt: dict[int, int] = {}
    prompt_lengths = [len(prompts[copy.group].tokens) for copy in copies]
    prompt_rows = [sum(prompt_lengths[:g]) if unpadded else g * P for g in range(G + 1)]
    for g, copy in enumerate(copies):
        prompt = prompts[copy.group]
        length, start = len(prompt.tokens), len(tokens)
        prompt_index[g, :length] = torch.arange(start, start + length, device="cpu")
        prompt_allowed[g, :length] = True
        stream_from += range(prompt_rows[g], prompt_rows[g] + length)
        image_index += [start + p for p in prompt.image_positions]
        feature_index += range(first_feature[copy.group], first_feature[copy.group + 1])
        tokens += prompt.tokens
        positions += range(length)
        last = len(tokens) - 1
        last_prompt.setdefault(copy.group, last)
        for j, (of_group, number) in enumerate(copy.responses):
            response = responses[of_group][number]
            begin = len(tokens)
            starts[of_group][number], predictor[of_group][number] = begin, last
            response_index[g, j, : len(response)] = torch.arange(begin, begin + len(response), device="cpu")
            response_allowed[g, j, : len(response)] = True
            row = prompt_rows[G] + (g * n + j) * R
            stream_from += range(row, row + len(response))
            tokens += response
            positions += range(length, length + len(response))
        lengths += [copy.length] * (len(tokens) - start)
    padding = -len(tokens) % multiple
    tokens += [0] * padding
    positions += [0] * padding
    lengths += [1] * padding
    stream_from += [0] * padding
    pixels = [p.pixels for p in prompts if p.pixels is not None]
    grids = [p.grids for p in prompts if p.grids is not None]
    where = device or torch.device("cpu")

    def there(numbers: list[int]) -> Tensor:
        return to_device(numbers, where)

    plan = GroupPlan(
        prompt_index.to(where),
        prompt_allowed.to(where),
        response_index.to(where) if R else None,
        response_allowed.to(where) if R else None,
        there(stream_from),
        Spans.of(prompt_lengths, where) if unpadded else None,
        prompt_index[prompt_allowed].to(where) if unpadded else None,
    )
    return PackedBatch(
        there(tokens),
        there(positions),
        there(image_index),
        torch.cat(pixels) if pixels else None,
        plan,
        [last_prompt[g] for g in range(len(prompts))],
        starts,
        predictor,
        torch.cat(grids) if grids else None,
        there(feature_index) if len(copies) > len(prompts) else None,
        there(lengths) if regimes is not None else None,
    )


def _copies(
    prompts: Sequence[Prompt], responses: Sequence[Sequence[Sequence[int]]], regimes: Regimes | None
) -> list[_Copy]:
    """Which prompts the stream holds, in order: one of each, or one for each regime of its responses."""
    copies: list[_Copy] = []
    for g, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        by_regime: dict[int, _Copy] = {}
        for j, response in enumerate(group):
            length = len(prompt.tokens) + len(response)
            copy = by_regime.setdefault(regimes(length) if regimes else 0, _Copy(g, [], length))
            copy.responses.append((g, j))
            copy.length = max(copy.length, length)
        copies += by_regime.values() or [_Copy(g, [], len(prompt.tokens))]
    return copies


@dataclass
class StepIndex:
    """Where the K reasoning steps of a packed stream lie, and its N response tokens with what predicts them."""

    position: Tensor
    """int64 [K]: stream position of each step's last token."""
    source: Tensor
    """int64 [N]: the stream position that predicts each response token."""
    target: Tensor
    """int64 [N]: the response tokens."""
    response: Tensor
    """int64 [K]: index into ``target`` of the first token of the step's response."""
    start: Tensor
    """int64 [K]: index into ``target`` of the step's first token."""
    end: Tensor
    """int64 [K]: one past the step's last token."""


def step_index(
    batch: PackedBatch, responses: Sequence[Sequence[Sequence[int]]], ends: Sequence[Sequence[Sequence[int]]]
) -> StepIndex:
    """The steps of packed responses. ``ends``: per group and response, the index one past each step's last token."""
    rows: list[tuple[int, int, int, int]] = []
    first = 0
    for starts, group, ends_of_group in zip(batch.response_start, responses, ends, strict=True):
        for stream, response, ends_of_response in zip(starts, group, ends_of_group, strict=True):
            for begin, stop in zip([0, *ends_of_response], ends_of_response, strict=False):
                rows.append((stream + stop - 1, first, first + begin, first + stop))
            first += len(response)
    columns = list(zip(*rows, strict=True)) or [()] * 4
    position, of_response, start, end = to_device(columns, batch.tokens.device).unbind(0)
    source, target = next_token_targets(batch, responses)
    return StepIndex(position, source, target, of_response, start, end)


def next_token_targets(batch: PackedBatch, responses: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Which stream position predicts which response token.

    Returns:
        (source int64 [K], target int64 [K]), responses in order; a response's first token is predicted by its prompt's
        last one, so that position occurs once per response.
    """
    source: list[int] = []
    target: list[int] = []
    for predictor, starts, group in zip(batch.predictor, batch.response_start, responses, strict=True):
        for last, start, response in zip(predictor, starts, group, strict=True):
            if response:
                source += [last, *range(start, start + len(response) - 1)]
                target += response
    found = to_device([source, target], batch.tokens.device)
    return found[0], found[1]
