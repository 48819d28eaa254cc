"""AI2D's test questions, as VLMEvalKit's TSV (scripts/AI2D_preproc.ipynb) or lmms-lab's parquet brings them: four
options, one pass.

The diagrams' authors give no rule for responses in free text; both rule names are VLMEvalKit's.
"""

from __future__ import annotations

from mstar_mega.evaluation.files import Cells
from mstar_mega.evaluation.letters import read_letter, read_vanilla
from mstar_mega.evaluation.problem import Problem, Reading, Rules


def read(cells: Cells) -> Problem:
    """A row of the TSV, or of the parquet: ``options`` as a list, the answer's place in it from 0, and no ids, so that
    a row is called by its place in the set, as lmms-eval calls it."""
    is_listed = "options" in cells.values
    options = cells.lettered("options") if is_listed else cells.options()
    answer = cells.text("answer").strip().upper()
    if is_listed and answer.isdecimal() and int(answer) < len(options):
        answer = list(options)[int(answer)]
    if answer not in options:
        cells.refuse("answer", f"it is {answer!r}, not one of the options {', '.join(options) or '(there are none)'}")
    category = cells.optional("category")
    labels = cells.optional("abcLabel")
    return Problem(
        id=cells.optional("index") or str(cells.place) if is_listed else cells.text("index"),
        question=cells.text("question"),
        options=options,
        answer=answer,
        groups={"category": (category,)} | ({"abcLabel": (labels,)} if labels else {}) if category else {},
        picture=cells.picture(),
        where=cells.where,
    )


def read_response(problem: Problem, response: str, rules: Rules) -> Reading:
    """One response."""
    return read_vanilla(problem, response, rules)


def read_extraction(problem: Problem, extraction: str | None, rules: Rules) -> Reading:
    """The verdict on a letter that is extracted already."""
    return read_letter(problem, extraction)
