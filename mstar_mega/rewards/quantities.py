"""Numbers as people write them: exact, with percent signs and units, alone or in lists. Arithmetic of bounded size."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

import cn2an
from text_to_num import alpha2digit, text2num

from mstar_mega.rewards.units import NONE, Unit, split_unit

MAX_NUMBER_CHARS = 128
MAX_EXPONENT = 300
MAX_LIST_CHARS = 512


@dataclass(frozen=True)
class Number:
    """A number as written: ``50%`` is Fraction(1, 2) with ``percent`` set."""

    value: Fraction
    percent: bool = False


Quantity = tuple[Number, Unit]

_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:[ '][0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_PLAIN = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")
_DECIMAL = re.compile(rf"([+-]? ?)({_UNSIGNED})(?:[eE]([+-]?[0-9]{{1,5}}))?")
_TIMES = r" ?(?:\\times|\\cdot|[×*·xX]) ?"
_POWER_OF_TEN = re.compile(
    rf"([+-]? ?)(?:({_UNSIGNED}){_TIMES})?10 ?(?:\^|\*\*) ?(?:\{{ ?([+-]?[0-9]{{1,5}}) ?\}}|([+-]?[0-9]{{1,5}}))"
)
_RATIO = re.compile(rf"([+-]? ?)(?:([0-9]+) (?:and )?)?([+-]?{_UNSIGNED}) ?/ ?([+-]?{_UNSIGNED})")
_PART_OF_FRAC = r"\{ ?((?:[^{}]|\{[^{}]*\})*?) ?\}"
_FRAC = re.compile(rf"([+-]? ?)([0-9]+)? ?\\frac ?(?:{_PART_OF_FRAC}|([0-9])) ?(?:{_PART_OF_FRAC}|([0-9]))")
_REPEATING = re.compile(
    r"([+-]? ?)([0-9]+)\.([0-9]*)(?:\\(?:overline|bar|dot) ?(?:\{ ?([0-9]+) ?\}|([0-9]))|\(([0-9]+)\))"
)
_CONTINUED = re.compile(r"([+-]? ?)([0-9]+)\.([0-9]*?)([0-9]+?)\4+…")
_PERCENT = re.compile(r" ?(?:%|per ?cent|pct|percentage points)\.?$", re.IGNORECASE)
WORDS = (
    "(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion)"
)
_WORDS = re.compile(rf"(?:\b(?:minus|negative) )?\b{WORDS}\b(?:(?:[ -]| and | point ){WORDS}\b){{0,12}}", re.IGNORECASE)
_CHINESE = re.compile("负?[0-9]{0,9}[零一二两三四五六七八九十百千万亿点]{1,16}(?:分之[一二两三四五六七八九十百]{1,8})?")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"([+-]?[0-9.,]{{1,20}}|an?) ({'|'.join(_SCALES)})\b", re.IGNORECASE)
_PARTS = ("half", "third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_PART = re.compile(
    rf"(?:([\w -]{{1,60}}?) and )?(?:([\w -]{{1,60}}?)[ -])?({'|'.join(_PARTS)}|halve|fourth)s?", re.IGNORECASE
)
_ENCLOSED = re.compile(r"(?:\(|\[|\\\{)([^,;()\[\]]+?)(?:\)|\]|\\\})")
_MINUS = re.compile(r"(?:minus|negative|负)(?: |(?=[0-9]))", re.IGNORECASE)


def _scaled(sign: str, digits: str, exponent: str | None) -> Fraction | None:
    power = int(exponent or "0")
    if abs(power) > MAX_EXPONENT:
        return None
    value = Fraction(re.sub("[, ']", "", digits)) * Fraction(10) ** power
    return -value if sign.startswith("-") else value


def _ratio(sign: str, whole: str | None, top: str, bottom: str) -> Fraction | None:
    numerator, denominator = _undivided(top), _undivided(bottom)
    if numerator is None or denominator is None or denominator == 0 or (whole and (numerator < 0 or denominator < 0)):
        return None
    value = int(whole or "0") + numerator / denominator
    return -value if sign.startswith("-") else value


def _repeating(sign: str, whole: str, fixed: str, period: str) -> Fraction:
    value = Fraction(int(whole + fixed + period) - int(whole + fixed), (10 ** len(period) - 1) * 10 ** len(fixed))
    return -value if sign.startswith("-") else value


def _undivided(bare: str) -> Fraction | None:
    if _PLAIN.fullmatch(bare):
        return Fraction(bare)
    if match := _DECIMAL.fullmatch(bare):
        return _scaled(match[1], match[2], match[3])
    if match := _POWER_OF_TEN.fullmatch(bare):
        return _scaled(match[1], match[2] or "1", match[3] or match[4])
    return None


def _value(bare: str) -> Fraction | None:
    if (found := _undivided(bare)) is not None:
        return found
    if match := _RATIO.fullmatch(bare):
        return _ratio(match[1], match[2], match[3], match[4])
    if match := _FRAC.fullmatch(bare):
        return _ratio(match[1], match[2], match[3] or match[4], match[5] or match[6])
    if match := _REPEATING.fullmatch(bare):
        return _repeating(match[1], match[2], match[3], match[4] or match[5] or match[6])
    if match := _CONTINUED.fullmatch(bare):
        return _repeating(*match.groups())
    return None


def read_number_words(text: str) -> str:
    """Number words, English and Chinese, as digits: ``minus one hundred`` is ``-100``, ``two and a half`` ``2 1/2``;
    other text as it is."""
    if match := _SCALED.fullmatch(text):
        return f"{'1' if match[1][0] in 'aA' else match[1]}e{_SCALES[match[2].lower()]}"
    if match := _PART.fullmatch(text):
        minus = _MINUS.match(text)
        return f"-{read_number_words(text[minus.end() :])}" if minus else _read_part(match) or text
    if text[:2] in ("a ", "A "):
        text = f"one{text[1:]}"
    if _WORDS.fullmatch(text):
        sign = "-" if text[:1] in "mMnN" and _MINUS.match(text) else ""
        words = (_MINUS.sub("", text, count=1) if sign else text).lower()
        try:
            digits = alpha2digit(words, "en") if "point" in words else str(text2num(words, "en"))
        except ValueError:
            return text
        return sign + digits if re.fullmatch(r"[0-9.]+", digits) else text
    if _CHINESE.fullmatch(text):
        try:
            if "分之" in text:
                return str(cn2an.transform(text))
            return f"{cn2an.cn2an(text.replace('两', '二'), 'smart'):g}"
        except ValueError:
            return text
    return text


def _read_part(match: re.Match[str]) -> str | None:
    """``one third`` as ``1/3``, ``half`` too, but not the order ``third``."""
    whole, top, name = match[1], match[2], match[3].lower()
    if not top and name != "half":
        return None
    count = "1" if not top or top.lower() in ("a", "an") else read_number_words(top)
    number = read_number_words(whole) if whole else ""
    if not count.isdigit() or not (number.isdigit() or not whole):
        return None
    bottom = {"halve": 2, "fourth": 4}.get(name) or _PARTS.index(name) + 2
    return f"{number} {count}/{bottom}".strip()


def number_words(text: str) -> list[str]:
    """The numbers that a text spells out, as digits."""
    return [read_number_words(match[0]) for match in _WORDS.finditer(text)]


def parse_number(text: str) -> Number | None:
    """The number that the cleaned ``text`` is, or None when it is anything else or too large to hold exactly.

    Understood: ASCII digits with thousands commas, spaces or apostrophes, decimals, repeating decimals
    (``0.\\overline{3}``, ``0.333…``), exponents (``1e5``, ``3\\times10^{4}``), fractions (``3/4``, ``\\frac{3}{4}``,
    ``2 1/2``), number words, a percent sign.
    """
    if len(text) > MAX_NUMBER_CHARS or not text:
        return None
    if enclosed := _ENCLOSED.fullmatch(text):
        text = enclosed[1].strip()
    bare = _PERCENT.sub("", text) if text[-1] in "%tTsS." else text.removeprefix("百分之")
    percent = bare != text
    if not bare or (bare[0].isalpha() or bare[-1].isalpha()):
        bare = _MINUS.sub("-", read_number_words(bare), count=1)
    value = _value(bare)
    if value is None:
        return None
    return Number(value / 100 if percent else value, percent)


def parse_quantity(text: str) -> Quantity | None:
    """The number and the unit (empty: none) that the cleaned ``text`` is; None when it is no number."""
    return _parsed_quantity(text) if len(text) <= MAX_LIST_CHARS else None


@functools.lru_cache(maxsize=4096)
def _parsed_quantity(text: str) -> Quantity | None:
    number = parse_number(text)
    if number is not None:
        return number, NONE
    words = _WORDS.match(text) if text[:1].isalpha() else None
    words = words or (_SCALED.match(text) if text.count(" ") > 1 else None)
    bare, unit = split_unit(read_number_words(words[0]) + text[words.end() :] if words else text)
    number = parse_number(bare) if unit else None
    return None if number is None else (number, unit)


def units_agree(first: Unit, second: Unit) -> bool:
    """A unit may be left out, but not replaced by another."""
    return not first or not second or not first.isdisjoint(second)


def quantities_equal(first: Quantity, second: Quantity) -> bool:
    """Exact equality; a percent sign is neither a unit nor nothing beside one.

    Where only one has a percent sign, 50% is both 50 and 0.5, as people write it both ways.
    """
    (one, one_unit), (other, other_unit) = first, second
    if not units_agree(one_unit, other_unit):
        return False
    if one.percent != other.percent:
        if one_unit or other_unit:
            return False
        if one.value * (100 if one.percent else 1) == other.value * (100 if other.percent else 1):
            return True
    return one.value == other.value


_CLOCK = re.compile(
    r"([01]?[0-9]|2[0-3])(?:[:.]([0-5][0-9]))?(?::([0-5][0-9]))? ?(?:([ap])\.? ?m\b\.?)?", re.IGNORECASE
)


def parse_clock(text: str) -> tuple[int, bool] | None:
    """A time of day as (seconds, whether the half of the day is known): ``5:30 P.M.``, ``17:30``, ``5 pm``."""
    match = _CLOCK.fullmatch(text) if text[:1].isdigit() else None
    if match is None or not (match[4] or (match[2] and ":" in text)):
        return None
    hours, minutes, seconds = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    if match[4]:
        if not 1 <= hours <= 12:
            return None
        hours = hours % 12 + (12 if match[4] in "pP" else 0)
    return (hours * 60 + minutes) * 60 + seconds, bool(match[4]) or not 1 <= hours <= 12


def clocks_equal(answer: tuple[int, bool], gold: tuple[int, bool]) -> bool:
    """The same time; where the gold answer says which half of the day, the answer must, too."""
    if gold[1]:
        return answer == gold
    return answer[0] % 43200 == gold[0] % 43200
