"""Find the answer that a response in free text gives: the last thing that it states, of the kind that is asked for.

Rules only, linear in the length of the text; nothing is evaluated. Training reads the block after the answer marker
(:func:`mstar_mega.rewards.answers.extract_answer`) and calls the rest prose; evaluation reads prose too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from mstar_mega.rewards.answers import extract_answer, normalize, parse_number

Kind = Literal["letter", "text", "integer", "float", "list"]

NO_ANSWER = "N/A"
"""What a reader writes down for a response that declines to answer."""
MAX_READ_CHARS = 1 << 16
"""Of a longer response only the end is read."""

_CONTINUED = re.compile(r"\n\s*(?:Question|Hint|Human|User|Instruction)\s*:", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed ?\{((?:[^{}]|\{[^{}]{0,200}\}){0,500})\}")
_STATED = re.compile(
    r"\b(?:answer|solution|result|final (?:value|list|integer|number)|(?:correct )?(?:option|choice)(?: letter)?)\b"
    r"[^.\n:]{0,60}?(?:\bis\b|\bare\b|\bbe\b|:|=)[ \t]*(?:\n+(?=\S))?([^\n]{1,300})",
    re.IGNORECASE,
)
_DECLINED = re.compile(
    r"\b(?:not (?:possible|able)|cannot|can't|can not|unable|impossible|(?:not|n't) (?:\w+ ){0,4}(?:enough|sufficient|any)"
    r"|insufficient|without (?:\w+ ){0,5}(?:information|context|details|data|image)|please provide|need (?:\w+ ){0,3}more "
    r"|undefined|none of the|no (?:\w+ )?(?:correct )?(?:answer|option))",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?![\d])|(?<![\w.])[-+]?\.\d+"
)
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b", re.IGNORECASE)
_COUNTED = re.compile(
    rf"\bthere (?:are|is|were|was|will be|would be)(?: \w+){{0,3}}? ({'|'.join(_WORDS)}|\d+)\b", re.IGNORECASE
)
_LIST = re.compile(r"\[[^\[\]]{0,2000}\]")
_BETWEEN = re.compile(r"\b(?:between|from)\b[^.\n]{0,60}?(\d+)[^.\n]{0,30}?\b(?:and|to)\b[^.\n\d]{0,30}(\d+)", re.I)


def find_answer(response: str, kind: Kind, options: Mapping[str, str] | None = None) -> str:
    """The extracted answer: a letter or an option's text, a number, a list; ``N/A`` where the response gives none."""
    text = response[-MAX_READ_CHARS:].strip()
    marked = extract_answer(text)
    if marked is not None:
        text = marked
    else:
        cut = _CONTINUED.search(text)  # a policy that goes on to ask itself the next question
        text = text[: cut.start()].strip() if cut and cut.start() else text
    if kind in ("letter", "text"):
        from mstar_mega.rewards.options import find_option

        return find_option(text, options or {}) if options else text
    return _find_list(text) if kind == "list" else _find_number(text)


def statements(text: str) -> list[str]:
    """What the text says its answer is, the last statement last."""
    return [match[1].strip() for match in _STATED.finditer(text)]


def boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{}``."""
    found = _BOXED.findall(text)
    return found[-1] if found else None


def declines(text: str) -> bool:
    """Whether the text says that it cannot answer."""
    return bool(_DECLINED.search(text))


def plain_number(text: str) -> str:
    """A number as the benchmarks' rules can read it: no thousands commas, a usual minus sign."""
    return text.replace(",", "").replace("\u2212", "-").lstrip("+")


def numbers(text: str) -> list[str]:
    """All numbers of a text, as :func:`plain_number`; a hyphen after a letter or digit is no sign."""
    return [plain_number(match[0]) for match in _NUMBER.finditer(text)]


def _find_number(text: str) -> str:
    whole = parse_number(normalize(text)) if len(text) < 128 else None
    if whole is not None and numbers(text):
        return numbers(text)[0] if len(numbers(text)) == 1 else text
    for statement in (boxed(text), *reversed(statements(text))):
        found = numbers(_without_units(statement)) if statement else []
        if found:
            return found[-1] if "=" in (statement or "") else found[0]
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)[-1]
    counted = _COUNTED.search(sentence)
    if counted:
        word = counted[1].lower()
        return str(_WORDS.index(word)) if word in _WORDS else word
    found = numbers(_without_units(sentence)) or ([] if declines(sentence) else numbers(_without_units(text)))
    if found:
        return found[-1]
    word_numbers = [] if declines(sentence) else _WORD.findall(sentence)
    return str(_WORDS.index(word_numbers[-1].lower())) if word_numbers else NO_ANSWER


_POWER = re.compile(r"\^\{?-?\d+\}?|(?<=[a-z])\^\d|\\mathrm\s*\{[^{}]{0,40}\}")


def _without_units(text: str) -> str:
    """Exponents and units of LaTeX are no numbers of their own."""
    return _POWER.sub(" ", text)


def _find_list(text: str) -> str:
    lists = [found for found in _LIST.findall(text) if len(found) > 2]
    between = _BETWEEN.search(text.rpartition("\n")[2])
    if between:
        return f"[{between[1]}, {between[2]}]"
    if lists:
        return str(lists[-1])
    return NO_ANSWER if declines(text) or not numbers(text) else f"[{', '.join(numbers(text))}]"
