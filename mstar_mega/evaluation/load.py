"""The problems of a benchmark file: every row understood, or refused, or left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mstar_mega.config import BenchmarkConfig
from mstar_mega.data.mathv360k import RowProblem
from mstar_mega.data.types import Skipped
from mstar_mega.evaluation.files import Cells, read_cells
from mstar_mega.evaluation.problem import Picture, Problem

SHOWN = 3


@dataclass(frozen=True)
class Loaded:
    """What a file holds."""

    problems: Sequence[Problem]
    skipped: Sequence[Skipped]
    left_out: Sequence[str] = ()
    """Ids of the file's problems that a reduced set leaves out."""


def load(path: Path, read: Callable[[Cells], Problem], settings: BenchmarkConfig) -> Loaded:
    """All problems of a file, in its order. References to other rows' images are followed.

    Raises ValueError, naming file and row, for rows that cannot be used (unless the settings skip them) and for a file
    without any that can.
    """
    problems: dict[str, Problem] = {}
    skipped: list[Skipped] = []
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
    if skipped and settings.bad_rows == "refuse":
        shown = "; ".join(f"{each.where}, {each.what}: {each.reason}" for each in skipped[:SHOWN])
        more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        raise ValueError(f"{len(skipped)} rows cannot be used: {shown}{more}. Mend them, or --bad_rows skip")
    if not problems:
        reasons = "; ".join(f"{each.what}: {each.reason}" for each in skipped[:SHOWN])
        raise ValueError(f"{path} has no problem that can be used ({reasons or 'it is empty'})")
    return Loaded([_with_picture(problem, problems) for problem in problems.values()], skipped)


def _with_picture(problem: Problem, problems: dict[str, Problem]) -> Problem:
    """The problem with the image of the row that its image cell names, where it names one."""
    path = problem.picture.path if problem.picture else None
    if path is None or path not in problems:
        return problem
    target = problems[path].picture
    return replace(problem, picture=target if target is not None and target.data is not None else Picture(path=path))
