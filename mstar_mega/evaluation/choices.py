"""VLMEvalKit's rules that read an option out of a response (vlmeval/utils/matching_util.py), in our own words."""

from __future__ import annotations

import re
from collections.abc import Mapping

REFUSED = "Z"
"""The letter of no option."""

_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS = 4

MISSING_CELLS = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null"}
)  # fmt: skip
"""Cells that pandas reads as missing: to VLMEvalKit an option with such a text does not exist."""


def infer(response: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a response names, ``Z`` for a refusal, None where the rules cannot decide."""
    options = {letter: text for letter, text in options.items() if text not in MISSING_CELLS}
    return infer_letter(response, options) or infer_text(response, options)


def infer_letter(response: str, options: Mapping[str, str]) -> str | None:
    """By a letter that stands alone: it must be the only option's, and among the last four words.

    Else by the words "answer is X" anywhere.
    """
    if _API_FAILURE in response:
        return None
    if any(refusal in response for refusal in _REFUSALS):
        return REFUSED
    words = response.translate(_SEPARATORS).split()
    present = set(words)
    named = [letter for letter in options if letter in present]
    if len(named) == 1 and words.index(named[0]) > len(words) - _LAST_WORDS - 1:
        return named[0]
    if not named and REFUSED in present:
        return REFUSED
    stated = _STATED.search(response)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    return None


def infer_text(response: str, options: Mapping[str, str]) -> str | None:
    """By an option's text inside the response, in any case: exactly one option's, and the response not too long."""
    lowered = response.lower()
    if len(lowered) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else None
