"""Final answers: find them in a response, and compare them with the gold answer.

Everything here is string work and rational arithmetic of bounded size: no answer is ever evaluated, and no input,
however long or hostile, is expensive. Algebraic equality is left to
:class:`mstar_mega.rewards.checker.AnswerChecker`, which calls :func:`plain_verdict` first. Benchmarks with extraction
rules of their own build on the same pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mstar_mega.rewards.quantities import lists_equal, parse_number, parse_quantity, quantities_equal

How = Literal["exact", "numeric", "choice", "symbolic", "none", "timeout", "error"]

MAX_ANSWER_CHARS = 2048
"""Longer answers are compared as they stand, without normalisation."""
MAX_SYMBOLIC_CHARS = 512

ANSWER_HEADING = re.compile(r"^[^\S\n]*#{1,6}[^\S\n]*\**answer\b\**[^\S\n]*:?", re.IGNORECASE | re.MULTILINE)
"""The heading of the final block: a line that begins with ``# Answer``."""


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and which comparison found it so."""

    correct: bool
    how: How
    """none: compared and found wrong. timeout, error: the symbolic comparison was given up (counted as wrong)."""


WRONG = Verdict(False, "none")


# ---------------------------------------------------------------------------------------------------- extraction


def find_answer_heading(text: str) -> re.Match[str] | None:
    """The last answer heading in ``text``, or None."""
    last = None
    for match in ANSWER_HEADING.finditer(text):
        last = match
    return last


def extract_answer(text: str) -> str | None:
    """The text after the last ``# Answer`` heading, stripped; None when there is no heading or nothing follows it.

    The form is ``...\\n\\n# Answer\\n\\n<answer>``; missing blank lines, extra white space, another case, a colon and
    an answer on the heading's own line are tolerated. The heading must begin its line.
    """
    heading = find_answer_heading(text)
    if heading is None:
        return None
    return text[heading.end() :].strip() or None


# ------------------------------------------------------------------------------------------------- normalisation

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_WRAPPER = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname) ?\{")
_TYPOGRAPHY = str.maketrans({"−": "-", "–": "-", "“": '"', "”": '"', "‘": "'", "’": "'"})
_THIN_SPACE_IN_NUMBER = re.compile(r"(?<=[0-9])(?:\\[,!]|\{,\})(?=[0-9]{3})")
_LATEX_SPACE = re.compile(r"\\(?:[,;:!~ ]|quad\b|qquad\b)|~")
_LATEX_NOISE = re.compile(r"\\[()\[\]]|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle(?![a-z])|\\?\$")
_SPACE_AROUND = re.compile(r" ?([,;=+\-*/^(){}\[\]<>|]) ?")
_PAIRS = ("**", "__", "*", "_", "`", '"', "'")


def _drop_wrappers(text: str) -> str:
    """Remove ``\\boxed{`` and its like together with the brace that closes it, at any depth, in one pass."""
    kept: list[str] = []
    drop_close: list[bool] = []
    position = 0
    while position < len(text):
        wrapper = _WRAPPER.match(text, position) if text[position] == "\\" else None
        if wrapper:
            drop_close.append(True)
            position = wrapper.end()
            continue
        char = text[position]
        position += 1
        if char == "{":
            drop_close.append(False)
        elif char == "}" and drop_close and drop_close.pop():
            continue
        kept.append(char)
    return "".join(kept)


def _strip_surroundings(text: str) -> str:
    """Strip white space, sentence punctuation, and paired quotes or markdown around the text."""
    while True:
        before = text
        text = text.strip().rstrip(".,;:?").lstrip(",;:?")
        if text.startswith(".") and not re.match(r"\.[0-9]", text):
            text = text[1:]
        if re.search(r"[^\W\d_]{2}!+$", text):  # "yes!" but not the factorials "5!" and "n!"
            text = text.rstrip("!")
        for mark in _PAIRS:
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)]
                break
        if text == before:
            return text


def _normalize_once(text: str) -> str:
    text = _INVISIBLE.sub("", _CONTROL.sub(" ", text)).translate(_TYPOGRAPHY).casefold()
    text = " ".join(text.split())
    text = _drop_wrappers(text)
    text = _THIN_SPACE_IN_NUMBER.sub(lambda match: "," if match[0] == "{,}" else "", text)
    text = _LATEX_SPACE.sub(" ", text)
    text = _LATEX_NOISE.sub("", text).replace("\\%", "%")
    text = " ".join(text.split())
    return _strip_surroundings(_SPACE_AROUND.sub(r"\1", text))


def normalize(answer: str) -> str:
    """A spelling-independent form: case, white space, surrounding punctuation, markdown and LaTeX dressing removed.

    Idempotent. Answers longer than ``MAX_ANSWER_CHARS`` are only stripped.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer.strip()
    while True:
        shorter = _normalize_once(answer)
        if shorter == answer:
            return shorter
        answer = shorter


# ------------------------------------------------------------------------------------------------------- choices

_LETTER = re.compile(
    r"(?:(?:option|choice|answer) ?)?(?:\(([a-z])\)|\[([a-z])\]|(?<![a-z])([a-z])(?:[).:]|(?=$)))(?:[.:]? ?(.+))?"
)


def _split_letter(normalized: str) -> tuple[str, str] | None:
    """("B", "12") for ``b. 12``, ("B", "") for ``(b)``; None where the text does not begin with a choice's letter."""
    match = _LETTER.fullmatch(normalized)
    if match is None:
        return None
    return (match[1] or match[2] or match[3]).upper(), (match[4] or "").strip()


def _matching_choices(normalized: str, choices: Sequence[str]) -> list[int]:
    """Indices of the choices whose text is this: as text if any is, otherwise as a number."""
    forms = [normalize(choice) for choice in choices]
    same_text = [index for index, form in enumerate(forms) if form and form == normalized]
    number = parse_number(normalized)
    if same_text or number is None:
        return same_text
    return [index for index, form in enumerate(forms) if (other := parse_number(form)) and other == number]


def resolve_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that ``answer`` names, or None when it names none or is ambiguous.

    Read as a letter: ``B``, ``(b)``, ``B.``, ``Option B``. A lone letter is always the letter, also where it is the
    text of another choice, since a letter is what the question asks for. Letter and text together (``B. 12``) must
    agree. A text alone must be the text of exactly one choice.
    """
    if len(choices) > 26:
        raise ValueError(f"a question has {len(choices)} choices; letters A to Z name at most 26")
    normalized = normalize(answer)
    lettered = _split_letter(normalized)
    valid = lettered is not None and ord(lettered[0]) - ord("A") < len(choices)
    if lettered and valid and not lettered[1]:
        return lettered[0]
    matches = _matching_choices(normalized, choices)
    if matches:
        return chr(ord("A") + matches[0]) if len(matches) == 1 else None
    if lettered and valid and ord(lettered[0]) - ord("A") in _matching_choices(normalize(lettered[1]), choices):
        return lettered[0]
    return None


# ---------------------------------------------------------------------------------------------------- comparison

_ASSIGNMENT = re.compile(r"[a-z][a-z0-9_]{0,7}=(?=[^=])")
_TO_LATEX = (
    ("**", "^"),
    ("π", r"\pi "),
    ("×", r"\times "),
    ("·", r"\cdot "),
    ("÷", r"\div "),
    ("²", "^2"),
    ("³", "^3"),
    ("≤", r"\leq "),
    ("≥", r"\geq "),
    ("∞", r"\infty "),
)
_FUNCTION = re.compile(r"(?<![\\a-z])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![a-z])")
_ROOT = re.compile(r"√ ?(?:\(([^()]*)\)|([0-9]+|[a-z]))|(?<![\\a-z])sqrt ?\(([^()]*)\)")
_COMMAND = re.compile(r"\\[a-z]+|\\[{}]")
_MATH_CHARS = re.compile(r"[0-9a-z+\-*/^_=<>()\[\]{}.,|! ]*")
_MATH_SIGN = re.compile(r"[0-9+*/^=<>\\]")


def _is_bare_list(latex: str) -> bool:
    depth = 0
    for char in latex:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            return True
    return False


def to_latex(normalized: str) -> str | None:
    """The LaTeX form of a short normalised answer that looks like mathematics; None for words and prose.

    A list without brackets becomes a tuple: its order counts, as in "sort these", while ``\\{1,2\\}`` is a set.
    """
    if len(normalized) > MAX_SYMBOLIC_CHARS:
        return None
    latex = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3] or ''}}}", normalized)
    for plain, command in _TO_LATEX:
        latex = latex.replace(plain, command)
    latex = _FUNCTION.sub(r"\\\1 ", latex).strip()
    without_commands = _COMMAND.sub(" ", latex)
    if not _MATH_SIGN.search(latex) or not _MATH_CHARS.fullmatch(without_commands):
        return None
    runs = re.findall(r"[a-z]+", without_commands)
    if len(latex) > MAX_SYMBOLIC_CHARS or any(len(run) > 2 for run in runs):
        return None
    return f"({latex})" if _is_bare_list(latex) else latex


def plain_verdict(answer: str, gold: str, choices: Sequence[str] = ()) -> Verdict | None:
    """Compare without algebra. None: undecided, both are short expressions that algebra could show equal.

    A plain number equals only a plain number: ``3+5`` is not yet the answer 8 (else a policy could be rewarded for
    leaving the work undone), and a score ``2-1`` is not 1.
    """
    gold_letter = resolve_choice(gold, choices) if choices else None
    if gold_letter:
        return Verdict(True, "choice") if resolve_choice(answer, choices) == gold_letter else WRONG
    given, wanted = normalize(answer), normalize(gold)
    if not given or not wanted:  # nothing but punctuation
        return Verdict(True, "exact") if answer.strip() and answer.strip() == gold.strip() else WRONG
    if "=" not in wanted:
        given = _ASSIGNMENT.sub("", given, count=1) if _ASSIGNMENT.match(given) else given
    if given == wanted:
        return Verdict(True, "exact")
    if re.fullmatch(r"[A-Z]", gold.strip()):  # a choice question whose choices are not at hand
        return Verdict(True, "choice") if _split_letter(given) == (gold.strip(), "") else WRONG
    number, target = parse_quantity(given), parse_quantity(wanted)
    if number and target:
        return Verdict(True, "numeric") if quantities_equal(number, target) else WRONG
    if number or target:
        return WRONG
    same_list = lists_equal(given, wanted)
    if same_list is not None:
        return Verdict(True, "numeric") if same_list else WRONG
    if to_latex(given) is None or to_latex(wanted) is None:
        return WRONG
    return None


def answer_key(answer: str, choices: Sequence[str] = ()) -> str:
    """A canonical form: two answers with the same key are the same vote.

    A choice's letter where the question has choices and the answer names one, the reduced fraction of a number
    (``50%`` votes with ``0.5``), the normalised text otherwise.
    """
    letter = resolve_choice(answer, choices) if choices else None
    if letter:
        return f"choice {letter}"
    normalized = normalize(answer)
    quantity = parse_quantity(normalized)
    if quantity:
        return f"number {quantity[0].value} {quantity[1]}".rstrip()
    return f"text {normalized or answer.strip()}"
