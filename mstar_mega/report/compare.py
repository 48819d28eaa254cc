"""Runs side by side: what differs in their settings, their curves, and paired tests of their final accuracies.

Runs whose settings differ in nothing but the seed, and what cannot change a result, are one **entry**: its figures are
means over seeds, its errors those of the mean. Everything is read from the run directories; nothing is written there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstar_mega.data.records import DamagedFileError, read_groups
from mstar_mega.report.metrics import latest_per_iteration, number
from mstar_mega.report.run import Run, load_run
from mstar_mega.report.summary import at_most, measured, share_error, summarize
from mstar_mega.settings import is_free_to_change

MEASURES = (
    ("test", "greedy_accuracy", "Test accuracy"),
    ("validation", "greedy_accuracy", "Validation accuracy"),
    ("validation", "pass_at_k", "Pass@K"),
    ("validation", "reward_pass_at_k", "Reward-Pass@K"),
)
"""Split, field and name of what is drawn over iterations."""
LONGEST_LABEL = 60


@dataclass
class Entry:
    """Runs that differ in their seeds alone."""

    label: str
    runs: list[Run]

    @property
    def seeds(self) -> str:
        """For people."""
        return ", ".join(str(run.setting("seed")) for run in self.runs)


@dataclass(frozen=True)
class Estimate:
    """A mean over an entry's runs."""

    value: float
    error: float | None
    """Standard error: over runs where there are several, else that of the one run's queries."""
    runs: int


