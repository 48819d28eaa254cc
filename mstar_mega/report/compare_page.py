"""The page of ``mstar compare``: one self-contained file, and the same figures as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mstar_mega.platform.files import write_text_atomic
from mstar_mega.report.compare import (
    COLUMNS,
    MEASURES,
    Entry,
    Estimate,
    Paired,
    all_pairs,
    csv_rows,
    curve,
    differing_settings,
    estimate,
)
from mstar_mega.report.drawing import SERIES, Plot, iterations_plot
from mstar_mega.report.page import count, escape, figure, fill, table
from mstar_mega.report.summary import summarize

TEMPLATE = Path(__file__).with_name("compare.html")
STYLE_OF = Path(__file__).with_name("template.html")
"""Whose colours and type the page has too."""


def write_comparison(entries: Sequence[Entry], out: str | Path, table: str | Path | None = None) -> list[Path]:
    """Write the page, and with ``table`` the CSV, atomically; returns their paths. Raises OSError."""
    written = [Path(out)]
    write_text_atomic(written[0], render(entries))
    if table is not None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(csv_rows(entries))
        written.append(Path(table))
        write_text_atomic(written[1], text.getvalue())
    return written


def render(entries: Sequence[Entry]) -> str:
    """The page as text."""
    pairs = all_pairs(entries)
    style = re.search(r"<style>(.*?)</style>", STYLE_OF.read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None, "the report's template has a style"
    problems = list(dict.fromkeys(problem for entry in entries for run in entry.runs for problem in run.problems))
    fields = {
        "style": style[1],
        "count": str(sum(len(entry.runs) for entry in entries)),
        "notices": "".join(f'<div class="notice"><p>{escape(problem)}</p></div>' for problem in problems[:8]),
        "summary": _summary(entries),
        "plots": "".join(map(figure, _plots(entries))) or "<p>Nothing has been measured yet.</p>",
        "pairs": _pairs(pairs),
        "settings": _settings(entries),
    }
    return fill(TEMPLATE, fields)


def _plots(entries: Sequence[Entry]) -> list[Plot]:
    plots = []
    for split, field, title in MEASURES:
        curves = [(entry.label, *curve(entry, split, field)) for entry in entries]
        lines = [(label, points, errors) for label, points, errors in curves if points]
        shown = lines[: len(SERIES)]
        left = f" The first {len(shown)} of {len(lines)} entries." if len(lines) > len(shown) else ""
        plot = iterations_plot(
            f"{split}-{field}",
            title,
            f"Mean over seeds on the {split} queries; bars: ± one standard error (over seeds; of one run over its "
            f"queries). Iteration 0 is the warm-up policy.{left}",
            "queries (%)",
            shown,
        )
        plots += [plot] if plot is not None else []
    return plots


def _summary(entries: Sequence[Entry]) -> str:
    head = ("entry", "seeds", "warm-up", "final test accuracy", "Pass@K", "Reward-Pass@K", "responses", "trained on")
    rows = []
    for i, entry in enumerate(entries):
        summaries = [summarize(run) for run in entry.runs]
        means = [
            _mean([summary[name] for summary in summaries]) for name in ("responses_generated", "responses_selected")
        ]
        rows.append(
            [
                f'<span class="key" style="background: var(--series-{i + 1})"></span>' * (i < len(SERIES))
                + f"{escape(entry.label)}",
                escape(entry.seeds),
                _shown(estimate(entry, "warmup", "test", "greedy_accuracy")),
                _shown(estimate(entry, "evolve", "test", "greedy_accuracy")),
                _shown(estimate(entry, "evolve", "validation", "pass_at_k")),
                _shown(estimate(entry, "evolve", "validation", "reward_pass_at_k")),
                *(escape(count(mean)) for mean in means),
            ]
        )
    return table("What they came to", head, rows)


def _pairs(pairs: Sequence[Paired]) -> str:
    if not pairs:
        return (
            "<p>No two entries have final test responses on the same questions by runs of the same seed, so there is "
            "nothing to pair.</p>"
        )
    head = ("first", "second", "difference", "± over questions", "± over seeds", "questions", "seeds", "verdict")
    rows = [
        [
            escape(pair.one),
            escape(pair.other),
            f"{100 * pair.difference:+.1f} points",
            _points(pair.error),
            _points(pair.error_over_seeds),
            escape(count(pair.questions)),
            str(pair.seeds),
            "clear" if pair.is_clear else "within two standard errors",
        ]
        for pair in pairs
    ]
    return table("Paired differences", head, rows)


def _settings(entries: Sequence[Entry]) -> str:
    differing = differing_settings([entry.runs[0] for entry in entries])
    if not differing:
        return "<p>Only the seeds differ.</p>"
    rows = [
        [escape(name), *(escape("null" if value is None else value) for value in values)]
        for name, values in differing.items()
    ]
    return table("Settings that differ", ("setting", *(entry.label for entry in entries)), rows)


def _shown(found: Estimate | None) -> str:
    if found is None:
        return "–"
    error = "" if found.error is None else f" ± {100 * found.error:.1f}"
    return f"{100 * found.value:.1f}{error}%"


def _points(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:.1f}"


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
