"""Queries whose prompt is too long for the settings: found before anything is sampled, left out and named.

A token is at least one byte, so the sizes in the index tell which rows may be too long; only those are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from mstar_mega.config import Config
from mstar_mega.data.disk import LISTED, DiskAnswers, DiskExamples, DiskQueries, Extent, refuse_unusable
from mstar_mega.data.order import Without
from mstar_mega.data.types import Query, Skipped, Task

TEMPLATE_BYTES = 1024
"""More than hint, headings and instruction of a template add to a row's own text."""


class Measure(Protocol):
    """What is needed of a policy family."""

    def prompt_length(self, question: str, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of the prompt of a question about images of these (width, height)."""

    def response_tokens(self, text: str) -> list[int]:
        """Tokens of a written-out response."""


@dataclass(frozen=True)
class Limits:
    """How long prompts, and prompts with a written-out response, may be."""

    prompt: int
    example: int
    why: str
    """Where the prompts' limit comes from."""


@dataclass(frozen=True)
class TooLong:
    """A row that is left out."""

    extent: Extent
    tokens: int
    reason: str


def limits_of(config: Config, context: int | None) -> Limits:
    """The limits of the settings for a model of that context (tokens of a sequence; None: any).

    Raises ValueError where the responses alone fill the context.
    """
    most, new = config.data.max_prompt_tokens, config.generation.max_new_tokens
    if context is not None and context <= new:
        raise ValueError(
            f"generation.max_new_tokens is {new}, and the model's context has {context} tokens: nothing is left for a "
            "prompt, use less"
        )
    if context is None or most + new <= context:
        return Limits(most, most + new, "data.max_prompt_tokens")
    return Limits(context - new, context, f"the model's context of {context} less generation.max_new_tokens, {new}")


def too_long(rows: DiskQueries | DiskExamples | DiskAnswers, measure: Measure, limits: Limits) -> Iterator[TooLong]:
    """The rows beyond the limits, in order."""

    @lru_cache(maxsize=4096)
    def around(sizes: tuple[tuple[int, int], ...]) -> int:
        return measure.prompt_length("", sizes) + TEMPLATE_BYTES

    for extent in rows.extents():
        most = around(extent.sizes) + extent.bytes
        if most <= limits.prompt and most + extent.response_bytes <= limits.example:
            continue
        found = rows[extent.position]
        query, response = (found, None) if isinstance(found, Query) else found
        prompt = measure.prompt_length(query.question, extent.sizes)
        if prompt > limits.prompt:
            yield TooLong(extent, prompt, f"prompt: it has {prompt} tokens, more than {limits.prompt} ({limits.why})")
        elif response is not None and (both := prompt + len(measure.response_tokens(response))) > limits.example:
            yield TooLong(extent, both, f"response: it has {both} tokens with its prompt, more than {limits.example}")


def without_too_long(task: Task, measure: Measure, config: Config, context: int | None) -> Task:
    """The task without queries and examples that are too long; they are in its ``skipped``. Sets in memory stay.

    Raises ValueError for the first where ``data.bad_rows`` refuses unusable rows, and as :func:`limits_of`.
    """
    on_disk = (DiskQueries, DiskExamples, DiskAnswers)
    sets = {
        name: rows
        for name in ("warmup", "labelled", "unlabelled", "validation", "test")
        if isinstance(rows := getattr(task, name), on_disk)
    }
    if not sets:
        return task
    limits = limits_of(config, context)
    kept: dict[str, Any] = {}
    skipped: list[Skipped] = []
    for name, rows in sets.items():
        found = list(too_long(rows, measure, limits))
        if not found:
            continue
        kept[name] = Without(rows, [each.extent.position for each in found])
        file = str(config.data.warmup_file if name == "warmup" else config.data.path)
        what = "the example of row" if name == "warmup" else "row"
        named = [Skipped(f"{what} {each.extent.number} (id {each.extent.id})", file, each.reason) for each in found]
        skipped += named[:LISTED]
        if len(named) > LISTED:
            skipped.append(Skipped(f"{len(named) - LISTED} further rows", file, "prompt or response: it is too long"))
    refuse_unusable(config.data, skipped)
    return replace(task, **kept, skipped=[*task.skipped, *skipped])
