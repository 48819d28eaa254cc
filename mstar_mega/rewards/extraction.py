"""Find the answer that a response gives, of the kind that is asked for: what training and evaluation read alike.

A block after the answer marker (:func:`mstar_mega.rewards.answers.extract_answer`) is the answer; without one, prose is
read for what it states last. Nothing is evaluated, and the time is bounded whatever the response is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from mstar_mega.rewards.answers import extract_answer
from mstar_mega.rewards.options import find_option
from mstar_mega.rewards.prose import NO_ANSWER, declines, first_turn, numbers, sentences, statements

Kind = Literal["letter", "text", "integer", "float", "list"]

MAX_READ_CHARS = 1 << 14
"""Of a longer response only the end is read."""

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b", re.IGNORECASE)
_COUNTED = re.compile(
    rf"\bthere (?:are|is|were|was|will be|would be)(?: [a-z]{{1,20}}){{0,3}}? ({'|'.join(_WORDS)}|[0-9]+)\b", re.I
)
_LIST = re.compile(r"\[[^\[\]]{1,2000}\]")
_BETWEEN = re.compile(
    r"\b(?:between|from)\b[^.\n]{0,60}?([0-9]+)[^.\n]{0,30}?\b(?:and|to)\b[^.\n0-9]{0,30}([0-9]+)", re.IGNORECASE
)


def find_answer(response: str, kind: Kind, options: Mapping[str, str] | None = None) -> str:
    """The extracted answer: a letter or an option's text, a number, a list; ``N/A`` where the response gives none."""
    text = response[-MAX_READ_CHARS:].strip()
    marked = extract_answer(text)
    text = first_turn(text) if marked is None else marked
    if options:
        return find_option(text, options)
    if kind in ("integer", "float"):
        return _find_number(text)
    if kind == "list":
        return _find_list(text)
    return marked or next(iter(statements(text)), text) or NO_ANSWER


def _find_number(text: str) -> str:
    for statement in statements(text):
        found = numbers(statement)
        if found:
            return found[-1] if "=" in statement else found[0]
    parts = sentences(text)
    last = parts[-1] if parts else ""
    if "=" in last:
        behind = numbers(last.rpartition("=")[2])
        if behind:
            return behind[-1]
    counted = _COUNTED.search(last)
    if counted:
        word = counted[1].lower()
        return str(_WORDS.index(word)) if word in _WORDS else word
    found = numbers(last) or ([] if declines(last) else numbers(text))
    if found:
        return found[-1]
    words = [] if declines(last) else _WORD.findall(last)
    return str(_WORDS.index(words[-1].lower())) if words else NO_ANSWER


def _find_list(text: str) -> str:
    between = _BETWEEN.search(text.rpartition("\n")[2])
    if between:
        return f"[{between[1]}, {between[2]}]"
    lists = _LIST.findall(text)
    if lists:
        return str(lists[-1])
    return NO_ANSWER if declines(text) or not numbers(text) else f"[{', '.join(numbers(text))}]"
