"""Numbers as people write them: exact, with percent signs and units, alone or in lists. Arithmetic of bounded size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from mstar_mega.rewards.units import split_unit

MAX_NUMBER_CHARS = 128
MAX_EXPONENT = 300
MAX_LIST_CHARS = 512


@dataclass(frozen=True)
class Number:
    """A number as written: ``50%`` is Fraction(1, 2) with ``percent`` set."""

    value: Fraction
    percent: bool = False


_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_DECIMAL = re.compile(rf"([+-]?)({_UNSIGNED})(?:e([+-]?[0-9]{{1,5}}))?")
_POWER_OF_TEN = re.compile(
    rf"([+-]?)(?:({_UNSIGNED}) ?(?:\\times|\\cdot|[×*·x]) ?)?10(?:\^|\*\*)"
    r"(?:\{([+-]?[0-9]{1,5})\}|([+-]?[0-9]{1,5}))"
)
_RATIO = re.compile(rf"([+-]?)(?:([0-9]+) )?([+-]?{_UNSIGNED})/([+-]?{_UNSIGNED})")
_FRAC = re.compile(
    rf"([+-]?)([0-9]+)? ?\\[dt]?frac ?(?:\{{([+-]?{_UNSIGNED})\}}\{{([+-]?{_UNSIGNED})\}}|([0-9])([0-9]))"
)
_PERCENT = re.compile(r" ?(?:%|percent)$")
_DEGREES = re.compile(r" ?(?:°|\^\\circ|\^\{\\circ\}|degrees?)$")


def _scaled(sign: str, digits: str, exponent: str) -> Fraction | None:
    power = int(exponent or "0")
    if abs(power) > MAX_EXPONENT:
        return None
    value = Fraction(digits.replace(",", "")) * Fraction(10) ** power
    return -value if sign == "-" else value


def _ratio(sign: str, whole: str | None, top: str, bottom: str) -> Fraction | None:
    numerator, denominator = (Fraction(part.replace(",", "")) for part in (top, bottom))
    if denominator == 0 or (whole and (numerator < 0 or denominator < 0)):
        return None
    value = int(whole or "0") + numerator / denominator
    return -value if sign == "-" else value


def parse_number(text: str) -> Number | None:
    """The number that the normalised ``text`` is, or None when it is anything else or too large to hold exactly.

    Understood: ASCII digits with thousands commas, decimals, exponents (``1e5``, ``3\\times10^{4}``), fractions
    (``3/4``, ``\\frac{3}{4}``, ``2 1/2``), a percent sign, degrees.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    bare = _PERCENT.sub("", text)
    percent = bare != text
    bare = _DEGREES.sub("", bare)
    value: Fraction | None = None
    if match := _DECIMAL.fullmatch(bare):
        value = _scaled(match[1], match[2], match[3])
    elif match := _POWER_OF_TEN.fullmatch(bare):
        value = _scaled(match[1], match[2] or "1", match[3] or match[4])
    elif match := _RATIO.fullmatch(bare):
        value = _ratio(match[1], match[2], match[3], match[4])
    elif match := _FRAC.fullmatch(bare):
        value = _ratio(match[1], match[2], match[3] or match[5], match[4] or match[6])
    if value is None:
        return None
    return Number(value / 100 if percent else value, percent)


def parse_quantity(text: str) -> tuple[Number, str] | None:
    """The number and the canonical unit (empty: none) that the normalised ``text`` is; None when it is no number."""
    number = parse_number(text)
    if number is not None:
        return number, ""
    bare, unit = split_unit(text)
    number = parse_number(bare) if unit else None
    return None if number is None else (number, unit)


def quantities_equal(first: tuple[Number, str], second: tuple[Number, str]) -> bool:
    """A unit may be left out, but not replaced by another."""
    return _numbers_equal(first[0], second[0]) and (first[1] == second[1] or not first[1] or not second[1])


_BRACKETS = {"(": ")", "[": "]"}


def parse_list(text: str) -> tuple[str, list[tuple[Number, str]]] | None:
    """(opening bracket or nothing, members) of a normalised list of at least two numbers; None for anything else."""
    if len(text) > MAX_LIST_CHARS or "," not in text:
        return None
    opening = text[0] if text[0] in _BRACKETS and text.endswith(_BRACKETS[text[0]]) else ""
    members = [parse_quantity(part.strip()) for part in (text[1:-1] if opening else text).split(",")]
    known = [member for member in members if member is not None]
    return (opening, known) if len(known) == len(members) else None


def lists_equal(answer: str, gold: str) -> bool | None:
    """Whether two lists of numbers have equal members in the same order; None where one is no such list.

    Brackets may be left out. Round and square ones are left to algebra: they may be intervals.
    """
    given, wanted = parse_list(answer), parse_list(gold)
    if given is None or wanted is None or (given[0] and wanted[0] and given[0] != wanted[0]):
        return None
    return len(given[1]) == len(wanted[1]) and all(
        quantities_equal(first, second) for first, second in zip(given[1], wanted[1], strict=True)
    )


def _numbers_equal(first: Number, second: Number) -> bool:
    """Exact equality; where only one has a percent sign, 50% is both 50 and 0.5, as people write it both ways."""
    if first.value == second.value:
        return True
    if first.percent == second.percent:
        return False
    return first.value * (100 if first.percent else 1) == second.value * (100 if second.percent else 1)
