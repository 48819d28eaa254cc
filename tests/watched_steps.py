"""What a test sees of the scheduler just before each decode step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from mstar_mega.generation.scheduler import Schedule

T = TypeVar("T")


def watched_steps(monkeypatch: pytest.MonkeyPatch, look: Callable[[Schedule], T]) -> list[T]:
    """Grows by what ``look`` returns with each decode step from now on."""
    seen: list[T] = []
    step = Schedule._step

    def spy(self: Schedule) -> None:
        seen.append(look(self))
        step(self)

    monkeypatch.setattr(Schedule, "_step", spy)
    return seen
