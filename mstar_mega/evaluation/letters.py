"""Multiple choice by letter: what MMBench, AI2D and, under VLMEvalKit's rules, MMStar and M3CoT have in common."""

from __future__ import annotations

import re

from mstar_mega.evaluation.choices import REFUSED, infer
from mstar_mega.evaluation.problem import Problem, Reading, Rules

_GIVEN = re.compile(r"\(?([A-Za-z])[).:]?")


def read_vanilla(problem: Problem, response: str, rules: Rules) -> Reading:
    """VLMEvalKit's reading of one pass: by its rules, then by the judge if there is one, otherwise undecided (None)."""
    letter = infer(response, problem.options)
    if letter is None and rules.judge is not None:
        answer = rules.judge(problem, response)
        letter = (infer(answer, problem.options) if answer else None) or REFUSED
    return read_letter(problem, letter)


def read_letter(problem: Problem, letter: str | None) -> Reading:
    """The verdict on a letter that is extracted already: equality with the gold letter."""
    given = _GIVEN.fullmatch(letter.strip()) if letter is not None else None
    prediction = given[1].upper() if given else letter
    return Reading(letter, prediction, prediction == problem.letter)
