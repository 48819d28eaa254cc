"""MMBench: every question asked once for each of its options, with the options rotated; right only if all are right.

The authors' rules are VLMEvalKit's (vlmeval/dataset/utils/multiple_choice.py): a pass that its rules read as wrong
makes the question wrong, a pass that they cannot decide goes to the judge, and without one makes it wrong too.
"""

from __future__ import annotations

from mstar_mega.evaluation.files import Cells
from mstar_mega.evaluation.letters import read_letter, read_vanilla
from mstar_mega.evaluation.problem import Problem, Reading, Rules

ROTATION = 1_000_000
"""A rotated copy of question i is row i + k * ROTATION."""

ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
REASONING = ("attribute_reasoning", "logic_reasoning", "relation_reasoning")


def read(cells: Cells) -> Problem:
    """A row of the TSV."""
    options = cells.options()
    answer = cells.text("answer").strip().upper()
    if answer not in options:
        cells.refuse("answer", f"it is {answer!r}, not one of the options {', '.join(options) or '(there are none)'}")
    index = cells.integer("index")
    l2 = next((cells.optional(name) for name in cells.values if name.lower() in ("l2-category", "l2_category")), "")
    groups = {"l3": (cells.text("category"),), "split": (cells.optional("split") or "none",)}
    if l2:
        groups |= {"l2": (l2,), "table": (ABBREVIATIONS.get(l2, l2),)}
    return Problem(
        id=str(index),
        question=cells.text("question"),
        options=options,
        answer=answer,
        hint=cells.optional("hint"),
        groups=groups,
        circle=str(index % ROTATION),
        picture=cells.picture(),
        where=cells.where,
    )


def is_reduced(problem: Problem) -> bool:
    """Whether MMBench-R keeps it: reasoning only."""
    return problem.groups.get("l2", ("",))[0] in REASONING


def read_response(problem: Problem, response: str, rules: Rules) -> Reading:
    """One pass."""
    return read_vanilla(problem, response, rules)


def read_extraction(problem: Problem, extraction: str | None, rules: Rules) -> Reading:
    """The verdict on a letter that is extracted already."""
    return read_letter(problem, extraction)
