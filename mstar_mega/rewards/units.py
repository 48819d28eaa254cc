"""Units behind a number: which they are, whatever their spelling. Nothing is converted: 1 m is not 100 cm."""

from __future__ import annotations

import re

_SPELLINGS = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "dm": "dm decimeter decimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "mg": "mg milligram",
    "g": "g gram",
    "kg": "kg kilogram",
    "lb": "lb pound",
    "oz": "oz ounce",
    "t": "t ton tonne",
    "ml": "ml milliliter millilitre",
    "l": "l liter litre",
    "ms": "ms millisecond",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "yr year",
    "dollar": "dollar usd",
    "cent": "cent",
    "euro": "euro eur",
    "n": "n newton",
    "j": "j joule",
    "w": "w watt",
    "v": "v volt",
    "pa": "pa pascal",
    "kpa": "kpa",
    "hz": "hz hertz",
    "k": "k kelvin",
    "mol": "mol mole",
    "mph": "mph",
    "unit": "unit",
}
_CANONICAL = {
    spelling: name
    for name, spellings in _SPELLINGS.items()
    for word in spellings.split()
    for spelling in (word, f"{word}s")
}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_UNIT = re.compile(
    r"(?P<number>.*[0-9}%.])(?P<space> ?)(?:(?P<power>square|sq|cubic|cu)\.? )?(?P<word>[a-z]{1,12})\.?"
    r"(?:\^?\{?(?P<exponent>[23])\}?|(?P<sign>[²³]))?"
    r"(?:(?:/| per )(?P<below>[a-z]{1,12})(?:\^?\{?(?P<lower>[23])\}?)?)?"
)
_CURRENCY = {"€": "euro", "£": "pound sterling", "¥": "yen"}
_SIGNS = {"²": "^2", "³": "^3"}


def split_unit(normalized: str) -> tuple[str, str]:
    """A normalised answer as (what stands before the unit, canonical unit); the unit is empty where there is none.

    A single letter right behind a number is algebra, not a unit: ``5m``, but ``5 m``.
    """
    if normalized[:1] in _CURRENCY:
        return normalized[1:].strip(), _CURRENCY[normalized[0]]
    if len(normalized) > 160:
        return normalized, ""
    match = _UNIT.fullmatch(normalized)
    if match is None:
        return normalized, ""
    above = _CANONICAL.get(match["word"])
    below = _CANONICAL.get(match["below"]) if match["below"] else ""
    if above is None or below is None or (len(match["word"]) == 1 and not match["space"]):
        return normalized, ""
    power = _POWERS.get(match["power"] or "") or _SIGNS.get(match["sign"] or "")
    power = power or (f"^{match['exponent']}" if match["exponent"] else "")
    lower = f"^{match['lower']}" if match["lower"] else ""
    return match["number"], above + power + (f"/{below}{lower}" if below else "")
