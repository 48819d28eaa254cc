"""Find the option that a response in free text chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mstar_mega.rewards.choices import resolve_choice
from mstar_mega.rewards.dressing import normalize
from mstar_mega.rewards.prose import NO_ANSWER, declines, numbers, sentences, statements
from mstar_mega.rewards.quantities import parse_quantity

_IN_PARENTHESES = re.compile(r"\(([A-Z])\)")
_FIRST = re.compile(r"\(?([A-Z])\)?(?:[.):,]|$|\s)")
_ALONE = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")
_ARTICLE = re.compile(r"[AI] [a-z]")
_LISTED = re.compile(r"[ \t]*\([A-Z]\)[ \t]")
_WORD = re.compile(r"\w+")
_DENIES = re.compile(r"\b(?:not|no|never|neither|none)\b|n't\b", re.IGNORECASE)
_MAX_CHARS = 2000
_MAX_STATEMENT = 80
_MAX_BLOCK = 120
"""What may still be an answer by itself; a longer text is prose."""


def find_option(text: str, options: Mapping[str, str]) -> str:
    """A letter, an option's text or another short answer, or ``N/A``.

    In order: the whole text; what it states; letters in parentheses; option texts and lone letters in its last
    sentence; and, unless it declines to answer, what its last sentences hold of an option's words.
    """
    if text in options.values():
        return text
    if len(text) <= _MAX_BLOCK and "".join(options) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]:
        letter = resolve_choice(text, list(options.values()))
        if letter is not None:
            return letter
    text = _without_lists(text)
    stated = statements(text)
    for statement in stated:
        found = _of_statement(statement, options)
        if found is not None:
            return found
    parts = sentences(text)
    for part in reversed(parts):
        named = [letter for letter in _IN_PARENTHESES.findall(part) if letter in options]
        if named:
            return ", ".join(dict.fromkeys(named))
    last = parts[-1] if parts else ""
    if not declines(last):
        found = _contained(last, options) or _alone(last, options)
        if found is not None:
            return found
    if stated and len(stated[0]) <= _MAX_STATEMENT and (declines(stated[0]) or numbers(stated[0])):
        return stated[0].strip(" .*")
    if declines(text):
        return NO_ANSWER
    return (
        _contained(text, options)
        or _by_polarity(parts, options)
        or _by_words(parts, options)
        or _by_number(last, options)
        or NO_ANSWER
    )


def _without_lists(text: str) -> str:
    """The text without lines that only repeat the options."""
    lines = text.split("\n")
    listed = [bool(_LISTED.match(line)) for line in lines]
    if sum(listed) < 2:
        return text
    return "\n".join(line for line, is_listed in zip(lines, listed, strict=True) if not is_listed)


def _of_statement(statement: str, options: Mapping[str, str]) -> str | None:
    """The option that "the answer is ..." goes on to name."""
    stripped = statement.strip().strip("*`\"'$ ")
    first = _FIRST.match(stripped)
    if first and first[1] in options and not _ARTICLE.match(stripped):
        return first[1]
    named = _IN_PARENTHESES.search(stripped)
    if named and named[1] in options:
        return named[1]
    if declines(stripped):
        return None
    return _contained(stripped, options) or _alone(stripped, options)


def _alone(text: str, options: Mapping[str, str]) -> str | None:
    """The one letter that stands alone; "A" and "I" are words, too."""
    letters = {letter for letter in _ALONE.findall(text[-_MAX_CHARS:]) if letter in options and letter not in "AI"}
    return letters.pop() if len(letters) == 1 else None


def _contained(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text stands in ``text`` as words; of options inside one another the longest."""
    haystack = normalize(text[-_MAX_CHARS:])
    forms = {letter: normalize(option) for letter, option in options.items()}
    found = {
        letter: form
        for letter, form in forms.items()
        if form and re.search(rf"(?<![\w.]){re.escape(form)}(?!\w|\.\d)", haystack)
    }
    longest = [
        letter for letter, form in found.items() if not any(form != other and form in other for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _by_polarity(parts: list[str], options: Mapping[str, str]) -> str | None:
    """Yes or no, where these are the options and the text is a statement: whether its first sentence denies."""
    letters = {normalize(option): letter for letter, option in options.items()}
    if set(letters) != {"yes", "no"} or not parts:
        return None
    return letters["no" if _DENIES.search(parts[0]) else "yes"]


def _by_words(parts: list[str], options: Mapping[str, str]) -> str | None:
    """The one option all of whose words (of letters, without a plural's s) stand in one clause, the last such."""
    wanted = {letter: _words(option) for letter, option in options.items()}
    for part in reversed(parts[-3:]):
        for clause in reversed(part[-_MAX_CHARS:].split(",")):
            words = _words(clause)
            found = [letter for letter, needed in wanted.items() if len(needed) > 1 and needed <= words]
            if len(found) == 1:
                return found[0]
    return None


def _words(text: str) -> set[str]:
    return {word.rstrip("s") for word in _WORD.findall(text.lower()) if word.isalpha()}


def _by_number(text: str, options: Mapping[str, str]) -> str | None:
    """The last number, where the options are numbers: it may be none of them."""
    found = numbers(text)
    return found[-1] if found and all(_is_number(option) for option in options.values()) else None


def _is_number(option: str) -> bool:
    form = normalize(option)
    return parse_quantity(form) is not None or bool(re.match(r"[-+]?[0-9.]+ ?[^\W\d]{1,3}$", form))