@dataclass(frozen=True)
class Paired:
    """The final test accuracies of two entries on the same questions by runs of the same seed."""

    one: str
    other: str
    difference: float
    """Of the first minus the second, as a share."""
    error: float | None
    """Standard error of the mean difference over questions."""
    error_over_seeds: float | None
    """The same over seeds; None for one."""
    questions: int
    seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the difference is more than two of the larger standard error."""
        errors = [error for error in (self.error, self.error_over_seeds) if error is not None]
        return bool(errors) and abs(self.difference) > 2 * max(errors)


def read_entries(directories: Sequence[str | Path], ignored: Sequence[str] = ()) -> list[Entry]:
    """The runs as entries, in their order; settings that begin with one of ``ignored`` set none apart.

    Raises ValueError for fewer than two runs, one named twice, or one that has neither settings nor events.
    """
    if len(directories) < 2:
        raise ValueError("give at least two run directories to compare")
    places = [Path(directory).resolve() for directory in directories]
    twice = next((path for i, path in enumerate(places) if path in places[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice")
    entries: dict[str, list[Run]] = {}
    for directory in directories:
        if not Path(directory).is_dir():
            raise ValueError(f"{directory} is not a directory")
        run = load_run(directory)
        if not run.settings and not run.events:
            raise ValueError(f"{directory} is not the directory of a run: it has neither settings nor a log")
        entries.setdefault(repr(sorted(_deciding(run, ignored).items(), key=repr)), []).append(run)
    grouped = list(entries.values())
    differing = differing_settings([runs[0] for runs in grouped], ignored)
    return [Entry(_label(runs, differing), runs) for runs in grouped]


def _deciding(run: Run, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that may change results, but for the seed."""
    return {
        name: value
        for name, value in flat_settings(run.settings).items()
        if name != "seed" and not is_free_to_change(name) and not name.startswith(tuple(ignored))
    }


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat_settings(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differing_settings(runs: Sequence[Run], ignored: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Setting -> its value in each run, for those that are not the same in all."""
    flat = [_deciding(run, ignored) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = {name: [settings.get(name) for settings in flat] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _label(runs: Sequence[Run], differing: Mapping[str, Sequence[Any]]) -> str:
    """What sets an entry apart, or where its first run lies."""
    own = flat_settings(runs[0].settings)
    parts = [f"{name.rpartition('.')[2]} {own.get(name)}" for name in differing]
    text = ", ".join(parts)
    if not parts or len(text) > LONGEST_LABEL:
        text = runs[0].directory.name or str(runs[0].directory)
    return text


def curve(entry: Entry, split: str, field: str) -> tuple[dict[int, float], dict[int, float]]:
    """Iteration -> mean over the entry's runs that have it, and its standard error."""
    found: dict[int, list[float]] = {}
    alone: dict[int, float] = {}
    for run in entry.runs:
        events = run.of("evaluation", split=split)
        own = latest_per_iteration(events, field)
        for iteration, value in own.items():
            found.setdefault(iteration, []).append(value)
        errors_of = latest_per_iteration(events, "standard_error") if field == "greedy_accuracy" else {}
        alone |= at_most(own, events) | errors_of
    points = {iteration: statistics.fmean(values) for iteration, values in sorted(found.items())}
    errors = {
        iteration: statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else alone.get(iteration, 0.0)
        for iteration, values in found.items()
    }
    return points, {iteration: errors[iteration] for iteration in points}


def estimate(entry: Entry, stage: str, split: str, field: str) -> Estimate | None:
    """The newest measurement of a stage, over the entry's runs; None where no run has it."""
    values = [value for run in entry.runs if (value := measured(run, stage, split, field)) is not None]
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    if error is None:
        measurements = [event for run in entry.runs for event in run.of("evaluation", stage=stage, split=split)]
        newest = [event for event in measurements if number(event, field) is not None][-1]
        stated = number(newest, "standard_error") if field == "greedy_accuracy" else None
        error = stated if stated is not None else share_error(values[0], number(newest, "queries"))
    return Estimate(statistics.fmean(values), error, len(values))


def final_verdicts(run: Run) -> dict[str, bool]:
    """Query id -> whether the newest policy's greedy response on the test set is right; empty where it is not on disk.

    Damaged files are named in the run's ``problems``.
    """
    folders = sorted((run.directory / "rollouts").glob("evaluation_????_test_greedy"))
    if not folders:
        return {}
    found: dict[str, bool] = {}
    for path in sorted(folders[-1].glob("block_*.jsonl")):
        try:
            groups = read_groups(path)
        except (DamagedFileError, OSError) as error:
            run.problems.append(str(error))
            continue
        found |= {group.query.id: bool(group.responses and group.responses[0].correct) for group in groups}
    return found


def paired(one: Entry, other: Entry) -> Paired | None:
    """The difference of final test accuracies over questions that both have answered in runs of the same seed."""
    verdicts = [{run.setting("seed"): final_verdicts(run) for run in entry.runs} for entry in (one, other)]
    by_seed: list[float] = []
    gaps: list[float] = []
    for seed, first in verdicts[0].items():
        second = verdicts[1].get(seed, {})
        both = [float(right) - float(second[id]) for id, right in first.items() if id in second]
        if both:
            by_seed.append(statistics.fmean(both))
            gaps += both
    if not gaps:
        return None
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    over = statistics.stdev(by_seed) / math.sqrt(len(by_seed)) if len(by_seed) > 1 else None
    return Paired(one.label, other.label, statistics.fmean(gaps), error, over, len(gaps), len(by_seed))


def all_pairs(entries: Sequence[Entry]) -> list[Paired]:
    """Every two entries that can be compared."""
    pairs = (paired(one, other) for i, one in enumerate(entries) for other in entries[i + 1 :])
    return [pair for pair in pairs if pair is not None]


COLUMNS = ("entry", "run", "seed", "stage", "iteration", "split", "measure", "value", "standard_error")
"""Of the CSV."""
_COUNTED = ("responses_generated", "responses_selected", "log_prob_gap_max", "peak_memory_bytes")


def csv_rows(entries: Sequence[Entry]) -> Iterator[tuple[Any, ...]]:
    """Every measurement of every run, a row each, behind :data:`COLUMNS`; totals of a run have no iteration."""
    for entry in entries:
        for run in entry.runs:
            named = (entry.label, str(run.directory), run.setting("seed"))
            for event in run.of("evaluation"):
                for field, value in event.items():
                    if field in ("iteration", "standard_error") or not isinstance(value, int | float):
                        continue
                    error = event.get({"greedy_accuracy": "standard_error"}.get(field, f"{field}_stderr"))
                    yield (*named, event.get("stage"), event.get("iteration"), event.get("split"), field, value, error)
            for event in run.of("generation"):
                yield (*named, "evolve", event.get("iteration"), "", "temperature", event.get("temperature"), None)
            summary = summarize(run)
            for field in _COUNTED:
                yield (*named, "run", None, "", field, summary.get(field), None)
