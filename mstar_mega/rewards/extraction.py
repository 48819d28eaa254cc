"""Find the answer that a response gives, of the kind that is asked for: what training and evaluation read alike.

A block after the answer marker (:func:`mstar_mega.rewards.answers.extract_answer`) is the answer; without one, prose is
read for what it states last. Nothing is evaluated, and the time is bounded whatever the response is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from mstar_mega.rewards.answers import extract_answer
from mstar_mega.rewards.dressing import clean, compatible
from mstar_mega.rewards.options import find_option
from mstar_mega.rewards.prose import NO_ANSWER, declines, first_turn, numbers, sentences, statements
from mstar_mega.rewards.quantities import WORDS, number_words, parse_quantity, read_number_words

Kind = Literal["letter", "text", "integer", "float", "list"]

MAX_READ_CHARS = 1 << 14
"""Of a longer response only the end is read."""

_ASIAN = re.compile("[\u3000-\u9fff\uff00-\uffef]")
_COUNTED = re.compile(
    r"\bthere (?:are|is|were|was|will be|would be)(?: [a-z]{1,20}){0,3}? ((?:" + WORDS + r"|no)\b|[0-9]+\b)"
    r"|^(no) (?:[a-z]{1,20} ){1,3}(?:is|are|was|were|remain|remains)\b",
    re.IGNORECASE,
)
_COMPOUND = re.compile(r"[/\\^×{]|[0-9] [0-9]|\b[mM]inus\b|\b[nN]egative\b|^[^0-9]*$|[^\x00-\x7f]")
"""A number that is more than digits, if the statement is one."""
_OUT_OF = re.compile(r"([0-9]+) (?:[a-z]{1,20} ){0,3}(?:out )?of (?:the )?[0-9]+\b")
_REASON = re.compile(r",? (?:since|because|as there) ", re.IGNORECASE)
_MAX_VALUE = 100
"""A longer text is more than a value."""
_LIST = re.compile(r"\[[^\[\]]{1,2000}\]")
_BETWEEN = re.compile(
    r"\b(?:between|from)\b[^.\n]{0,60}?((?<![0-9])-?[0-9]+)[^.\n]{0,30}?\b(?:and|to)\b[^.\n0-9]{0,30}?(-?[0-9]+)",
    re.IGNORECASE,
)


def find_answer(response: str, kind: Kind, options: Mapping[str, str] | None = None) -> str:
    """The extracted answer: a letter or an option's text, a number, a list; ``N/A`` where the response gives none."""
    text = response[-MAX_READ_CHARS:].rpartition("</think>")[2].strip()
    if not text.isascii() and _ASIAN.search(text):
        text = compatible(text)
    marked = extract_answer(text)
    text = first_turn(text) if marked is None else marked
    if options:
        return find_option(text, options)
    if kind in ("integer", "float"):
        return _find_number(text, kind)
    if kind == "list":
        return _find_list(text)
    return marked or next(iter(statements(text)), text) or NO_ANSWER


def _find_number(text: str, kind: Kind) -> str:
    whole = _value(text, kind) if len(text) <= _MAX_VALUE and _COMPOUND.search(text) else None
    if whole:
        return whole
    for statement in statements(text):
        value = _value(statement, kind) if _COMPOUND.search(statement) else None
        if value:
            return value
        found = numbers(statement)
        if found:
            return found[0] if "=" not in statement or _begins_with_number(statement) else found[-1]
    parts = sentences(text)
    last = parts[-1] if parts else ""
    said = _REASON.split(last, maxsplit=1)[0]  # "12, since there were 15 and 3 are gone"
    last = said if numbers(said) else last
    if "=" in last:
        behind = numbers(last.rpartition("=")[2])
        if behind:
            return behind[-1]
    counted = _COUNTED.search(last)
    count = (counted[1] or counted[2]).lower() if counted else ""
    if count and not (count == "no" and declines(last)):
        return "0" if count == "no" else read_number_words(count)
    part = _OUT_OF.match(text)
    if part:
        return part[1]
    found = numbers(last) or ([] if declines(last) else numbers(text))
    if found:
        return found[-1]
    words = [] if declines(last) else number_words(last)
    return words[-1] if words else NO_ANSWER


def _begins_with_number(equation: str) -> bool:
    """Whether the equation's left side is one number."""
    left = equation.partition("=")[0]
    return numbers(left) == [left.strip("$* ")]


def _value(statement: str, kind: Kind) -> str | None:
    """The number that a statement is as a whole: a fraction, a power of ten, a word, with LaTeX and units around it."""
    quantity = parse_quantity(clean(statement))
    if quantity is None or quantity[0].percent:
        return None
    value = quantity[0].value
    written = numbers(statement)
    if len(written) == 1 and (written[0] == str(value) or Fraction(written[0]) == value):
        return None  # as it is written
    if value.denominator == 1 and kind == "integer":
        return str(int(value))
    return str(float(value)) if kind == "float" else None


def _find_list(text: str) -> str:
    between = _BETWEEN.search(text.rpartition("\n")[2])
    if between:
        return f"[{between[1]}, {between[2]}]"
    lists = _LIST.findall(text)
    if lists:
        return str(lists[-1])
    return NO_ANSWER if declines(text) or not numbers(text) else f"[{', '.join(numbers(text))}]"
