"""The plots of the report, as SVG whose colours are CSS variables, so that one plot serves a light and a dark page.

matplotlib is given marker colours and its output is rewritten: ``#5e0001`` becomes ``var(--series-1)`` and so on. Text
stays text, in the page's font.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mstar_mega.platform.terminal import visible
from mstar_mega.report.metrics import Event, number
from mstar_mega.report.progress import clock
from mstar_mega.report.run import Run
from mstar_mega.report.summary import seconds_by_phase
from mstar_mega.report.sweep import sweep_criterion, sweep_points, sweep_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, SURFACE = "#1e0001", "#1e0002", "#1e0003", "#1e0004"
SERIES = [f"#5e000{i}" for i in range(1, 6)]
RAMP = [f"#7e000{i}" for i in range(1, 7)]
"""An ordered scale, from little to much."""
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface",
    **{color: f"--series-{i}" for i, color in enumerate(SERIES, start=1)},
    **{color: f"--ramp-{i}" for i, color in enumerate(RAMP, start=1)},
}  # fmt: skip

MOST_POINTS = 300
"""Points of a loss curve; longer ones are averaged into bins."""
MOST_KEPT = 5
"""Responses kept per query that have a bar colour of their own; more share the last one."""
MOST_SWEEPS_WITH_ERRORS = 3
"""Sweeps that all show their errors; of more the first and the last do."""
MOST_SWEEPS_IN_WORDS = 6
"""Newest sweeps that the caption tells of."""

MOST_KINDS = 40
LONGEST_NAME = 32
"""Characters of a name beside a plot."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "text.color": INK,
    "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.8, "lines.linewidth": 2, "lines.markersize": 6,
    "lines.solid_capstyle": "round", "legend.frameon": False, "legend.borderaxespad": 0.2, "legend.handlelength": 1.2,
    "legend.columnspacing": 1.4, "legend.handletextpad": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One figure of the page. ``title`` and ``caption`` are plain text, ``svg`` is markup."""

    name: str
    title: str
    caption: str
    svg: str


def all_plots(run: Run, problems: list[str] | None = None) -> list[Plot]:
    """Every plot that there is data for yet, in reading order.

    One that cannot be drawn is named in ``problems`` and left out; without these its error is raised.
    """
    makers: list[Callable[[Run], Plot | None]] = [
        accuracy_plot, exploration_plot, answering_plot, temperature_plot, sweep_plot, kept_plot, kinds_plot,
        *(partial(loss_plot, stage=stage) for stage in _LOSSES), time_plot,
    ]  # fmt: skip
    plots = []
    for make in makers:
        try:
            plot = make(run)
        except Exception as error:  # whatever matplotlib makes of a run's names and numbers
            if problems is None:
                raise
            name = getattr(make, "__name__", "loss_plot").removesuffix("_plot")
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
    return _iterations_plot("accuracy", "Accuracy", caption, "greedy accuracy (%)", lines)


def exploration_plot(run: Run) -> Plot | None:
    """Pass@K and Reward-Pass@K per iteration."""
    lines = []
    for key, k_key, label in (
        ("pass_at_k", "k", "Pass@"),
        ("reward_pass_at_k", "reward_k", "Reward-Pass@"),
        ("pass_at_reward_k", "reward_k", "random: Pass@"),
    ):
        events = [event for event in run.of("evaluation", split="validation") if number(event, key) is not None]
        if events:
            lines.append((f"{label}{events[-1].get(k_key, 'K')}", latest_per_iteration(events, key), None))
    caption = (
        "Share of validation queries with a correct response among K random samples (Pass@K), and among the K of all "
        "samples that the PRM scores highest (Reward-Pass@K)."
    )
    return _iterations_plot("exploration", "Exploration", caption, "validation queries (%)", lines)


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
    lines = [(label, latest_per_iteration(events, key), None) for key, label in _WAYS.items()]
    caption = (
        "Accuracy on validation queries when the answer is the greedy one, the majority's, the PRM-weighted "
        "majority's, or that of the response with the best process score."
    )
    shown = [line for line in lines if line[1]]
    return _iterations_plot("answering", "Ways to answer", caption, "accuracy (%)", shown)


def temperature_plot(run: Run) -> Plot | None:
    """Sampling temperature of each iteration."""
    points = latest_per_iteration(run.of("generation"), "temperature")
    if not points:
        return None

    def draw(axes: Axes) -> None:
        x, y = list(points), list(points.values())
        axes.step(x, y, where="mid", color=SERIES[0], alpha=0.45)
        axes.plot(x, y, "o", color=SERIES[0])
        for i, value in points.items() if len(points) <= 12 else ():
            axes.annotate(f"{value:g}", (i, value), (0, 7), textcoords="offset points", ha="center", color=INK)
        axes.set(xlabel="iteration", ylabel="sampling temperature", ylim=(min(y) - 0.2, max(y) + 0.2))
        _whole_ticks(axes, x)

    caption = "Temperature at which each iteration's responses were sampled."
    return Plot("temperature", "Temperature", caption, _svg("temperature", draw))


def sweep_plot(run: Run) -> Plot | None:
    """The sweeps' criterion over temperature with paired standard errors, a curve per sweep."""
    sweeps = [event for event in run.of("temperature") if sweep_points(event)]
    if not sweeps:
        return None
    name = sweep_criterion(sweeps[-1])
    beside = any(point.random is not None for point in sweep_points(sweeps[-1]))

    def draw(axes: Axes) -> None:
        for index, sweep in enumerate(sweeps):
            color, label = _ramp(index, len(sweeps)), f"it. {sweep.get('iteration')}"
            points = sorted(sweep_points(sweep), key=lambda point: point.temperature)
            x, y = [point.temperature for point in points], [100 * point.value for point in points]
            axes.plot(x, y, color=color, label=label)
            if len(sweeps) <= MOST_SWEEPS_WITH_ERRORS or index in (0, len(sweeps) - 1):
                spread = [100 * (point.error or 0.0) for point in points]
                axes.errorbar(x, y, spread, color=color, alpha=0.5, linewidth=0, elinewidth=1.2, capsize=2)
            if sweep is sweeps[-1] and beside:
                at_random = [100 * point.random if point.random is not None else math.nan for point in points]
                axes.plot(x, at_random, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
            for point in points:
                if point.temperature == number(sweep, "temperature"):
                    place = [point.temperature], [100 * point.value]
                    axes.plot(*place, "o", color=color, markeredgecolor=SURFACE, markersize=8)
        axes.set(xlabel="temperature", ylabel=f"{name} (%)")
        _legend(axes)

    parts = [
        f"{name} of the validation queries at each temperature, a curve per sweep. Dots: the one chosen. "
        "Bars: ± one standard error of the difference to it, paired over queries"
        + (" (first and last sweep)." if len(sweeps) > MOST_SWEEPS_WITH_ERRORS else ".")
    ]
    if beside:
        parts.append(f"Dashed: {sweeps[-1].get('k', 'K')} responses at random, last sweep.")
    parts += [f"Iteration {sweep.get('iteration')}: {sweep_words(sweep)}." for sweep in sweeps[-MOST_SWEEPS_IN_WORDS:]]
    return Plot("sweep", "Temperature sweeps", " ".join(parts), _svg("sweep", draw))


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
        for kept in used:
            height = [100 * row[kept] / max(1.0, sum(row)) for row in counts.values()]
            color = GRID if kept == 0 else _ramp(kept - 1, max(used))
            name = f"{kept}+" if kept == MOST_KEPT else str(kept)
            axes.bar(x, height, 0.7, bottom=base, color=color, edgecolor=SURFACE, linewidth=1.2, label=name)
            base = [a + b for a, b in zip(base, height, strict=True)]
        axes.set(xlabel="iteration", ylabel="queries (%)", ylim=(0, 100))
        _whole_ticks(axes, x)
        _legend(axes, most=MOST_KEPT + 1)

    caption = "Queries of each iteration by how many of their responses were selected for training."
    return Plot("kept", "Responses kept per query", caption, _svg("kept", draw))


def kinds_plot(run: Run) -> Plot | None:
    """Test accuracy by kind of question, warm-up against newest."""
    events = [event for event in run.of("evaluation", split="test") if event.get("by_kind")]
    if not events:
        return None
    first, last = events[0]["by_kind"], events[-1]["by_kind"]
    kinds = sorted(last, key=lambda kind: (number(last, kind) or 0.0, kind))[:MOST_KINDS]
    labels = [short(kind.replace("_", " ")) for kind in kinds]

    def draw(axes: Axes) -> None:
        start, end = ([100 * (number(row, kind) or 0.0) for kind in kinds] for row in (first, last))
        y = list(range(len(kinds)))
        axes.hlines(y, start, end, color=GRID, linewidth=3)
        if len(events) > 1:
            axes.plot(start, y, "o", color=SERIES[1], label=_policy(events[0]), markersize=7)
        axes.plot(end, y, "o", color=SERIES[0], label=_policy(events[-1]), markersize=7)
        axes.set_yticks(y, labels)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set(xlabel="greedy test accuracy (%)", ylabel="kind of question", ylim=(-0.6, len(kinds) - 0.4))
        _legend(axes)

    height = max(2.1, 0.9 + 0.26 * len(kinds))
    caption = "Greedy test accuracy by kind of question, at the start and now."
    if len(last) > len(kinds):
        caption += f" The {len(kinds)} lowest of {len(last)}."
    return Plot("kinds", "Accuracy by kind", caption, _svg("kinds", draw, height, labels))


def short(name: str) -> str:
    """A name that fits beside a plot: in one line, the middle of a long one left out, control characters escaped."""
    name = visible(" ".join(name.split()))
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


_LOSSES = {
    "warmup": ("Loss: warm-up", "loss (nats per token)"),
    "prm": ("Loss: PRM", "loss (nats per reasoning step)"),
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
    return Plot(f"loss_{stage}", title, " ".join(parts), _svg(f"loss_{stage}", draw))


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
    return Plot("time", "Time by phase", caption, _svg("time", draw, labels=list(phases)))


def latest_per_iteration(events: Sequence[Event], key: str) -> dict[int, float]:
    """Iteration -> the last finite value of a field, by iteration."""
    points: dict[int, float] = {}
    for event in events:
        iteration, value = number(event, "iteration"), number(event, key)
        if iteration is not None and value is not None and math.isfinite(value):
            points[int(iteration)] = value
    return dict(sorted(points.items()))


_Line = tuple[str, dict[int, float], dict[int, float] | None]


def _iterations_plot(name: str, title: str, caption: str, ylabel: str, lines: Sequence[_Line]) -> Plot | None:
    """Shares as percentages over iterations: (label, points, standard errors or None) per line."""
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for index, (label, points, errors) in enumerate(lines):
            x, y = list(points), [100 * value for value in points.values()]
            if errors is not None:
                spread = [100 * errors[i] for i in points]
                axes.errorbar(x, y, spread, color=SERIES[index], alpha=0.5, linewidth=0, elinewidth=1.4, capsize=2.5)
            axes.plot(x, y, "o-", color=SERIES[index], label=label, markersize=6 if len(x) < 20 else 3)
        axes.set(xlabel="iteration", ylabel=ylabel)
        axes.margins(y=0.12)
        _end_labels(axes, [points for _, points, _ in lines])
        _whole_ticks(axes, sorted({i for _, points, _ in lines for i in points}))
        _legend(axes)

    return Plot(name, title, caption, _svg(name, draw))


def _end_labels(axes: Axes, lines: Sequence[dict[int, float]]) -> None:
    """The last value of each line beside its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, last = 0.07 * (high - low), -math.inf
    for value, x in sorted((100 * list(points.values())[-1], list(points)[-1]) for points in lines):
        last = max(value, last + gap)
        axes.annotate(f"{value:.1f}", (x, last), (8, 0), textcoords="offset points", va="center", color=INK)


def _running_mean(values: Sequence[float]) -> list[float]:
    half = max(1, len(values) // 30)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _whole_ticks(axes: Axes, iterations: Sequence[int]) -> None:
    every = math.ceil(len(iterations) / 12)
    axes.set_xticks(list(iterations)[::every])
    axes.set_xlim(iterations[0] - 0.6, iterations[-1] + 0.6)


def _legend(axes: Axes, most: int = 5) -> None:
    """A legend in one row above the plot, of at most ``most`` series; a single one needs none, the title names it."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        size = min(most, len(handles))
        keep = [round(i * (len(handles) - 1) / (size - 1)) for i in range(size)]
        chosen = [handles[i] for i in keep], [labels[i] for i in keep]
        axes.legend(*chosen, loc="lower left", bbox_to_anchor=(-0.02, 1.01), ncols=size)


def _ramp(index: int, count: int) -> str:
    """Colour of the index-th of ``count`` ordered things; few things keep clear of the scale's faint and heavy ends."""
    if count < 2:
        return RAMP[3]
    low, high = (1, 4) if count < 5 else (0, 5)
    return RAMP[low + round(index * (high - low) / (count - 1))]


def _policy(event: Event) -> str:
    return "warm-up" if not event.get("iteration") else f"iteration {event['iteration']}"


def _svg(name: str, draw: Callable[[Axes], None], height: float = 2.75, labels: Sequence[str] = ("1.00",)) -> str:
    """Run ``draw`` on fresh axes and return an ``<svg>`` element that scales to its container.

    Height is in inches. The longest of ``labels``, those of the y axis, sets the left margin: matplotlib's own layout
    engines draw every figure twice.
    """
    import matplotlib
    from matplotlib.figure import Figure

    width = 4.3
    left = 0.24 + 0.078 * max(map(len, labels))
    # The salt keeps the ids of several figures in one page apart, and equal from one writing to the next.
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left / width, 0.43 / height, 1 - (left + 0.18) / width, 1 - (0.43 + 0.24) / height))
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(buffer.getvalue())


def _for_the_page(svg: str) -> str:
    """matplotlib's SVG file as an element: no size of its own, unused ids gone, the page's font and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    used = {match[1] or match[2] for match in re.finditer(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)}
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    return re.sub(r"#[157]e000\d", lambda match: f"var({_VARIABLES[match[0]]})", svg)
