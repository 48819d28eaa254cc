"""What every benchmark's file becomes, and what scoring makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mstar_mega.config import BenchmarkConfig

AnswerType = Literal["letter", "text", "integer", "float", "list"]


@dataclass(frozen=True)
class Picture:
    """An image as the file brings it: bytes inside it, or a path beside it."""

    data: bytes | None = None
    path: str | None = None


@dataclass(frozen=True)
class Problem:
    """One question of a benchmark."""

    id: str
    question: str
    """Without hint and choices, unless ``ready``."""
    options: Mapping[str, str]
    """Text by letter, A first; empty for free-form questions. A letter without an option is left out."""
    answer: str
    """Gold answer as the benchmark compares it: a letter, or (MathVista) the choice's text or the value."""
    answer_type: AnswerType = "letter"
    precision: int | None = None
    """Decimals of a float answer."""
    hint: str = ""
    context: str = ""
    ready: bool = False
    """``question`` holds the whole prompt text, hint and choices included."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The values that this problem counts for, by breakdown."""
    circle: str = ""
    """Problems of one circle are one question asked with rotated options: right only if all are."""
    picture: Picture | None = None
    where: str = ""
    """File and row, for messages."""

    @property
    def choices(self) -> tuple[str, ...]:
        """Text by place, A's first, as ``Query`` has them; empty at the place of a letter without an option."""
        last = max(map(ord, self.options), default=ord("A") - 1)
        return tuple(self.options.get(chr(code), "") for code in range(ord("A"), last + 1))

    @property
    def has_gap(self) -> bool:
        """Whether a letter before the last option's has none."""
        return len(self.choices) != len(self.options)

    @property
    def letter(self) -> str | None:
        """The gold option's letter; None for free-form questions."""
        if self.answer_type == "letter":
            return self.answer
        return next((letter for letter, text in self.options.items() if text == self.answer), None)


Judge = Callable[[Problem, str], str | None]
"""A language model's reading of a response: the extracted answer (a letter, a choice's text or a value), or None. It is
asked only where the rules by name cannot decide, and must be deterministic for scores to be so."""


@dataclass(frozen=True)
class Rules:
    """Which of the rule sets decides, and its options."""

    settings: BenchmarkConfig
    judge: Judge | None = None


@dataclass(frozen=True)
class Reading:
    """What the rules make of one response."""

    extraction: str | None
    prediction: str | None
    """In the form that is compared with the gold answer; None where there is none."""
    correct: bool


@dataclass(frozen=True)
class Tally:
    """Right ones of all."""

    correct: int
    total: int

    def to_json(self) -> dict[str, Any]:
        """``accuracy`` is a share, None of nothing."""
        accuracy = self.correct / self.total if self.total else None
        return {"accuracy": accuracy, "correct": self.correct, "total": self.total}
