"""MathVista (testmini): choices by their text, numbers by exact string equality after rounding.

The authors' rules (MathVista evaluation/{extract_answer,calculate_score}.py) leave extraction to GPT-4 wherever the
response is not an answer by itself; here rules of our own, or a judge, take its place. Everything behind the extraction
is theirs.
"""

from __future__ import annotations

import re
from dataclasses import replace

from rapidfuzz.distance import Levenshtein

from mstar_mega.config import BenchmarkConfig
from mstar_mega.evaluation.choices import infer
from mstar_mega.evaluation.files import Cells
from mstar_mega.evaluation.problem import AnswerType, Problem, Reading, Rules
from mstar_mega.rewards.extraction import find_answer
from mstar_mega.rewards.prose import NO_ANSWER, first_turn, sentences

COLUMNS = {
    "figure question answering": "FQA",
    "geometry problem solving": "GPS",
    "math word problem": "MWP",
    "textbook question answering": "TQA",
    "visual question answering": "VQA",
}
"""The published table's columns by task."""
GROUPS = (
    "question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills",
)  # fmt: skip

QUESTION_TYPES = ("multi_choice", "free_form")
MAX_DECIMALS = 20
_PROVIDES_NOT = re.compile(r"The (?:question|text) (?:does not|doesn't) [^.]{0,80}(?:enough|needed|necessary)\b")
_UNDETERMINED = re.compile(r"\banswer cannot be (?:\w{1,20}ly )?determined\b")
_TYPES: dict[str, AnswerType] = {"text": "text", "integer": "integer", "float": "float", "list": "list"}


def read(cells: Cells) -> Problem:
    """A problem of testmini.json or the hub's parquet, or a row of VLMEvalKit's TSV."""
    metadata = cells.values.get("metadata")
    flat = Cells(cells.file, cells.number, {**metadata, **cells.values}) if isinstance(metadata, dict) else cells
    answer_type = _TYPES.get(flat.text("answer_type"))
    if answer_type is None:
        flat.refuse("answer_type", f"it is {flat.text('answer_type')!r}, not one of {', '.join(_TYPES)}")
    options = flat.lettered("choices")
    choices = list(options.values())
    question_type = flat.text("question_type")
    if question_type not in QUESTION_TYPES:
        flat.refuse("question_type", f"it is {question_type[:40]!r}, not one of {', '.join(QUESTION_TYPES)}")
    is_choice = question_type == "multi_choice"
    answer, precision = flat.text("answer"), _precision(flat)
    if is_choice and answer not in choices:
        flat.refuse("answer", f"{answer!r} is not one of the choices {choices}")
    if not is_choice:
        _check_number(flat, answer, answer_type, precision)
    groups: dict[str, tuple[str, ...]] = {name: (flat.text(name),) for name in GROUPS[:-1]}
    groups["skills"] = tuple(flat.list("skills"))
    groups["table"] = (COLUMNS.get(groups["task"][0], groups["task"][0]),)
    query = flat.optional("query")
    question = query or flat.text("question")
    unit = flat.optional("unit")
    ready = question.startswith("Hint: ")
    return Problem(
        id=flat.optional("pid") or flat.text("index"),
        question=question if ready or not unit else f"{question} (Unit: {unit})",
        options=options if is_choice else {},
        answer=answer,
        answer_type="text" if is_choice else answer_type,
        precision=precision,
        ready=ready,
        groups=groups,
        picture=flat.picture(),
        where=flat.where,
    )


def _check_number(cells: Cells, answer: str, answer_type: AnswerType, precision: int | None) -> None:
    """Refuse a gold answer that no prediction could ever equal."""
    try:
        if answer_type == "integer":
            int(answer)
        elif answer_type == "float":
            float(answer)
    except ValueError:
        cells.refuse("answer", f"it is {answer[:40]!r}, no {answer_type}")
    if answer_type == "float" and (precision is None or not 0 <= precision <= MAX_DECIMALS):
        cells.refuse("precision", f"it is {precision}, but a float needs its number of decimals, 0 to {MAX_DECIMALS}")


def adjust(problem: Problem, settings: BenchmarkConfig) -> Problem:
    """The problem with the names of its groups that the settings' year had."""
    if settings.integers == "today" or problem.groups["grade"] != ("not applicable",):
        return problem
    return replace(problem, groups={**problem.groups, "grade": ("daily life",)})


