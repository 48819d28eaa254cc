"""Choices: which letter an answer names."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from mstar_mega.rewards.dressing import MAX_ANSWER_CHARS, clean, encloses
from mstar_mega.rewards.equality import equal, same_text
from mstar_mega.rewards.frames import readings

_LETTER = re.compile(
    r"(?:(?:option|choice|answer|letter|选项|选) ?)?(?:\(([a-z])\)|\[([a-z])\]|(?<![a-z])([a-z])(?: ?选?项)?(?![\w'’]))"
    r"!?(?:[).:,] ?(?:[-→=] )?| ?[→=] ?| ?- | |(?<=[a-z])-|-(?![0-9.]))?(.+)?",
    re.IGNORECASE,
)
"""A dash sets a letter off (``B - 12``), and is the number's sign where something else does (``B. -12``)."""
_LETTER_BEHIND = re.compile(r"(.+?),? ?(?:\(([a-z])\)|\(?(?:option|choice) ?\(?([a-z])\)?\)?)", re.IGNORECASE)
_RIGHT = re.compile(
    r"(?:is )?(?:the )?(?:correct|right|true)(?: (?:answer|option|choice|one))?|is the answer", re.IGNORECASE
)


def split_letter(text: str) -> tuple[str, str] | None:
    """("B", "12") for ``B. 12``, ("B", "") for ``(b)``; None where the text does not begin with a choice's letter."""
    match = _LETTER.fullmatch(text) if len(text) <= 400 else None
    if match is None:
        return None
    rest = clean(match[4] or "")
    return (match[1] or match[2] or match[3]).upper(), clean(rest[1:-1]) if encloses(rest, "(", ")") else rest


@functools.lru_cache(maxsize=256)
def _cleaned(choices: tuple[str, ...]) -> list[str]:
    """Once for all responses to a query."""
    return [clean(choice) for choice in choices]


def _matching(text: str, choices: Sequence[str]) -> list[int]:
    """Indices of the choices whose text is this: as text if any is, otherwise as a number, quantity or list."""
    if not text:
        return []
    forms = _cleaned(tuple(choices))
    found = [index for index, form in enumerate(forms) if form and same_text(form, text)]
    return found or [index for index, form in enumerate(forms) if form and equal(text, form) is True]


def resolve_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that ``answer`` names, or None when it names none or is ambiguous.

    Read as a letter: ``B``, ``(b)``, ``B.``, ``Option B``. A lone letter is always the letter, also where it is the
    text of another choice, since a letter is what the question asks for. Letter and text together (``B. 12``) must
    agree. A text alone must be the text of exactly one choice; a unit may be left out of it, not replaced.
    """
    if len(choices) > 26:
        raise ValueError(f"a question has {len(choices)} choices; letters A to Z name at most 26")
    if len(answer) > MAX_ANSWER_CHARS:
        same = [index for index, choice in enumerate(choices) if choice.strip() == answer.strip()]
        return chr(ord("A") + same[0]) if len(same) == 1 else None
    for text in readings(answer):
        lettered = split_letter(text)
        index = ord(lettered[0]) - ord("A") if lettered else len(choices)
        if lettered and index < len(choices) and (not lettered[1] or _RIGHT.fullmatch(lettered[1])):
            return lettered[0]
        ends = text[-1:] == ")" or text[-2:-1] in (" ", "(")
        behind = _LETTER_BEHIND.fullmatch(text) if ends and len(text) <= 400 else None
        if behind and not lettered and not any(same_text(text, form) for form in _cleaned(tuple(choices))):
            letter, said = (behind[2] or behind[3]).upper(), _matching(clean(behind[1]), choices)
            if said:
                return letter if ord(letter) - ord("A") in said else None
        matches = _matching(text, choices)
        if matches:
            return chr(ord("A") + matches[0]) if len(matches) == 1 else None
        if lettered and index in _matching(lettered[1], choices):
            return lettered[0]
    return None
