"""M3CoT: multi-step questions of nine topics in three domains.

The authors' rule (M3CoT utils/metric.py) takes the last letter in parentheses, then the last option whose text is
contained, then stand-alone letters; the last in option order wins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mstar_mega.config import BenchmarkConfig
from mstar_mega.data.prompts import letters
from mstar_mega.evaluation.files import Cells
from mstar_mega.evaluation.letters import read_letter, read_vanilla
from mstar_mega.evaluation.problem import Problem, Reading, Rules

FAILED = "FAILED"
TABLE_GOLD = {"social-commonsense-1274": "A"}
"""Gold answers that the published table implies and the published files contradict."""

_PARENTHESES = re.compile(r"\(([A-Za-z])\)")
_PUNCTUATION = re.compile(r"[\n.,!?]")


def read(cells: Cells) -> Problem:
    """A row of the parquet or jsonl file."""
    options = cells.lettered("choices")
    answer = cells.text("answer").strip()
    if answer.isdigit() and int(answer) < len(options):
        answer = list(options)[int(answer)]
    if answer not in options:
        cells.refuse("answer", f"it is {answer!r}, not one of the options {', '.join(options) or '(there are none)'}")
    return Problem(
        id=cells.text("id"),
        question=cells.text("question"),
        options=options,
        answer=answer,
        context=cells.optional("context"),
        groups={"domain": (cells.text("domain"),), "topic": (cells.text("topic"),)},
        picture=cells.picture(),
        where=cells.where,
    )


def adjust(problem: Problem, settings: BenchmarkConfig) -> Problem:
    """The problem with the gold answer that the settings take."""
    wanted = TABLE_GOLD.get(problem.id) if settings.gold == "table" else None
    return replace(problem, answer=wanted) if wanted else problem


def predict(response: str, choices: Sequence[str]) -> str:
    """The letter that the authors' rule reads in a response, or FAILED."""
    if "[Answer]" in response:
        response = response.rpartition("[Answer]")[2].partition("[Rationale]")[0].partition("[Context]")[0]
    names = letters(len(choices))
    in_parentheses = _PARENTHESES.findall(response)
    if in_parentheses:
        return str(in_parentheses[-1].upper())
    lowered = response.lower()
    words = set(_PUNCTUATION.sub(" ", response).split(" "))
    for found in (
        [name for name, text in zip(names, choices, strict=True) if text.lower() in lowered],
        [name for name in names if name in words],
        [name for name in names if name.lower() in words],
    ):
        if found:
            return found[-1]
    return FAILED


def read_response(problem: Problem, response: str, rules: Rules) -> Reading:
    """The response under the rules of that name."""
    if rules.settings.rules == "vlmevalkit":
        return read_vanilla(problem, response, rules)
    letter: str | None = predict(response, list(problem.options.values()))
    if letter == FAILED and rules.judge is not None:
        letter = rules.judge(problem, response)
    return read_letter(problem, letter)


def read_extraction(problem: Problem, extraction: str | None, rules: Rules) -> Reading:
    """The verdict on a letter that is extracted already."""
    return read_letter(problem, extraction)
