"""The plots of the report, in reading order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from mstar_mega.platform.terminal import visible
from mstar_mega.report.drawing import (
    GRID,
    INK,
    MUTED,
    SERIES,
    SURFACE,
    Line,
    Plot,
    iterations_plot,
    legend,
    ramp,
    svg_of,
    whole_ticks,
)
from mstar_mega.report.metrics import Event, latest_per_iteration, number
from mstar_mega.report.progress import clock
from mstar_mega.report.run import Run
from mstar_mega.report.summary import at_most, seconds_by_phase, share_error
from mstar_mega.report.temperature_plots import by_temperature_plot, sweep_plot, temperature_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 300
"""Points of a loss curve; longer ones are averaged into bins."""
MOST_KEPT = 5
"""Responses kept per query that have a bar colour of their own; more share the last one."""
MOST_KINDS = 40
LONGEST_NAME = 32
"""Characters of a name beside a plot."""


def all_plots(run: Run, problems: list[str] | None = None) -> list[Plot]:
    """Every plot that there is data for yet, in reading order.

    One that cannot be drawn is named in ``problems`` and left out; without these its error is raised.
    """
    makers: list[Callable[[Run], Plot | None]] = [
        accuracy_plot, exploration_plot, answering_plot, temperature_plot, sweep_plot,
        *(partial(by_temperature_plot, measure=measure) for measure in ("pass_at_most_k", "reward_pass_at_k")),
        kept_plot, kinds_plot,
        *(partial(loss_plot, stage=stage) for stage in _LOSSES), time_plot,
    ]  # fmt: skip
    plots = []
    for make in makers:
        try:
            plot = make(run)
        except Exception as error:  # whatever matplotlib makes of a run's names and numbers
            if problems is None:
                raise
            made_by = make.func if isinstance(make, partial) else make
            name = getattr(made_by, "__name__", str(made_by)).removesuffix("_plot")
            problems.append(f"the plot '{name}' cannot be drawn ({type(error).__name__}: {error})")
            continue
        plots += [plot] if plot is not None else []
    return plots


def accuracy_plot(run: Run) -> Plot | None:
    """Greedy accuracy per iteration, with standard errors."""
    lines = []
    for split in ("validation", "test"):
        points = latest_per_iteration(run.of("evaluation", split=split), "greedy_accuracy")
        errors = latest_per_iteration(run.of("evaluation", split=split), "standard_error")
        if points:
            lines.append((split, points, {i: errors.get(i, 0.0) for i in points}))
    caption = "Greedy accuracy after each iteration; iteration 0 is the warm-up policy. Bars: ± one standard error."
    return iterations_plot("accuracy", "Accuracy", caption, "greedy accuracy (%)", lines)


def exploration_plot(run: Run) -> Plot | None:
    """Pass@K, Reward-Pass@K and greedy accuracy per iteration."""
    lines: list[Line] = []
    for key, k_key, label in (
        ("pass_at_k", "k", "Pass@"),
        ("reward_pass_at_k", "reward_k", "Reward-Pass@"),
        ("pass_at_reward_k", "reward_k", "Pass@"),
    ):
        events = [event for event in run.of("evaluation", split="validation") if number(event, key) is not None]
        name = f"{label}{events[-1].get(k_key, 'K')}" if events else ""
        if events and name not in [line[0] for line in lines]:
            points = latest_per_iteration(events, key)
            lines.append((name, points, at_most(points, events)))
    every = run.of("evaluation", split="validation")
    greedy = latest_per_iteration(every, "greedy_accuracy")
    if lines and greedy:
        lines.append(("greedy", greedy, at_most(greedy, every)))
    caption = (
        "Share of validation queries with a correct response among K samples at temperature 1 (Pass@K), among the K of "
        "all that the PRM scores highest (Reward-Pass@K; Pass@K of as many is what it has to beat), and of the greedy "
        "response alone: from there to Pass@K is what exploring still offers. Bars: at most one standard error."
    )
    gains = [event for event in run.of("evaluation", split="validation") if number(event, "reward_gain") is not None]
    if gains:
        gain, error = number(gains[-1], "reward_gain") or 0.0, number(gains[-1], "reward_gain_stderr")
        spread = "" if error is None else f" ± {100 * error:.1f}"
        caption += f" Newest: the PRM's choice is {100 * gain:+.1f}{spread} points from random (paired by query)."
    return iterations_plot("exploration", "Exploration", caption, "validation queries (%)", lines)


_WAYS = {
    "greedy_accuracy": "greedy", "majority_vote": "majority", "weighted_vote": "PRM-weighted", "best_of_n": "best",
}  # fmt: skip


def answering_plot(run: Run) -> Plot | None:
    """Accuracy of several ways of choosing one answer from many samples."""
    events = [
        event
        for event in run.of("evaluation", split="validation")
        if any(number(event, key) is not None for key in _WAYS if key != "greedy_accuracy")
    ]
    measured = [(label, latest_per_iteration(events, key)) for key, label in _WAYS.items()]
    lines = [(label, points, at_most(points, events)) for label, points in measured]
    caption = (
        "Accuracy on validation queries when the answer is the greedy one, the majority's, the PRM-weighted "
        "majority's, or that of the response with the best process score. Bars: at most one standard error."
    )
    shown = [line for line in lines if line[1]]
    return iterations_plot("answering", "Ways to answer", caption, "accuracy (%)", shown)


def kept_plot(run: Run) -> Plot | None:
    """Queries by the number of their responses that were kept, stacked per iteration."""
    counts: dict[int, list[float]] = {}
    for event in run.of("selection"):
        row = [0.0] * (MOST_KEPT + 1)
        for kept, queries in (event.get("kept_per_query") or {}).items():
            row[min(int(kept), MOST_KEPT)] += queries
        counts[int(number(event, "iteration") or 0)] = row
    if not any(sum(row) for row in counts.values()):
        return None
    used = [kept for kept in range(MOST_KEPT + 1) if any(row[kept] for row in counts.values())]

    def draw(axes: Axes) -> None:
        x, base = list(counts), [0.0] * len(counts)
        totals = [sum(row) for row in counts.values()]
        for kept in used:
            height = [100 * row[kept] / max(1.0, sum(row)) for row in counts.values()]
            color, edge = (SURFACE, MUTED) if kept == 0 else (ramp(kept - 1, max(used)), SURFACE)
            axes.bar(x, height, 0.7, bottom=base, color=color, edgecolor=edge, linewidth=1.2, label=_kept_name(kept))
            base = [a + b for a, b in zip(base, height, strict=True)]
            if kept != used[-1]:
                spread = [100 * (share_error(b / 100, n) or 0.0) for b, n in zip(base, totals, strict=True)]
                for color, width in ((SURFACE, 2.8), (INK, 1.0)):
                    axes.errorbar(
                        x, base, spread, color=color, linewidth=0, elinewidth=width, capsize=2.5, capthick=width
                    )
        axes.set(xlabel="iteration", ylabel="queries (%)", ylim=(0, 100))
        whole_ticks(axes, x)
        legend(axes, most=MOST_KEPT + 1)

    caption = (
        "Queries of each iteration by how many of their responses were selected for training. Bars at the borders: ± "
        "one standard error of the share below."
    )
    last, newest = list(counts.items())[-1]
    shares = ", ".join(f"{_kept_name(kept)}: {100 * newest[kept] / max(1.0, sum(newest)):.0f}%" for kept in used)
    described = f"queries by responses kept, iteration {last}: {shares}"
    return Plot("kept", "Responses kept per query", caption, svg_of("kept", draw), described)


def _kept_name(kept: int) -> str:
    return f"{kept}+" if kept == MOST_KEPT else str(kept)


def kinds_plot(run: Run) -> Plot | None:
    """Test accuracy by kind of question, warm-up against newest."""
    events = [event for event in run.of("evaluation", split="test") if event.get("by_kind")]
    if not events:
        return None
    first, last = events[0]["by_kind"], events[-1]["by_kind"]
    measured = [kind for kind in last if math.isfinite(_share_of(last, kind))]
    if not measured:
        return None
    kinds = sorted(measured, key=lambda kind: (_share_of(last, kind), kind))[:MOST_KINDS]
    labels = [short(kind.replace("_", " ")) for kind in kinds]

    def draw(axes: Axes) -> None:
        y = list(range(len(kinds)))
        shares = [[100 * _share_of(row, kind) for kind in kinds] for row in (first, last)]
        axes.hlines(y, shares[0], shares[1], color=GRID, linewidth=3)
        shown = [(events[0], shares[0], SERIES[1], 0.14, "s")] if len(events) > 1 else []
        for event, values, color, shift, marker in [*shown, (events[-1], shares[1], SERIES[0], -0.14, "o")]:
            places = [place + shift * (len(events) > 1) for place in y]
            spread = [_kind_error(event, kind, value) for kind, value in zip(kinds, values, strict=True)]
            axes.errorbar(values, places, xerr=spread, color=color, linewidth=0, elinewidth=1.1, capsize=2)
            axes.plot(values, places, marker, color=color, label=_policy(event), markersize=6)
        axes.set_yticks(y, labels)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set(xlabel="greedy test accuracy (%)", ylabel="kind of question", ylim=(-0.6, len(kinds) - 0.4))
        legend(axes)

    height = max(2.1, 0.9 + 0.26 * len(kinds))
    caption = "Greedy test accuracy by kind of question, at the start and now."
    if events[-1].get("kind_queries"):
        caption += " Bars: ± one standard error."
    if len(measured) > len(kinds):
        caption += f" The {len(kinds)} lowest of {len(measured)}."
    described = ", ".join(f"{label} {100 * _share_of(last, k):.0f}%" for k, label in zip(kinds, labels, strict=True))
    return Plot("kinds", "Accuracy by kind", caption, svg_of("kinds", draw, height, labels), f"now: {described}")


def _share_of(by_kind: Event, kind: str) -> float:
    share = number(by_kind, kind)
    return math.nan if share is None else share


def _kind_error(event: Event, kind: str, percentage: float) -> float:
    """Standard error in points; 0 where nobody counted the questions of the kind."""
    queries = event.get("kind_queries")
    known = number(queries, kind) if isinstance(queries, dict) else None
    return 100 * (share_error(percentage / 100, known) or 0.0)


def short(name: str) -> str:
    """A name that fits beside a plot: in one line, the middle of a long one left out, control characters escaped."""
    name = visible(" ".join(name.split()))
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


_LOSSES = {
    "warmup": ("Loss: warm-up", "loss (nats per token)"),
    "prm": ("Loss: PRM", "nats per reasoning step"),
    "evolve": ("Loss: self-evolving", "loss (nats per token)"),
}


def loss_plot(run: Run, stage: str) -> Plot | None:
    """Training loss of one stage over its optimizer steps."""
    title, label = _LOSSES[stage]
    events = [event for event in run.of("step", stage=stage) if number(event, "step") is not None]
    pairs = [(number(event, "step") or 0.0, number(event, "loss")) for event in events]
    good = [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]
    if not good:
        return None
    size = math.ceil(len(good) / MOST_POINTS)
    bins = [good[i : i + size] for i in range(0, len(good), size)]
    x, y = ([sum(pair[axis] for pair in rows) / len(rows) for rows in bins] for axis in (0, 1))
    starts = [
        number(after, "step") or 0.0
        for before, after in itertools.pairwise(events)
        if before.get("iteration") != after.get("iteration")
    ]

    def draw(axes: Axes) -> None:
        smooth = _running_mean(y)
        axes.plot(x, y, color=SERIES[0], alpha=0.35, linewidth=1.2)
        axes.plot(x, smooth, color=SERIES[0], marker="o" if len(x) < 3 else None)
        for start in starts if len(starts) <= 40 else ():
            axes.axvline(start - 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.locator_params(axis="x", integer=True)

    parts = ["Thick: running mean."]
    if size > 1:
        parts.append(f"Each point is the mean of {size} steps.")
    if starts:
        parts.append("Dotted: a new iteration begins.")
    if len(good) < len(pairs):
        parts.append(f"{len(pairs) - len(good)} steps without a finite loss are not drawn.")
    described = f"{label}: {y[0]:.3g} at step {x[0]:.0f}, {y[-1]:.3g} at step {x[-1]:.0f}"
    return Plot(f"loss_{stage}", title, " ".join(parts), svg_of(f"loss_{stage}", draw, labels=("0.000",)), described)


def time_plot(run: Run) -> Plot | None:
    """Seconds by phase."""
    phases = {name: value for name, value in seconds_by_phase(run).items() if name != "total" and value is not None}
    if not phases:
        return None

    def draw(axes: Axes) -> None:
        names = list(phases)[::-1]
        longest = max(phases.values())
        unit, scale = ("hours", 3600) if longest >= 7200 else ("minutes", 60) if longest >= 120 else ("seconds", 1)
        values = [phases[name] / scale for name in names]
        axes.barh(names, values, 0.62, color=SERIES[0])
        for y, name in enumerate(names):
            place = (values[y], y)
            axes.annotate(clock(phases[name]), place, (5, 0), textcoords="offset points", va="center", color=INK)
        axes.set(xlabel=f"time ({unit})", ylabel="phase")
        axes.margins(x=0.16)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")

    caption = "Time of the work that the result is made of, all iterations together."
    described = ", ".join(f"{name} {clock(value)}" for name, value in phases.items())
    return Plot("time", "Time by phase", caption, svg_of("time", draw, labels=list(phases)), described)


def _running_mean(values: Sequence[float]) -> list[float]:
    half = max(1, len(values) // 30)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _policy(event: Event) -> str:
    return "warm-up" if not event.get("iteration") else f"iteration {event['iteration']}"
