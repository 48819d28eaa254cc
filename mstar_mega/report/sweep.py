"""What a temperature sweep found, in words and numbers: the chosen temperature, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mstar_mega.report.metrics import Event, number


@dataclass(frozen=True)
class Point:
    """One temperature of a sweep; shares in [0, 1]."""

    temperature: float
    value: float
    """Its criterion."""
    difference: float | None
    """Its criterion minus that of the chosen temperature, paired over queries; None in logs that lack it."""
    error: float | None
    """Standard error of that difference."""
    random: float | None
    """Pass@K of K responses at random, for a sweep by Reward-Pass@K."""

    @property
    def is_as_good_as_chosen(self) -> bool:
        """Whether the sweep cannot tell it from the chosen one: at most two standard errors below it."""
        return self.difference is not None and self.error is not None and self.difference >= -2 * self.error


def sweep_points(event: Event) -> list[Point]:
    """The temperatures of an event ``temperature`` whose criterion is finite, in the grid's order."""
    points = []
    for row in event.get("grid") or []:
        temperature, value = number(row, "temperature"), number(row, _measure(event))
        if temperature is not None and value is not None and math.isfinite(value):
            paired = number(row, "difference"), number(row, "difference_stderr")
            points.append(Point(temperature, value, *paired, number(row, "random_pass_at_k")))
    return points


def sweep_criterion(event: Event) -> str:
    """The name of what the sweep chooses by: Reward-Pass@2."""
    name = "Pass" if _measure(event) == "pass_at_k" else "Reward-Pass"
    return f"{name}@{event.get('k', 'K')}"


def _measure(event: Event) -> str:
    return "pass_at_k" if event.get("mode") == "pass_at_k" else "reward_pass_at_k"


def sweep_words(event: Event) -> str:
    """One sentence: what was chosen, and how far the best of the others and K random responses are from it."""
    chosen = number(event, "temperature")
    points = sweep_points(event)
    of = [point for point in points if point.temperature == chosen]
    if chosen is None or not of:
        return f"temperature {chosen} is chosen"
    words = f"temperature {chosen:g} is chosen by {sweep_criterion(event)}, {100 * of[0].value:.1f}%"
    others = [point for point in points if point.temperature != chosen]
    if others:
        second = max(others, key=lambda point: (point.value, -abs(point.temperature - chosen)))
        ahead = 100 * (of[0].value - second.value)
        error = "" if second.error is None else f" ± {100 * second.error:.1f}"
        words += f"; {ahead:+.1f}{error} points to the best of the others, {second.temperature:g}"
    if of[0].random is not None:
        words += f"; {event.get('k', 'K')} responses at random have {100 * of[0].random:.1f}%"
    return words
