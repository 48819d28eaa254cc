"""The problems of a benchmark file: every row understood, or refused, or left out and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mstar_mega.config import BenchmarkConfig
from mstar_mega.data.rows import RowProblem
from mstar_mega.data.types import Skipped
from mstar_mega.evaluation.files import Cells, read_cells
from mstar_mega.evaluation.problem import Picture, Problem

SHOWN = 3
ONE_PASS = "the file asks each question once: this is one pass, not the circular accuracy, and higher than that"


@dataclass(frozen=True)
class Loaded:
    """What a file holds."""

    problems: Sequence[Problem]
    skipped: Sequence[Skipped]
    left_out: Sequence[str] = ()
    """Ids of the file's problems that are not used: skipped rows, and what a reduced set leaves out."""
    notes: Sequence[str] = ()
    """What must be known of the file to read the figures."""


def load(path: Path, read: Callable[[Cells], Problem], settings: BenchmarkConfig) -> Loaded:
    """All problems of a file, in its order. References to other rows' images are followed.

    Raises ValueError, naming file and row, for rows that cannot be used (unless the settings skip them) and for a file
    without any that can.
    """
    problems: dict[str, Problem] = {}
    skipped: list[Skipped] = []
    left_out: list[str] = []
    for cells in read_cells(path):
        try:
            if cells.problem:
                raise RowProblem("row", cells.problem)
            problem = read(cells)
            if problem.id in problems:
                raise RowProblem("id", f"{problem.id!r} stands in {problems[problem.id].where} already")
            problems[problem.id] = problem
        except RowProblem as error:
            skipped.append(Skipped(f"row {cells.number}", str(cells.file), str(error)))
            left_out.append(cells.id)
    images = dict(problems)  # rows may refer to the image of one that is not asked
    circles = _circles(problems.values())
    for circle, passes in _incomplete(circles).items():
        why = f"question {circle} has {len(passes)} of its {_rotations(passes)} rotations"
        places = [problem.where.rpartition(", ") for problem in passes]
        skipped += [Skipped(row, file, f"index: {why}") for file, _, row in places]
        left_out += [problems.pop(problem.id).id for problem in passes]
    if skipped and settings.bad_rows == "refuse":
        raise ValueError(f"{len(skipped)} rows cannot be used: {_shown(skipped)}. Mend them, or --bad_rows skip")
    if not problems:
        raise ValueError(f"{path} has no problem that can be used ({_shown(skipped) or 'it is empty'})")
    notes = [ONE_PASS] if circles and _is_one_pass(circles) else []
    gaps = [problem for problem in problems.values() if problem.has_gap]
    if gaps:
        first = f"{gaps[0].where}: {', '.join(gaps[0].options)}"
        notes.append(
            f"{len(gaps)} rows have no text for an option between others: asked with those they have ({first})"
        )
    usable = [_with_picture(problem, images) for problem in problems.values()]
    return Loaded(usable, skipped, [id for id in left_out if id and id not in problems], notes)


def _circles(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """The passes of every question that is asked in rotations."""
    circles: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.circle:
            circles.setdefault(problem.circle, []).append(problem)
    return circles


def _is_one_pass(circles: Mapping[str, Sequence[Problem]]) -> bool:
    """Whether every question is asked once, as it is."""
    return all([problem.id for problem in passes] == [circle] for circle, passes in circles.items())


def _incomplete(circles: Mapping[str, list[Problem]]) -> dict[str, list[Problem]]:
    """Questions that are not asked once for each of their options; none in a file of single passes."""
    if _is_one_pass(circles):
        return {}
    return {circle: passes for circle, passes in circles.items() if len(passes) != _rotations(passes)}


def _rotations(passes: Sequence[Problem]) -> int:
    """How often a question must be asked: once for each option, or, where an empty one is rotated with the others, for
    each place."""
    if len({tuple(problem.options) for problem in passes}) == 1:
        return len(passes[0].options)
    return max(len(problem.choices) for problem in passes)


def _shown(skipped: Sequence[Skipped]) -> str:
    """The first reasons, each with where it was met first and how often."""
    first: dict[str, Skipped] = {}
    for each in skipped:
        first.setdefault(each.reason, each)
    counts = Counter(each.reason for each in skipped)
    lines = [
        f"{each.where}, {each.what}{f' and {counts[reason] - 1} more' if counts[reason] > 1 else ''}: {reason}"
        for reason, each in list(first.items())[:SHOWN]
    ]
    return "; ".join(lines) + (f"; and {len(first) - SHOWN} other reasons" if len(first) > SHOWN else "")


def _with_picture(problem: Problem, problems: dict[str, Problem]) -> Problem:
    """The problem with the image of the row that its image cell names, where it names one."""
    path = problem.picture.path if problem.picture else None
    if path is None or path not in problems:
        return problem
    target = problems[path].picture
    return replace(problem, picture=target if target is not None and target.data is not None else Picture(path=path))
