"""The report's plots of the sampling temperature: what was chosen, by which curve, and what each temperature offers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mstar_mega.report.drawing import (
    GRID,
    INK,
    MUTED,
    SERIES,
    SURFACE,
    Plot,
    error_bars,
    iterations_plot,
    legend,
    ramp,
    svg_of,
    whole_ticks,
)
from mstar_mega.report.metrics import latest_per_iteration, number
from mstar_mega.report.run import Run
from mstar_mega.report.summary import at_most, share_error
from mstar_mega.report.sweep import sweep_criterion, sweep_points, sweep_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SWEEPS_WITH_ERRORS = 3
"""Sweeps that all show their errors; of more the first and the last do."""
MOST_TEMPERATURES = 5
"""Of the sweeps' grid that have a line of their own."""
MOST_SWEEPS_IN_WORDS = 6
"""Newest sweeps that the caption tells of."""


def temperature_plot(run: Run) -> Plot | None:
    """Sampling temperature of each iteration, and which others its sweep cannot tell from it."""
    points = latest_per_iteration(run.of("generation"), "temperature")
    if not points:
        return None
    as_good = {}
    for sweep in run.of("temperature"):
        alike = [point.temperature for point in sweep_points(sweep) if point.is_as_good_as_chosen]
        if len(alike) > 1:
            as_good[int(number(sweep, "iteration") or 0)] = alike

    def draw(axes: Axes) -> None:
        x, y = list(points), list(points.values())
        for i, alike in as_good.items():
            axes.plot([i] * len(alike), alike, "-", color=GRID, linewidth=7, solid_capstyle="butt")
            axes.plot([i] * len(alike), alike, "_", color=MUTED, markersize=7)
        axes.step(x, y, where="mid", color=SERIES[0], alpha=0.45)
        axes.plot(x, y, "o", color=SERIES[0])
        for i, value in points.items() if len(points) <= 12 else ():
            axes.annotate(f"{value:g}", (i, value), (0, 7), textcoords="offset points", ha="center", color=INK)
        everything = [*y, *(value for alike in as_good.values() for value in alike)]
        axes.set(xlabel="iteration", ylabel="sampling temperature", ylim=(min(everything) - 0.2, max(everything) + 0.2))
        whole_ticks(axes, x)

    caption = "Temperature at which each iteration's responses were sampled."
    if as_good:
        caption += (
            " Dashes on gray: those of a sweep's temperatures that it cannot tell from the chosen one, at most two "
            "standard errors of the paired difference below it."
        )
    described = ", ".join(f"{value:g} in iteration {i}" for i, value in points.items())
    return Plot("temperature", "Temperature", caption, svg_of("temperature", draw), described)


def sweep_plot(run: Run) -> Plot | None:
    """The sweeps' criterion over temperature with paired standard errors, a curve per sweep."""
    sweeps = [event for event in run.of("temperature") if sweep_points(event)]
    if not sweeps:
        return None
    name = sweep_criterion(sweeps[-1])
    beside = any(point.random is not None for point in sweep_points(sweeps[-1]))

    def draw(axes: Axes) -> None:
        for index, sweep in enumerate(sweeps):
            color, label = ramp(index, len(sweeps)), f"it. {sweep.get('iteration')}"
            points = sorted(sweep_points(sweep), key=lambda point: point.temperature)
            x, y = [point.temperature for point in points], [100 * point.value for point in points]
            axes.plot(x, y, color=color, label=label)
            if len(sweeps) <= MOST_SWEEPS_WITH_ERRORS or index in (0, len(sweeps) - 1):
                spread = [100 * (point.error or 0.0) for point in points]
                error_bars(axes, x, y, spread, color)
            if sweep is sweeps[-1] and beside:
                at_random = [point.random if point.random is not None else math.nan for point in points]
                spread = [100 * (share_error(value, number(sweep, "queries")) or 0.0) for value in at_random]
                shares = [100 * value for value in at_random]
                axes.errorbar(x, shares, spread, color=MUTED, linewidth=0, elinewidth=0.9, capsize=2)
                axes.plot(x, shares, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
            for point in points:
                if point.temperature == number(sweep, "temperature"):
                    place = [point.temperature], [100 * point.value]
                    axes.plot(*place, "o", color=color, markeredgecolor=SURFACE, markersize=8)
        axes.set(xlabel="temperature", ylabel=f"{name} (%)", ylim=(max(0.0, axes.get_ylim()[0]), None))
        legend(axes)

    parts = [
        f"{name} of the validation queries at each temperature, a curve per sweep. Dots: the one chosen. "
        "Bars: ± one standard error of the difference to it, paired over queries"
        + (" (first and last sweep)." if len(sweeps) > MOST_SWEEPS_WITH_ERRORS else ".")
    ]
    if beside:
        parts.append(
            f"Dashed: {sweeps[-1].get('k', 'K')} responses at random, last sweep, ± at most one standard error."
        )
    parts += [f"Iteration {sweep.get('iteration')}: {sweep_words(sweep)}." for sweep in sweeps[-MOST_SWEEPS_IN_WORDS:]]
    described = f"{len(sweeps)} sweeps; the newest: {sweep_words(sweeps[-1])}"
    return Plot("sweep", "Temperature sweeps", " ".join(parts), svg_of("sweep", draw), described)


_BY_TEMPERATURE = {"pass_at_most_k": ("most_k", "Pass"), "reward_pass_at_k": ("k", "Reward-Pass")}


def by_temperature_plot(run: Run, measure: str) -> Plot | None:
    """What several temperatures offer over the iterations (paper, figure 4), as the sweeps found it."""
    k_key, words = _BY_TEMPERATURE[measure]
    found: dict[float, dict[int, float]] = {}
    sweeps = run.of("temperature")
    for sweep in sweeps:
        for row in sweep.get("grid") or []:
            temperature, value = number(row, "temperature"), number(row, measure)
            if temperature is not None and value is not None and math.isfinite(value):
                found.setdefault(temperature, {})[int(number(sweep, "iteration") or 0)] = value
    if not found:
        return None
    grid = sorted(found)
    size = min(MOST_TEMPERATURES, len(grid))
    shown = [grid[round(i * (len(grid) - 1) / max(1, size - 1))] for i in range(size)]
    points = {temperature: dict(sorted(found[temperature].items())) for temperature in shown}
    lines = [(f"{temperature:g}", points[temperature], at_most(points[temperature], sweeps)) for temperature in shown]
    name = f"{words}@{sweeps[-1].get(k_key, 'K')}"
    caption = (
        f"{name} of the validation queries at {'some of ' if len(grid) > size else ''}the sweeps' temperatures, by the "
        "policy that the iteration begins with. Bars: at most one standard error."
    )
    colors = [ramp(index, len(lines)) for index in range(len(lines))]
    title = f"{words}@K by temperature"
    return iterations_plot(f"{measure}_by_temperature", title, caption, f"{name} (%)", lines, colors)
