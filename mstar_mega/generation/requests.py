"""What the engine is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field

from mstar_mega.models.packing import Prompt


@dataclass(frozen=True)
class SampleSpec:
    """One sample to draw."""

    key: int
    """Names its random numbers; with the position it is the whole source of randomness."""
    draft: int = -1
    """Which of the request's drafts it continues; -1: none."""
    length: int = 0
    """How many of the draft's tokens it keeps."""
    temperature: float | None = None
    """0: greedy; None: the call's."""


@dataclass
class Request:
    """A prompt and the samples wanted of it."""

    prompt: Prompt
    samples: list[SampleSpec]
    drafts: list[list[int]] = field(default_factory=list)
    """Responses whose beginnings are continued (Monte-Carlo rollouts); each is prefilled once."""


@dataclass
class Sample:
    """A drawn continuation."""

    tokens: list[int]
    """Drawn token ids, without the draft's; the stop token included when one was drawn."""
    log_probs: list[float]
    """Per drawn token, at the sampling temperature over the whole vocabulary."""
    truncated: bool
    """The length limit ended it."""
