"""The few dataclasses that flow through every stage and are what is written to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from pydantic import ConfigDict

_NOTHING_ELSE = ConfigDict(extra="forbid")
"""A field that is read from a file and not known would be lost with the next writing."""


@dataclass(frozen=True)
class ImageRef:
    """An image by reference: pixels are decoded where they are needed and never copied between processes."""

    __pydantic_config__ = _NOTHING_ELSE

    path: str
    digest: str
    """First 16 hexadecimal digits of the SHA-256 of the file's bytes."""


def image_digest(content: bytes) -> str:
    """``ImageRef.digest`` of a file's bytes."""
    return sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class Query:
    """A question about images: the unit of work of every stage."""

    __pydantic_config__ = _NOTHING_ELSE

    id: str
    question: str
    """The question as the model sees it, choices included (``A. ...`` lines)."""
    images: tuple[ImageRef, ...]
    answer: str | None
    """Gold answer; None where it is hidden (unlabelled prompts)."""
    choices: tuple[str, ...] = ()
    """Texts of the choices, A's first; empty for free-form questions. The answer of a multiple-choice query is a
    letter; a benchmark's letter without an option has an empty text."""
    kind: str = ""
    """Question type, for breakdowns."""
    hidden_answer: str | None = None
    """The answer of an unlabelled query, read by nothing but the oracle setting."""


@dataclass(frozen=True)
class Skipped:
    """One query, or row of a file, that is left out, as the event ``skipped`` tells it."""

    what: str
    """``query ID`` and the set it belongs to, or the row."""
    where: str
    """The image file, the field of the query, or the file that the row stands in."""
    reason: str


CheckReasoning = Callable[[str, str], bool | None]
"""(query id, response text) -> whether its reasoning is right; None where that cannot be told."""


@dataclass(frozen=True)
class Task:
    """All queries of a run. A set is a sequence and need not be in memory: it may read each query when it is asked."""

    warmup: Sequence[tuple[Query, str]]
    """Each query with its written-out chain of thought."""
    labelled: Sequence[Query]
    unlabelled: Sequence[Query]
    """Their answers are hidden from training."""
    validation: Sequence[Query]
    test: Sequence[Query]
    skipped: Sequence[Skipped] = ()
    """What was left out of the sets, and why."""
    cut: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Settings that leave a part of a set out: how many are used, of how many."""
    check_reasoning: CheckReasoning | None = None
    """For measurement only: nothing that trains or selects asks it but ``selection.rule right_reasoning``, the ceiling
    that methods are compared with. Rank 0 sends it to the others, so it can be pickled (a function of a
    module or a callable dataclass, no closure). None: the set cannot tell."""


@dataclass
class Step:
    """One reasoning step of a response: tokens [start, end) of ``Response.tokens``, its separator included."""

    __pydantic_config__ = _NOTHING_ELSE

    start: int
    end: int
    text: str
    score: float | None = None
    """Process score in [0, 1] from the PRM."""
    label: float | None = None
    """Monte-Carlo label: the share of continuations from this step's end that reach the gold answer."""


@dataclass
class Response:
    """One sampled response of a query."""

    __pydantic_config__ = _NOTHING_ELSE

    index: int
    """Sample index within the query; with the query id it names the random numbers."""
    tokens: list[int]
    """Token ids, the stop token included when one was sampled."""
    text: str
    log_probs: list[float] = field(default_factory=list)
    """Per token, at the sampling temperature over the whole vocabulary (natural log)."""
    truncated: bool = False
    """True when the length limit ended it."""
    answer: str | None = None
    """Extracted final answer; None when there is no answer block."""
    correct: bool | None = None
    verdict: str | None = None
    """How the answer was judged: exact, numeric, choice, symbolic; none, timeout or error where it is not correct;
    function where ``reward.function`` is the user's own."""
    steps: list[Step] = field(default_factory=list)
    score: float | None = None
    """Process score of the whole response (``prm.reduction`` over its steps)."""
    selected: bool = False
    reward: float | None = None
    """From 0 to 1, where ``reward.function`` is the user's own."""


@dataclass
class Group:
    """A query with its responses."""

    __pydantic_config__ = _NOTHING_ELSE

    query: Query
    responses: list[Response]
    continuation_tokens: int = 0
    """Annotation: tokens drawn to continue beginnings of the responses."""
