"""Units of a quantity: which they are, whatever their spelling. pint knows them; here is what it does not know.

A reading of a unit is a set of meanings, because "pound" is money and weight. Units agree where a meaning is shared:
the same dimensions in the same size, so that cc is mL and km/h is kmph, and 1 m is not 100 cm. Nothing is converted.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

Meaning = tuple[str, frozenset[tuple[str, int]]]
"""The size in root units to ten digits, and the dimensions with their exponents."""
Unit = frozenset[Meaning]
"""What a unit may mean; empty: no unit."""

NONE: Unit = frozenset()
MAX_UNIT_CHARS = 40

# What pint does not have, or has as something else: money, angles and heat in one sign, counts, Chinese, habits.
_OWN = {
    "$": "=dollar", "us$": "=dollar", "usd": "=dollar", "dollar": "=dollar", "buck": "=dollar", "美元": "=dollar",
    "cent": "=cent", "¢": "=cent", "penny": "=penny", "pence": "=penny", "€": "=euro", "eur": "=euro", "euro": "=euro",
    "欧元": "=euro", "£": "=sterling", "gbp": "=sterling", "quid": "=sterling", "英镑": "=sterling",
    "pound": "=sterling pound", "¥": "=yen =yuan", "jpy": "=yen", "yen": "=yen", "日元": "=yen", "円": "=yen",
    "圆": "=yuan", "元": "=yuan", "cny": "=yuan", "rmb": "=yuan", "yuan": "=yuan", "renminbi": "=yuan", "块": "=yuan",
    "人民币": "=yuan", "₹": "=rupee", "rs": "=rupee", "inr": "=rupee", "rupee": "=rupee", "₩": "=won", "krw": "=won",
    "won": "=won", "₽": "=ruble", "rub": "=ruble", "ruble": "=ruble", "rouble": "=ruble", "₺": "=lira", "try": "=lira",
    "lira": "=lira", "฿": "=baht", "thb": "=baht", "baht": "=baht", "₫": "=dong", "vnd": "=dong", "dong": "=dong",
    "₱": "=peso", "php": "=peso", "peso": "=peso", "mxn": "=peso", "₦": "=naira", "ngn": "=naira", "naira": "=naira",
    "r$": "=real", "brl": "=real", "chf": "=franc", "franc": "=franc", "a$": "=australian", "aud": "=australian",
    "c$": "=canadian", "ca$": "=canadian", "cad": "=canadian", "hk$": "=hongkong", "hkd": "=hongkong",
    "s$": "=singapore", "sgd": "=singapore", "sek": "=krona", "krona": "=krona", "zar": "=rand", "rand": "=rand",
    "zł": "=zloty", "pln": "=zloty", "zloty": "=zloty", "kr": "=krona", "°": "=degree =celsius =fahrenheit",
    "deg": "=degree =celsius =fahrenheit", "degree": "=degree =celsius =fahrenheit",
    "度": "=degree =celsius =fahrenheit", "°c": "=celsius", "degc": "=celsius", "celsius": "=celsius",
    "centigrade": "=celsius", "摄氏度": "=celsius", "°f": "=fahrenheit", "degf": "=fahrenheit",
    "fahrenheit": "=fahrenheit", "C": "=celsius coulomb", "F": "=fahrenheit farad", "unit": "=unit", "rad": "=radian",
    "radian": "=radian", "弧度": "=radian", "bit": "=bit", "byte": "=byte", "b": "", "B": "=byte", "pixel": "=pixel",
    "px": "=pixel", "ppm": "=ppm", "db": "=decibel", "decibel": "=decibel", "kilo": "kilogram", "rev": "=revolution",
    "revolution": "=revolution", "turn": "=revolution", "rpm": "=revolution/minute", "beat": "=beat",
    "bpm": "=beat/minute", "frame": "=frame", "fps": "=frame/second", "kmph": "kilometer/hour", "kmh": "kilometer/hour",
    "Nm": "newton*meter", "amp": "ampere", "gm": "gram",
    "ton": "ton metric_ton", "Cal": "kilocalorie", '"': "inch", "''": "inch", "'": "foot", "pc": "parsec",
    "au": "astronomical_unit", "pa": "pascal", "kwh": "kilowatt*hour", "mah": "milliampere*hour", "米": "meter",
    "公尺": "meter", "厘米": "centimeter", "公分": "centimeter", "毫米": "millimeter", "分米": "decimeter",
    "千米": "kilometer", "公里": "kilometer", "克": "gram", "千克": "kilogram", "公斤": "kilogram", "毫克": "milligram",
    "吨": "metric_ton",
    "升": "liter", "毫升": "milliliter", "秒": "second", "分钟": "minute", "小时": "hour", "天": "day", "周": "week",
    "月": "month", "年": "year", "岁": "year", "牛": "newton", "牛顿": "newton", "焦耳": "joule", "瓦": "watt",
    "伏": "volt", "安": "ampere", "欧姆": "ohm",
}  # fmt: skip
_LETTERS = frozenset("mgslLthNJWVAKTHΩ")
"""The units of one letter: other letters are more often a variable, or a constant of nature to pint."""
_PREFIXED_MONEY = re.compile(r"([-+]?) ?((?:[A-Za-z]{0,2} ?\$|[€£¥₹₩₽₺฿₫₱₦]|[A-Za-z]{2,3}\.?)) ?([-+]?[0-9.].*)")

_RATE = re.compile(r"([0-9.,]+)( ?/ ?[A-Za-z].*| per .*)")
"""Behind a sign of money: ``15/h``."""

_WORD = r"(?:°?[A-Za-zμΩ\"'$€£¥₹₩¢ł]+|°|[\u4e00-\u6bce\u6bd0-\u9fff]{1,4})\.?"  # all but 每, "per"
_POWER = r"(?:(?:\^|(?<=\w))\{?-?[1-4]\}?| squared| cubed)?"
_FACTOR = rf"(?:(?:square|sq|cubic|cu)\.? ?|平方|立方)?{_WORD}{_POWER}"
_UNIT = re.compile(rf"\(?{_FACTOR}(?:(?: ?[*·/-] ?\(?| per |每| )?{_FACTOR}\)?){{0,4}}\)?")
_BORDER = re.compile(r"(?:(?<=[0-9%.})π…])|(?<=\\pi))( ?)(?=[^0-9%.})…\s*^/+\-=,;_])")
_GLUED = re.compile("[A-Za-z]|st|nd|rd|th")
"""Right behind a number: algebra, and orders."""
_FRACTION = re.compile(r"\\frac ?\{ ?([^{}0-9\\]{1,20}?) ?\} ?\{ ?([^{}0-9\\]{1,20}?) ?\}$")
_TWO_WORDS = re.compile("[A-Za-z]{3,} [A-Za-z]{3,}")
"""What pint may know with an underscore: light years."""
_COUNTED = re.compile(
    r"(?:[a-z]+ ){0,2}(?:([a-z]{3,})s|(people|persons?|men|women|children|sheep|fish))(?: (?:old|each|in total|left))?"
    r"|([\u4e00-\u9fff]{1,3})",
    re.IGNORECASE,
)
"""``12 red apples``: what is counted is a unit, too."""
_NOT_COUNTED = frozenset(
    "plus minus less divides equals percent or and to not than of as 不 非 或 和 分之 halves thirds quarters hundreds"
    "  thousands millions billions trillions lakhs crores dozens grosses scores tens hundred thousand million"
    " billion dozen".split()
)
_TEMPERATURE = re.compile(r"(?:degrees?|deg\.?|°) ?(c(?:elsius|entigrade)?|f(?:ahrenheit)?)\b", re.IGNORECASE)
_TOKEN = re.compile(rf"(square|sq|cubic|cu)\.? ?|(平方|立方)|([*·/()-]| per |每)|({_WORD})({_POWER})|( )")


def split_unit(text: str) -> tuple[str, Unit]:
    """A cleaned answer as (what stands before or behind the unit, unit); the unit is empty where there is none.

    A single letter right behind a number is algebra, not a unit: ``5m``, but ``5 m``.
    """
    if len(text) > 160:
        return text, NONE
    money = _PREFIXED_MONEY.fullmatch(text)
    if money:
        sign = money[2].replace(" ", "")
        meaning = read_unit(sign)
        if meaning and all(name.startswith("=") for name in _OWN.get(sign.rstrip(".").lower(), "").split()):
            rate = _RATE.fullmatch(money[3])
            if rate and (per := _read_rate(sign + rate[2])):
                return money[1] + rate[1], per
            bare, behind = split_unit(money[1] + money[3])
            return (bare, meaning) if meaning & behind else (money[1] + money[3], meaning)
    plain = _FRACTION.sub(r"\1/\2", text) if "\\frac" in text else text
    if plain != text and (found := split_unit(plain))[1]:
        return found
    for border in _BORDER.finditer(text):
        tail = text[border.end() :]
        if len(tail) <= MAX_UNIT_CHARS and (border[1] or not _GLUED.fullmatch(tail)):
            unit = read_unit(tail) or _read_count(tail) or _read_rate(tail)
            if unit:
                return text[: border.start()], unit
    return text, NONE


@functools.lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit:
    """The meanings of a unit as people write it: ``m/s²`` (``m/s^2``), ``km per hour``, ``sq. cm``; empty if none."""
    text = _TEMPERATURE.sub(lambda match: f"°{match[1][0]}", text.removeprefix("US ").removeprefix("U.S. "))
    if len(text) > MAX_UNIT_CHARS or not _UNIT.fullmatch(text):
        return NONE
    if _TWO_WORDS.fullmatch(text) and (found := _registry().parse_unit_name(text.lower().replace(" ", "_"))):
        return frozenset(_meaning(found[0][0] + found[0][1]))
    factors: list[list[Meaning]] = []
    sign, below, pending = 1, False, 1
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None or token.end() == position:
            return NONE
        position = token.end()
        before, chinese, joint, word, power, _ = token.groups()
        if before or chinese:
            pending = 2 if (before or chinese) in ("square", "sq", "平方") else 3
        elif joint:
            if joint in ("/", " per ", "每"):
                sign, below = -1, True
            elif joint == "(":
                pass
            elif joint == ")" or (joint in "*·" and "(" not in text):
                sign, below = (1, False) if joint == ")" else (1, below)
        elif word:
            exponent = sign * pending * _exponent(power)
            pending = 1
            meanings = [_raised(meaning, exponent) for meaning in _read_word(word)]
            if not meanings:
                return NONE
            factors.append(meanings)
    return frozenset(_product(each) for each in itertools.islice(itertools.product(*factors), 32)) if factors else NONE


def _read_count(text: str) -> Unit:
    """The unit that counted things are: told apart by their noun, in the singular or plural."""
    match = _COUNTED.fullmatch(text)
    if match is None or not _NOT_COUNTED.isdisjoint((*text.lower().split(), text)):
        return NONE
    return frozenset({("1", frozenset({(f"=counted {(match[1] or match[2] or match[3]).lower()}", 1)}))})


def _read_rate(text: str) -> Unit:
    """Something counted in a unit, or the other way round: ``people per square mile``, ``beats/min``."""
    top, joint, below = text.partition(" per " if " per " in text else "/")
    if not joint:
        return NONE
    above, under = (read_unit(part.strip()) or _read_count(part.strip()) for part in (top, below))
    return frozenset(_product((one, _raised(other, -1))) for one in above for other in under)


def _exponent(power: str) -> int:
    if not power:
        return 1
    if power in (" squared", " cubed"):
        return 2 if power == " squared" else 3
    return int(power.strip("^{} "))


def _raised(meaning: Meaning, exponent: int) -> Meaning:
    size = f"{float(meaning[0]) ** exponent:.10g}"
    return size, frozenset((name, count * exponent) for name, count in meaning[1])


def _product(meanings: tuple[Meaning, ...]) -> Meaning:
    size = 1.0
    dimensions: dict[str, int] = {}
    for factor, names in meanings:
        size *= float(factor)
        for name, count in names:
            dimensions[name] = dimensions.get(name, 0) + count
    return f"{size:.10g}", frozenset((name, count) for name, count in dimensions.items() if count)


@functools.lru_cache(maxsize=1024)
def _read_word(word: str) -> tuple[Meaning, ...]:
    """The meanings of one word or sign, in the singular or plural, in any case where the case decides nothing."""
    word = word.rstrip(".") or word
    if word.lower() in ("square", "squared", "cubic", "cubed"):  # "5 squared" is 25
        return ()
    forms = [word, word.lower()]
    forms += [form[:-1] for form in forms if len(form) > 2 and form.endswith("s")]
    for form in forms:
        if form in _OWN:
            return tuple(meaning for name in _OWN[form].split() for meaning in _meaning(name))
    if len(word) == 1:
        return _meaning(word) if word in _LETTERS else ()
    registry = _registry()
    for form in forms:
        found = registry.parse_unit_name(form)
        if found:
            return _meaning(found[0][0] + found[0][1])
    folded = registry.parse_unit_name(word, case_sensitive=False) if len(word) <= 3 or word.isupper() else ()
    return tuple(meaning for prefix, name, _ in folded[:4] for meaning in _meaning(prefix + name))


def _meaning(name: str) -> tuple[Meaning, ...]:
    """pint's unit of that name in root units; a name behind ``=`` is a dimension of its own; ``*`` and ``/`` join
    two."""
    top, sign, below = name.partition("/") if "/" in name else name.partition("*")
    if sign:
        return tuple(
            _product((one, _raised(other, -1 if sign == "/" else 1)))
            for one, other in itertools.product(_meaning(top), _meaning(below))
        )
    if name.startswith("="):
        return (("1", frozenset({(name, 1)})),)
    factor, root = _registry().get_root_units(name, check_nonmult=False)
    names = frozenset((str(each), int(count)) for each, count in root._units.items() if count == int(count))
    names = frozenset(each for each in names if each[0] != "radian")
    return ((f"{float(factor):.10g}", names),) if names else ()  # a number: pint's pi, avogadro, percent


@functools.cache
def _registry() -> Any:
    """pint's units, loaded at the first need: a third of a second."""
    import pint

    return pint.UnitRegistry()
