"""What stands around a stated answer: "The answer is 12", "Option B is correct", "- 12", "x = 5", "2 + 3 = 5"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mstar_mega.rewards.dressing import clean
from mstar_mega.rewards.units import split_unit

_NAMED = "(?:option |choice |letter )?"
_LEADS = (
    r"(?:so|thus|therefore|hence|then|finally|and|in conclusion)\b[,:]? ?|(?:[∴⇒→]|=>) ?",
    r"(?:the |my |our )?(?:(?:final|correct|right|best) )*(?:answer|ans|result|solution|option|choice)(?: letter)?"
    rf"(?: (?:to|for|of) [^:=.]{{1,60}}?)? ?(?:is|are|would be|should be|must be|:|=)[: ]*{_NAMED}",
    rf"(?:it is|it's|it must be|that is|that's|there (?:are|is)|a total of|equals|is|(?:(?:it|this|that|which) )?gives)"
    rf"[: ]+{_NAMED}",
    r"(?:it|this|that|the answer) (?=can(?:not|'t| not)\b)|ans\. |(?:at|in) (?=[0-9])",
    rf"(?:i|we)(?: would|'d)? (?:choose|pick|select|go with|think|get|have)(?: it is| it's| that)?[: ]+{_NAMED}",
    "(?:因此|所以|因而|综上所述|综上|故)[,:]? ?",
    "(?:正确|最终|最后)?的?(?:答案|选项|结果)(?:应该|应)?(?:是|为|选)?:? ?|(?:本题|应该|应|我)?选择?:? ?|等于 ?",
)
_LEAD = re.compile("|".join(_LEADS), re.IGNORECASE)
_TAIL = re.compile(
    r" (?:is|are|would be) (?:(?:the )?(?:(?:correct|right|final|best|true) ?)+(?:answer|option|choice|one|result)?"
    r"|the (?:answer|result|solution|one))$| \(?approx(?:imately|\.)?\)?$| in total$|是(?:正确的?|对的)(?:答案|选项)?$",
    re.IGNORECASE,
)
_IS = re.compile(
    r"(?:[^.;:?!]{1,80}? (?:is|are|was|were|equals|measures|costs|will be|would be) (?:equal to )?"
    r"|(?![A-Z]\b)[A-Za-z][A-Za-z _]{0,40}: |[^.,;:?!=\s]{1,40}(?:等于|是|为) ?)(\S.*)"
)
_DENIES = re.compile(
    r"\b(?:not|no|never|neither|nor|either|or|if|unless|because|since|cannot|false|wrong|doubt)\b|n't\b|不|非", re.I
)
_ABOUT = re.compile(
    r"(?:approximately|approx\.?|about|roughly|around|exactly|equal to|大约|约) ?|≈ ?|= ?", re.IGNORECASE
)
_ITEM = re.compile(r"(?:[>•*+#-]+) +(?=\S)")


def readings(answer: str) -> list[str]:
    """The cleaned answer, and what it states where it is a sentence or an item of a list: first come, first right."""
    text = clean(answer)
    found = [text]
    if len(text) > 400 or (text and text[0].isdigit() and text[-1].isdigit()):
        return found
    item = _ITEM.match(text)
    if item:
        found.append(clean(text[item.end() :]))
    stated = _stated(found[-1])
    if stated != found[-1]:
        found.append(stated)
    return found


def _stated(text: str) -> str:
    for _ in range(4):
        lead = _LEAD.match(text)
        if lead and lead.end() < len(text):
            text = clean(text[lead.end() :])
            continue
        tail = _TAIL.search(text)
        if tail and tail.start() and not _DENIES.search(text):
            text = clean(text[: tail.start()])
            continue
        about = _ABOUT.match(text)
        if about and about.end() < len(text):
            text = clean(text[about.end() :])
            continue
        sentence = _IS.fullmatch(text)
        if sentence and not _DENIES.search(text):
            text = clean(sentence[1])
            continue
        break
    return text


_SIDES = re.compile(r"[=≈]")
_NO_CHAIN = re.compile(r"[<>≤≥≠!]|\\(?:leq?|geq?|neq?|lt|gt)(?![a-z])|==")
_SEVERAL = re.compile(r"=[^=]*(?:[,;]|\bor\b|\band\b) ?[A-Za-z]\w{0,3} ?=")
"""``x=1, y=2`` is a list of equations."""
_NAME = re.compile(
    r"(?:[^\W\d]|[∠△\\|])(?:[\w∠△\\|'(), ]|(?<=[_a-zA-Z])[{}]|\{[A-Za-z]+\}|(?<=\w)\}){0,60}|\((?:[a-z], ?){1,3}[a-z]\)"
)
_VALUE = re.compile(
    r"(?<![A-Za-z])(?:pi|infty|e|i|sqrt|frac|sin|cos|tan|cot|sec|csc|log|ln|exp|lim)(?![A-Za-z])|[π∞√]|^true$|^false$"
)
_SYMBOL = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?")
_LABELLED = re.compile(r"(?:(?:the )?points? )?(?:([A-Z]'?) ?)?(\([-+0-9.][^()]*,[^()]*\))")
"""``P(2, 3)`` and "point (2, 3)"."""
_ARGUMENT_OF_DIGITS = re.compile(r"(?<![A-Za-z0-9_{])[0-9]")


@dataclass(frozen=True)
class Chain:
    """``x = y = 5``: what has a value, the names that it is given to, and whether a sign says "nearly"."""

    members: tuple[str, ...]
    names: frozenset[str]
    nearly: bool


def chain(text: str) -> Chain:
    """The sides of a cleaned chain of equations; a text without an equation is its own only member."""
    if labelled := _LABELLED.fullmatch(text) if text[:1] in "ABCDEFGHIJKLMNOPQRSTUVWXYZtp" else None:
        return Chain((labelled[2],), frozenset(labelled[1].casefold() if labelled[1] else ()), False)
    if not _SIDES.search(text) or _NO_CHAIN.search(text) or _SEVERAL.search(text):
        return Chain((text,), frozenset(), False)
    sides: list[str] = []
    depth, start = 0, 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char in "=≈" and depth == 0:
            sides.append(text[start:index])
            start = index + 1
    sides = [side for side in (clean(each) for each in (*sides, text[start:])) if side]
    names = [side for side in sides if is_name(side)]
    names = [name for name in names if not any(_occurs(name, side) for side in sides if side not in names)]
    members = tuple(side for side in sides if side not in names) or tuple(sides[-1:])
    short = frozenset(re.sub(r"[\s{}_]", "", name.casefold()) for name in names if name not in members)
    return Chain(members, short, "≈" in text)


def is_name(side: str) -> bool:
    """Whether one side of an equation only names: ``x_{1}``, ``f(x)``, ``∠ABC``, ``The area``."""
    return bool(
        _NAME.fullmatch(side)
        and (side in ("e", "i") or not _VALUE.search(side))
        and not _DENIES.search(side)
        and not (_ARGUMENT_OF_DIGITS.search(side) and " " in side)
    )


def _occurs(name: str, side: str) -> bool:
    """Whether the side is an expression of that name: ``x = x + 1`` says what x is no more than ``0 = 1``."""
    return bool(
        _SYMBOL.fullmatch(name) and re.search(rf"(?<![A-Za-z\\]){re.escape(name)}(?![A-Za-z])", split_unit(side)[0])
    )
