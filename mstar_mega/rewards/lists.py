"""A cleaned answer as the list that it is: where it is cut, and whether it says in which order."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from mstar_mega.rewards.dressing import encloses
from mstar_mega.rewards.frames import chain
from mstar_mega.rewards.quantities import MAX_LIST_CHARS, parse_quantity

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_JOINT = re.compile(r"(?:, ?|; ?)?\b(and|or)\b |([;,]) |(;)|(,)")
_PARTS = re.compile(r"(?<=[A-Za-z'\"°]),? ?(?:and )?(?=[0-9])")
"""Between the parts of ``3 ft 4 in`` or ``1 hour and 30 minutes``."""
_THOUSANDS = re.compile(r"[^0-9]*[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]).*")


@dataclass(frozen=True)
class Members:
    """A list: its opening bracket (or nothing), what it holds, and whether it says in which order."""

    opening: str
    items: tuple[str, ...]
    ordered: bool


@functools.lru_cache(maxsize=1024)
def parse_list(text: str) -> Members | None:
    """The members of a list of at least two; None for anything else. ``±3`` is -3 and 3 in no order.

    Members are set apart by commas, semicolons, "and" or "or". A comma between digits is one where it cannot group
    thousands, and where the list has other marks it is none: ``1,234, 5,678`` has two members.
    """
    if len(text) > MAX_LIST_CHARS:
        return None
    text = text.replace("\\{", "{").replace("\\}", "}").replace("\\langle", "(").replace("\\rangle", ")").strip()
    opening = text[0] if text[:1] in _BRACKETS and encloses(text, text[0], _BRACKETS[text[0]]) else ""
    inner = text[1:-1].strip() if opening else text
    marks, items = _split(inner)
    if marks == {"bare"} and not opening and _THOUSANDS.fullmatch(inner):
        items = [inner]
    parts = _PARTS.split(inner) if not opening and inner[:1].isdecimal() else ()
    if len(parts) > 1 and all(quantity and quantity[1] for quantity in map(parse_quantity, parts)):
        return Members("", tuple(parts), True)
    names = [chain(item) for item in items]
    labels = [next(iter(each.names)) for each in names if len(each.names) == 1]
    values = [each.members[0] if len(each.members) == 1 else item for each, item in zip(names, items, strict=True)]
    if labels != sorted(labels):  # y = 3, x = 2 is x = 2, y = 3, and (y, x) is not (x, y)
        if len(labels) < len(items):
            return None
        values = [value for _, value in sorted(zip(labels, values, strict=True))]
    signed = [value for value in values if "±" in value]
    if signed:
        values = [
            value.replace("±", sign, 1).lstrip("+") for value in values for sign in ("+-" if "±" in value else "+")
        ]
    if len(values) < 2 or not all(values):
        return None
    return Members(opening, tuple(values), not (signed or "or" in marks or opening == "{"))


def _split(text: str) -> tuple[set[str], list[str]]:
    """The marks between members outside brackets, and the members; bare commas are marks where there is no other."""
    places: list[tuple[int, int, str]] = []
    depth, position = 0, 0
    while position < len(text):
        char = text[position]
        depth += (char in "([{") - (char in ")]}")
        mark = _JOINT.match(text, position) if depth == 0 and char in ",;aAoO" else None
        if mark and (char in ",;" or position == 0 or not text[position - 1].isalnum()):
            places.append((position, mark.end(), (mark[1] or "").lower() or mark[2] or mark[3] or "bare"))
            position = mark.end()
        else:
            position += 1
    if any(mark != "bare" for *_, mark in places):
        grouped = [place for place in places if place[2] == "bare" and re.match(r"[0-9]{3}(?![0-9])", text[place[1] :])]
        places = [place for place in places if place not in grouped]
    items, start = [], 0
    for begin, end, _ in places:
        items.append(text[start:begin].strip())
        start = end
    return {mark for *_, mark in places}, [*items, text[start:].strip()]
