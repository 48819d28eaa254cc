"""Yes or no: what a response says or, about something, states or denies."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mstar_mega.rewards.dressing import normalize
from mstar_mega.rewards.prose import declines

_NO_DOUBT = re.compile(
    r"\bno (?:doubt|question|problem)\b|\bwithout (?:a )?doubt\b|\bnot only\b|毫无疑问", re.IGNORECASE
)
_BOTH = re.compile(r"\W*(?:yes (?:or|and) no|no (?:or|and) yes)\b", re.IGNORECASE)
_FIRMLY = "(?:absolutely|certainly|definitely|of course)"
_NEGATIVE = re.compile(
    rf"\W*(?:(?:{_FIRMLY} )?not?|nope|nah|(?:(?:that|this|it)(?: is|'s) )?(?:false|incorrect|wrong))\b"
    r"|\W*(?:不|否|没(?!错)|无|错|非)",
    re.IGNORECASE,
)
_POSITIVE = re.compile(
    rf"\b(?:yes|yeah|yep|yup)\b|^\W*(?:correct|true|right|indeed|i think so|{_FIRMLY})\b"
    r"|^\W*(?:是(?!否)|对|正确|没错|有|可以|能|会|当然)",
    re.IGNORECASE,
)
_SMALL_TALK = re.compile(r"(?:sure|here|hello|sorry|please)\b", re.IGNORECASE)
_STATES = re.compile(
    r"^\W*(?:the|this|these|there|it|they|in)\b(?: \S+){2}"
    r"|\b(?:is|are|was|were|has|have|had|does|do|did|can|will|would|could)\b|n't\b",
    re.IGNORECASE,
)
_DENIES = re.compile(
    r"\b(?:not|no|never|neither|none)\b|n't\b|\b(?:is|are|was|were) (?:false|incorrect|wrong|untrue)\b", re.IGNORECASE
)


def yes_and_no(options: Mapping[str, str]) -> tuple[str, str] | None:
    """The letters of the options Yes and No, where these are the options."""
    letters = {normalize(option): letter for letter, option in options.items()}
    return (letters["yes"], letters["no"]) if set(letters) == {"yes", "no"} else None


def says_yes_or_no(sentence: str) -> bool:
    """Whether the sentence begins with it."""
    return bool(_NEGATIVE.match(sentence) or _POSITIVE.match(sentence))


def by_polarity(sentence: str, letters: tuple[str, str]) -> str | None:
    """Yes or no, of a response's first sentence; None where it is about nothing, declines, or says both."""
    sentence = _NO_DOUBT.sub(" ", sentence)
    if _BOTH.match(sentence) or declines(sentence):
        return None
    if _NEGATIVE.match(sentence):
        return letters[1]
    if _POSITIVE.search(sentence):
        return letters[0]
    if sentence.rstrip().endswith("?") or not _STATES.search(sentence) or _SMALL_TALK.match(sentence):
        return None
    return letters[1 if _DENIES.search(sentence) else 0]
