"""Find the option that a response in free text chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mstar_mega.rewards.answers import normalize, resolve_choice
from mstar_mega.rewards.extraction import NO_ANSWER, boxed, declines, statements

_IN_PARENTHESES = re.compile(r"\(([A-Z])\)")
_FIRST = re.compile(r"\(?([A-Z])\)?(?:[.):,]|$|\s)")
_ALONE = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")
_MAX_OPTION_CHARS = 2000


def find_option(text: str, options: Mapping[str, str]) -> str:
    """A letter, an option's text, or ``N/A``: what the text states, names in parentheses, or contains, in that order."""
    if text in options.values():
        return text
    letter = resolve_choice(text, list(options.values())) if _is_lettered(options) else None
    if letter is not None:
        return letter
    for statement in (boxed(text), *reversed(statements(text))):
        found = _of_statement(statement, options) if statement else None
        if found is not None:
            return found
    named = [found for found in _IN_PARENTHESES.findall(text) if found in options]
    if named:
        return str(named[-1])
    paragraphs = [part for part in text.split("\n") if part.strip()]
    last = paragraphs[-1] if paragraphs else ""
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", last)[-1]
    for part in (sentence, last):
        if not declines(part):
            contained = _contained(part, options)
            if contained is not None:
                return contained
    alone = [found for found in _ALONE.findall(sentence) if found in options and found not in "AI"]
    if len(set(alone)) == 1:
        return str(alone[0])
    if declines(text):
        return NO_ANSWER
    return _contained(text, options) or _first_word(text, options) or NO_ANSWER


def _is_lettered(options: Mapping[str, str]) -> bool:
    return "".join(options) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]


def _of_statement(statement: str, options: Mapping[str, str]) -> str | None:
    """The option that "the answer is ..." goes on to name."""
    stripped = statement.strip().strip("*`\"'$ ")
    first = _FIRST.match(stripped)
    if first and first[1] in options:
        return first[1]
    named = _IN_PARENTHESES.search(stripped)
    if named and named[1] in options:
        return named[1]
    if declines(stripped):
        return None
    found = _contained(stripped, options)
    if found is not None:
        return found
    alone = [letter for letter in _ALONE.findall(stripped) if letter in options and letter not in "AI"]
    return alone[0] if len(set(alone)) == 1 else None


def _contained(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text stands in ``text`` as words; of options inside one another the longest."""
    haystack = normalize(text[-_MAX_OPTION_CHARS:])
    forms = {letter: normalize(option) for letter, option in options.items()}
    found = {
        letter: form
        for letter, form in forms.items()
        if form and re.search(rf"(?<![\w.]){re.escape(form)}(?![\w]|\.\d)", haystack)
    }
    longest = [
        letter for letter, form in found.items() if not any(form != other and form in other for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _first_word(text: str, options: Mapping[str, str]) -> str | None:
    """Yes or no, and its like, at the very start."""
    start = normalize(text[:200]).split(",")[0].split(" ")[0]
    return next((letter for letter, option in options.items() if normalize(option) == start), None)
