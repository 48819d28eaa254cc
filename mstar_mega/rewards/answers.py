"""Final answers: find them in a response, and compare them with the gold answer. docs/answers.md has the principles.

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

from mstar_mega.rewards.choices import resolve_choice, split_letter
from mstar_mega.rewards.dressing import MAX_ANSWER_CHARS, clean, normalize
from mstar_mega.rewards.equality import Algebra, equal, same_text
from mstar_mega.rewards.frames import readings
from mstar_mega.rewards.quantities import parse_quantity

How = Literal["exact", "numeric", "choice", "symbolic", "none", "timeout", "error"]

ANSWER_HEADING = re.compile(
    r"^[^\S\n]*[*_]{0,3}#{1,6}[^\S\n]*[*_]{0,3}(?:(?:the )?(?:final |correct )?answer(?![A-Za-z0-9])|答案)"
    r"[*_]{0,3}[^\S\n]*[:：]?[*_]{0,3}",
    re.IGNORECASE | re.MULTILINE,
)
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
    if "#" not in text:
        return None
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


# ---------------------------------------------------------------------------------------------------- comparison


def plain_verdict(answer: str, gold: str, choices: Sequence[str] = ()) -> Verdict | Algebra:
    """Compare without algebra; what algebra would have to show where that is not enough.

    A plain number equals only a plain number: ``3+5`` is not yet the answer 8 (else a policy could be rewarded for
    leaving the work undone), and a score ``2-1`` is not 1.
    """
    if choices:
        letter = resolve_choice(gold, choices)
        if letter:
            return _choice_verdict(answer, letter, choices)
    wanted = clean(gold)
    too_long = max(len(answer), len(wanted)) > MAX_ANSWER_CHARS
    if too_long or not clean(answer) or not wanted:  # nothing but punctuation
        same = bool(answer.strip()) and answer.strip() == gold.strip()
        return Verdict(True, "exact") if same else WRONG
    lettered = len(wanted) == 1 and "A" <= wanted <= "Z"  # a choice question whose choices are not at hand
    open_question: Algebra | None = None
    for given in readings(answer):
        if given == wanted:
            return Verdict(True, "exact")
        if lettered:
            if split_letter(given) == (wanted, ""):
                return Verdict(True, "choice")
            continue
        found = equal(given, wanted)
        if found is True:
            return Verdict(True, "exact" if same_text(given, wanted) else "numeric")
        if isinstance(found, Algebra) and open_question is None:
            open_question = found
    return open_question or WRONG


def _choice_verdict(answer: str, letter: str, choices: Sequence[str]) -> Verdict | Algebra:
    """Whether the answer is that choice; an expression may be the choice's text in another form."""
    found = resolve_choice(answer, choices)
    if found:
        return Verdict(True, "choice") if found == letter else WRONG
    wanted = clean(choices[ord(letter) - ord("A")])
    if max(len(answer), len(wanted)) > MAX_ANSWER_CHARS:
        return WRONG
    for given in readings(answer):
        lettered = split_letter(given)
        named = lettered is not None and ord(lettered[0]) - ord("A") < len(choices)
        if named and lettered and lettered[0] != letter:
            continue
        verdict = equal(lettered[1] if named and lettered else given, wanted)
        if isinstance(verdict, Algebra):
            return verdict
    return WRONG


def answer_key(answer: str, choices: Sequence[str] = ()) -> str:
    """A canonical form: two answers with the same key are the same vote.

    A choice's letter where the question has choices and the answer names one, the reduced fraction of a number
    (``50%`` votes with ``0.5``), the normalised text otherwise.
    """
    letter = resolve_choice(answer, choices) if choices else None
    if letter:
        return f"choice {letter}"
    for reading in readings(answer):
        quantity = parse_quantity(reading)
        if quantity:
            unit = " or ".join(sorted(f"{size} {sorted(names)}" for size, names in quantity[1]))
            return f"number {quantity[0].value} {unit}".rstrip()
    return f"text {normalize(answer) or answer.strip()}"