def _precision(cells: Cells) -> int | None:
    text = cells.optional("precision").strip()
    if not text:
        return None
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        cells.refuse("precision", f"it is {text[:40]!r}, not a number of decimals")


def extract(problem: Problem, response: str, rules: Rules) -> str:
    """The answer inside a response."""
    if not response:
        return ""
    if response in problem.options.values():
        return response
    try:
        if problem.answer_type == "integer":
            return str(int(response))
        if problem.answer_type == "float":
            return str(float(response))
    except ValueError:
        pass
    if rules.judge is not None:
        return rules.judge(problem, response) or ""
    found = find_answer(response, problem.answer_type, problem.options)
    return (_refusal(response) or found) if found == NO_ANSWER and problem.options else found


def _refusal(response: str) -> str | None:
    """The words in which a response declines, where the published reading copied them: the edits begin at these."""
    said = sentences(first_turn(response))
    if len(said) == 1 and _PROVIDES_NOT.match(said[0]):
        return said[0].strip()
    return "Cannot be determined" if said and _UNDETERMINED.search(said[-1]) else None


def normalize(problem: Problem, extraction: str | None, rules: Rules) -> str | None:
    """The prediction that an extraction is: a choice's text, or the number as the gold answer writes it."""
    if problem.options:
        return _choice(problem, extraction, rules.settings.ignore_empty)
    try:
        if problem.answer_type == "integer":
            if rules.settings.integers == "2023":
                return str(int(extraction or ""))
            return str(int(float(extraction or "")))
        if problem.answer_type == "float":
            return str(round(float(extraction or ""), problem.precision))
    except (ValueError, OverflowError):
        return None
    return str(extraction)


def _choice(problem: Problem, extraction: str | None, ignore_empty: bool) -> str | None:
    text = extraction.strip() if extraction is not None else str(extraction)
    if ignore_empty and not (extraction or "").strip():
        return None
    place = _first_in_parentheses(text)
    letter = place.upper() if place else text
    if letter in problem.options:
        return problem.options[letter]
    return min(problem.options.values(), key=lambda choice: Levenshtein.distance(letter, choice))


def _first_in_parentheses(text: str) -> str | None:
    for i in range(len(text) - 2):
        if text[i] == "(" and text[i + 2] == ")" and text[i + 1].isascii() and text[i + 1].isalpha():
            return text[i + 1]
    return None


def read_response(problem: Problem, response: str, rules: Rules) -> Reading:
    """The response under the rules of that name."""
    if rules.settings.rules == "vlmevalkit":
        return _read_vlmevalkit(problem, response, rules)
    return read_extraction(problem, extract(problem, response, rules), rules)


def read_extraction(problem: Problem, extraction: str | None, rules: Rules) -> Reading:
    """The verdict on an answer that is extracted already."""
    if rules.settings.rules == "vlmevalkit":
        return _compare_vlmevalkit(problem, extraction)
    prediction = normalize(problem, extraction, rules)
    return Reading(extraction, prediction, prediction == problem.answer)


def _read_vlmevalkit(problem: Problem, response: str, rules: Rules) -> Reading:
    """VLMEvalKit's (vlmeval/dataset/utils/mathvista.py): a response that is an answer by itself needs no extraction."""
    direct = _compare_vlmevalkit(problem, response)
    if direct.correct or (problem.options and direct.prediction):
        return direct
    extraction = (
        rules.judge(problem, response) if rules.judge else find_answer(response, problem.answer_type, problem.options)
    )
    return _compare_vlmevalkit(problem, extraction)


def _compare_vlmevalkit(problem: Problem, extraction: str | None) -> Reading:
    """Letters through its option matching, integers as integers, floats without rounding.

    A list never counts: its code compares the gold answer with a variable that it has not set.
    """
    text = extraction or ""
    if problem.options:
        letter = infer(text, problem.options)
        return Reading(extraction, letter, letter is not None and letter == problem.letter)
    try:
        if problem.answer_type == "integer":
            return Reading(extraction, str(int(text)), int(text) == int(problem.answer))
        if problem.answer_type == "float":
            return Reading(extraction, str(float(text)), float(text) == float(problem.answer))
    except ValueError:
        pass
    return Reading(extraction, None, False)
