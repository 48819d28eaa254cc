"""How the report's figures are drawn: as SVG with CSS variables for colours, so that one serves light and dark pages.

matplotlib is given marker colours and its output is rewritten: ``#5e0001`` becomes ``var(--series-1)`` and so on. Text
stays text, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, SURFACE = "#1e0001", "#1e0002", "#1e0003", "#1e0004"
SERIES = [f"#5e000{i}" for i in range(1, 6)]
RAMP = [f"#7e000{i}" for i in range(1, 7)]
"""An ordered scale, from little to much."""
MARKERS = "osD^v"
"""Of the series, so that colour alone does not tell them apart."""
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface",
    **{color: f"--series-{i}" for i, color in enumerate(SERIES, start=1)},
    **{color: f"--ramp-{i}" for i, color in enumerate(RAMP, start=1)},
}  # fmt: skip

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "text.color": INK,
    "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.8, "lines.linewidth": 2, "lines.markersize": 6,
    "lines.solid_capstyle": "round", "legend.frameon": False, "legend.borderaxespad": 0.2, "legend.handlelength": 1.0,
    "legend.handletextpad": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One figure of the page. ``title`` and ``caption`` are plain text, ``svg`` is markup."""

    name: str
    title: str
    caption: str
    svg: str
    described: str = ""
    """What it shows, in words and numbers, for those who do not see it."""


Line = tuple[str, dict[int, float], dict[int, float] | None]


def iterations_plot(
    name: str, title: str, caption: str, ylabel: str, lines: Sequence[Line], colors: Sequence[str] = SERIES
) -> Plot | None:
    """Shares as percentages over iterations: (label, points, standard errors or None) per line."""
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for index, (label, points, errors) in enumerate(lines):
            x, y = list(points), [100 * value for value in points.values()]
            if errors is not None:
                error_bars(axes, x, y, [100 * errors[i] for i in points], colors[index])
            size = 6 if len(x) < 20 else 3
            axes.plot(x, y, f"{MARKERS[index % len(MARKERS)]}-", color=colors[index], label=label, markersize=size)
        axes.set(xlabel="iteration", ylabel=ylabel)
        axes.margins(y=0.12)
        _end_labels(axes, [points for _, points, _ in lines])
        whole_ticks(axes, sorted({i for _, points, _ in lines for i in points}))
        legend(axes)

    rows = legend_rows([label for label, _, _ in lines])
    described = "; ".join(_course(label, points) for label, points, _ in lines)
    return Plot(name, title, caption, svg_of(name, draw, rows=rows), f"{ylabel}: {described}")


def error_bars(axes: Axes, x: Sequence[float], y: Sequence[float], spread: Sequence[float], color: str) -> None:
    """± one standard error each, in the axis' own unit."""
    axes.errorbar(x, y, spread, color=color, linewidth=0, elinewidth=1.1, capsize=2.5, capthick=1.1)


def _course(label: str, points: dict[int, float]) -> str:
    (first, start), (last, end) = next(iter(points.items())), list(points.items())[-1]
    if first == last:
        return f"{label} {100 * end:.1f} in iteration {last}"
    return f"{label} {100 * start:.1f} in iteration {first}, {100 * end:.1f} in iteration {last}"


def _end_labels(axes: Axes, lines: Sequence[dict[int, float]]) -> None:
    """The last value of each line beside its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, last = 0.07 * (high - low), -math.inf
    for value, x in sorted((100 * list(points.values())[-1], list(points)[-1]) for points in lines):
        last = max(value, last + gap)
        axes.annotate(f"{value:.1f}", (x, last), (8, 0), textcoords="offset points", va="center", color=INK)


def whole_ticks(axes: Axes, iterations: Sequence[int]) -> None:
    every = math.ceil(len(iterations) / 12)
    axes.set_xticks(list(iterations)[::every])
    axes.set_xlim(iterations[0] - 0.6, iterations[-1] + 0.6)


LEGEND_WIDTH, LEGEND_ROW = 3.6, 0.2
"""Inches that a legend has above a plot, and the height of its rows."""


def _columns(labels: Sequence[str]) -> int:
    """The most that fit; matplotlib fills a legend column by column."""
    for columns in range(len(labels), 1, -1):
        rows = -(-len(labels) // columns)
        widest = [max(map(len, labels[i : i + rows])) for i in range(0, len(labels), rows)]
        if sum(0.35 + 0.06 * each for each in widest) <= LEGEND_WIDTH:
            return columns
    return 1


def legend_rows(labels: Sequence[str], most: int = 5) -> int:
    """Rows that the legend of these series needs, see :func:`legend`."""
    labels = labels[:most]
    return -(-len(labels) // _columns(labels)) if len(labels) > 1 else 1


def legend(axes: Axes, most: int = 5) -> None:
    """A legend above the plot, of at most ``most`` series, in as few rows as their names fit into; a single one needs
    none, the title names it."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        size = min(most, len(handles))
        keep = [round(i * (len(handles) - 1) / (size - 1)) for i in range(size)]
        chosen = [handles[i] for i in keep], [labels[i] for i in keep]
        space = 1.4 if size < 4 else 0.9
        columns = _columns(chosen[1])
        axes.legend(
            *chosen, loc="lower left", bbox_to_anchor=(-0.02, 1.01), labelspacing=0.3, ncols=columns,
            columnspacing=space,
        )  # fmt: skip


def ramp(index: int, count: int) -> str:
    """Colour of the index-th of ``count`` ordered things; few things keep clear of the scale's faint and heavy ends."""
    if count < 2:
        return RAMP[3]
    low, high = (1, 4) if count < 5 else (0, 5)
    return RAMP[low + round(index * (high - low) / (count - 1))]


def svg_of(
    name: str, draw: Callable[[Axes], None], height: float = 2.75, labels: Sequence[str] = ("1.00",), rows: int = 1
) -> str:
    """Run ``draw`` on fresh axes and return an ``<svg>`` element that scales to its container.

    Height is in inches, without the legend's rows from the second on. The longest of ``labels``, those of the y axis,
    sets the left margin: matplotlib's own layout engines draw every figure twice.
    """
    import matplotlib
    from matplotlib.figure import Figure

    width, top = 4.3, 0.24 + LEGEND_ROW * (rows - 1)
    height += top - 0.24
    left = 0.24 + 0.078 * max(map(len, labels))
    # The salt keeps the ids of several figures in one page apart, and equal from one writing to the next.
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left / width, 0.43 / height, 1 - (left + 0.18) / width, 1 - (0.43 + top) / height))
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
