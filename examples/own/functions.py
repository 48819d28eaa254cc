"""The functions that docs/functions.md shows: each can be named by a setting, as in
``--reward.function examples/own/functions.py:close_enough``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mstar_mega.config import DataConfig, SelectionConfig, TemperatureConfig
from mstar_mega.data.digits import task as digits
from mstar_mega.data.types import Group, Query, Response, Task


def close_enough(query: Query, response: Response) -> float:
    """1 for the gold answer, one half for a number within a tenth of it."""
    answer, gold = response.answer or "", query.answer or ""
    if answer.strip().casefold() == gold.strip().casefold():
        return 1.0
    try:
        return 0.5 if abs(float(answer) - float(gold)) <= 0.1 * abs(float(gold)) else 0.0
    except ValueError:
        return 0.0


def shortest(group: Group, settings: SelectionConfig, seed: int) -> list[Response]:
    """The k shortest correct responses."""
    right = [response for response in group.responses if response.correct]
    return sorted(right, key=lambda response: (len(response.tokens), response.index))[: settings.k]


shortest.needs_scores = False  # type: ignore[attr-defined]


def everything(group: Group, settings: SelectionConfig, seed: int) -> list[Response]:
    """All responses that ended by themselves."""
    return [response for response in group.responses if not response.truncated]


everything.needs_scores = False  # type: ignore[attr-defined]


def good_and_bad(query: Query, response: Response) -> float:
    """What is right counts once, what is wrong a quarter, the other way."""
    return 1.0 if response.correct else -0.25


good_and_bad.needs_scores = False  # type: ignore[attr-defined]


def second_worst(scores: Sequence[float]) -> float:
    """One bad step is forgiven."""
    return sorted(scores)[min(1, len(scores) - 1)]


def variety(group: Group, settings: TemperatureConfig) -> float:
    """How many different answers the responses of a query have, as a share."""
    return len({response.answer for response in group.responses}) / len(group.responses)


variety.needs_scores = False  # type: ignore[attr-defined]


def terse(question: str, choices: Mapping[str, str], hint: str, instruct: bool) -> str:
    """The question, choices in one line, and one sentence that asks for steps."""
    listed = " ".join(f"({letter}) {text}" for letter, text in choices.items())
    asked = "Think in short paragraphs, then write '# Answer', a blank line and the answer." if instruct else ""
    return "\n".join(part for part in (question, listed, asked) if part)


def halves(config: DataConfig, directory: Path, seed: int) -> Task:
    """The built-in digits, without the last ten labelled queries."""
    task = digits.build(config, directory, seed)
    return replace(task, labelled=task.labelled[:-10])
