"""MMStar: 1,500 questions, six categories of three kinds.

The authors' rule (MMStar eval/vlmeval/evaluate/mmstar.py) looks only at the first letter of the response, or of what
follows ``(``, ``option `` or ``the answer is ``: "apple" is A.
"""

from __future__ import annotations

import re

from mstar_mega.evaluation.files import Cells
from mstar_mega.evaluation.letters import read_letter, read_vanilla
from mstar_mega.evaluation.problem import Problem, Reading, Rules

PERCEPTION = ("coarse perception", "fine-grained perception")
_OPTIONS_INSIDE = re.compile(r"(?:^|\n)(?:Options|Choices): ?\s*\(?A\)?[:.)]? ")
_OPTION = re.compile(r"(?:^|, |\n)\(?([A-F])(?:\)|:|\.) ?")
_LINES = re.compile(r"\n\(?A[).:] [^\n]*\n\(?B[).:] ")
"""Options under no heading: lines at the question's end."""
_STARTS = ("", "(", "option ", "the answer is ")


def read(cells: Cells) -> Problem:
    """A row of VLMEvalKit's TSV or of the hub's parquet."""
    answer = cells.text("answer").strip().upper()
    options = cells.options()
    question = cells.text("question")
    if options:  # as the authors' own files write it
        question = f"{question}\nOptions: {', '.join(f'{letter}: {text}' for letter, text in options.items())}"
    else:
        options = options_inside(question)
    if options and answer not in options:
        cells.refuse("answer", f"it is {answer!r}, not one of the options {', '.join(options)}")
    category = cells.text("category")
    return Problem(
        id=cells.text("index"),
        question=question,
        options=options,
        answer=answer,
        ready=True,
        groups={"category": (category,), "l2_category": (cells.text("l2_category"),)},
        picture=cells.picture(),
        where=cells.where,
    )


def options_inside(question: str) -> dict[str, str]:
    """The options that a question's own text lists, as ``Options: A: ..., B: ...`` or as lines ``(A) ...``, ``A. ...``,
    also under no heading."""
    begin = _OPTIONS_INSIDE.search(question)
    if begin is not None:
        text = question[begin.start() :].lstrip("\n").partition(":")[2].strip()
    elif (lines := _LINES.search(question)) is not None:
        text = question[lines.start() :].strip()
    else:
        return {}
    marks, wanted = [], "A"
    for mark in _OPTION.finditer(text):
        if mark[1] == wanted:
            marks.append(mark)
            wanted = chr(ord(wanted) + 1)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return {mark[1]: text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)}


def is_reduced(problem: Problem) -> bool:
    """Whether MMStar-R keeps it: the two perception categories are left out."""
    return problem.groups["category"][0] not in PERCEPTION


def read_response(problem: Problem, response: str, rules: Rules) -> Reading:
    """The response under the rules of that name."""
    if rules.settings.rules == "vlmevalkit":
        return read_vanilla(problem, response, rules)
    text = response.lower().strip().replace("\n", " ")
    for start in _STARTS:
        place = len(start)
        letter = text[place : place + 1]
        if text.startswith(start) and letter == problem.answer.lower():
            return read_letter(problem, letter.upper())
    if rules.judge is not None:
        return read_letter(problem, rules.judge(problem, response))
    return Reading(text[:1].upper() or None, None, False)


def read_extraction(problem: Problem, extraction: str | None, rules: Rules) -> Reading:
    """The verdict on an answer that is extracted already."""
    return read_letter(problem, extraction)
