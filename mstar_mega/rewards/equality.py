"""Whether two cleaned answers are the same: as text, time, quantity, list or chain; else what algebra has to show."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from mstar_mega.rewards.dressing import squeeze
from mstar_mega.rewards.frames import Chain, chain
from mstar_mega.rewards.lists import Members, parse_list
from mstar_mega.rewards.quantities import (
    clocks_equal,
    parse_clock,
    parse_number,
    parse_quantity,
    quantities_equal,
    read_number_words,
    units_agree,
)
from mstar_mega.rewards.units import split_unit

MAX_SYMBOLIC_CHARS = 512


@dataclass(frozen=True)
class Pair:
    """Two expressions in LaTeX, and how many decimals of them have to agree (None: they must be equal)."""

    first: str
    second: str
    decimals: int | None = None


@dataclass(frozen=True)
class Algebra:
    """Undecided: the answer is right if every pair is equal."""

    pairs: tuple[Pair, ...]


# ---------------------------------------------------------------------------------------------------------- texts

_LIST_COMMA = re.compile(r"(?<=[0-9])([,.]) (?=[0-9])")
_ARTICLE = re.compile(r"(?:an?|the) (?=[a-z]{2})", re.IGNORECASE)
_INNER_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")
_ONE_CHAR_SCRIPT = re.compile(r"([_^])\{(\w)\}")
_FORMULA_DIGIT = re.compile(r"(?<=[a-z)])_\{?([0-9]{1,3}|[a-z])\}?(?![0-9])")


@functools.lru_cache(maxsize=4096)
def _text_keys(cleaned: str) -> tuple[str, str]:
    """As it stands, and without an article. White space counts between digits only, also behind a comma (``1, 000``);
    ``H_2O`` is ``H2O``."""
    article = _ARTICLE.match(cleaned)
    key = _text_key(cleaned)
    return key, _text_key(cleaned[article.end() :]) if article else key


def _text_key(cleaned: str) -> str:
    key = squeeze(_LIST_COMMA.sub(r"\1\n", cleaned))
    if "_" in key or "^" in key:
        key = _FORMULA_DIGIT.sub(r"\1", _ONE_CHAR_SCRIPT.sub(r"\1\2", key))
    return _INNER_SPACE.sub("", key)


def same_text(first: str, second: str) -> bool:
    """Equal but for case, white space, the spelling of subscripts, and an article."""
    one, other = _text_keys(first), _text_keys(second)
    return one[0] == other[0] or one[1] == other[1]


# ----------------------------------------------------------------------------------------------------------- LaTeX

_TO_LATEX = (
    ("**", "^"),
    ("π", r"\pi "),
    ("×", r"\times "),
    ("·", r"\cdot "),
    ("÷", r"\div "),
    ("²", "^2"),
    ("³", "^3"),
    ("≤", r"\leq "),
    ("≥", r"\geq "),
    ("∞", r"\infty "),
    ("°", r"^{\circ}"),
    ("+-", "-"),
)
_FUNCTION = re.compile(r"(?<![\\a-z])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![a-z])")
_ROOT = re.compile(r"√ ?(?:\(([^()]*)\)|([0-9]+|[a-z]))|(?<![\\a-z])sqrt ?\(([^()]*)\)")
_COMMAND = re.compile(r"\\[a-z]+|\\[{}]")
_MATH_CHARS = re.compile(r"[0-9a-z+\-*/^_=<>()\[\]{}.,|! ]*")
_NO_PRODUCT = re.compile(r"[a-z][0-9]")
"""``H2O`` is a name, not a product."""
_MATH_SIGN = re.compile(r"[0-9+*/^=<>\\]")


def to_latex(normalized: str) -> str | None:
    """The LaTeX form of a short normalised answer that looks like mathematics; None for words and prose.

    A list without brackets becomes a tuple: its order counts, as in "sort these", while ``\\{1,2\\}`` is a set.
    """
    if len(normalized) > MAX_SYMBOLIC_CHARS or _BASE.search(normalized):
        return None
    latex = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3] or ''}}}", normalized)
    for plain, command in _TO_LATEX:
        latex = latex.replace(plain, command)
    latex = _FUNCTION.sub(r"\\\1 ", latex).strip()
    without_commands = _COMMAND.sub(" ", latex)
    if (
        _NO_PRODUCT.search(without_commands)
        or not _MATH_SIGN.search(latex)
        or not _MATH_CHARS.fullmatch(without_commands)
    ):
        return None
    runs = re.findall(r"[a-z]+", without_commands)
    if len(latex) > MAX_SYMBOLIC_CHARS or any(len(run) > 2 for run in runs):
        return None
    return latex


# -------------------------------------------------------------------------------------------------------- equality

_BASE = re.compile(r"(?<=[0-9)])_\{?[0-9]|(?<=[0-9]) ?\(?(?:in )?base ", re.IGNORECASE)
_IN_BASE = re.compile(
    r"\(?([0-9a-z]{1,64})\)?(?:_\{? ?([0-9]{1,2}|[a-z]{3,8}) ?\}?| ?\(?(?:in )?base ([0-9]{1,2}|[a-z]{3,8})\)?)", re.I
)
_TWICE = re.compile(r"([^()]{1,80}) \((?:(approximately |approx\.? |about |≈ ?)|or |= ?)?([^()]{1,80})\)")
_NUMBER = re.compile(r"-?[0-9]{1,60}(?:\.[0-9]{1,60})?")
_DECIMAL = re.compile(r"-? ?[0-9]+\.([0-9]+)")


def equal(given: str, wanted: str) -> bool | Algebra:
    """Whether a cleaned answer is the cleaned gold answer. Neither may be empty."""
    if given == wanted:
        return True
    if _NUMBER.fullmatch(given) and _NUMBER.fullmatch(wanted):  # most answers are
        return Fraction(given) == Fraction(wanted)
    answer, gold = chain(_restated(given)), chain(wanted)
    if len(gold.members) > 1:  # an equation: as it stands
        return same_text(given, wanted) or _algebra(given, wanted)
    if answer.names and gold.names and answer.names.isdisjoint(gold.names):
        return False
    if gold.names and not answer.names and len(answer.members) == 2 and not parse_quantity(gold.members[0]):
        return _algebra(given, wanted)  # 2x - y + 1 = 0 is y = 2x + 1
    return _members_equal(answer, gold.members[0])


def _restated(text: str) -> str:
    """``12 (twelve)`` and ``1/3 (about 0.33)`` as chains: what is said twice must agree."""
    match = _TWICE.fullmatch(text)
    if match is None or not parse_quantity(match[3]):
        return text
    if not (parse_quantity(match[1]) or to_latex(squeeze(match[1]))):
        return text
    return f"{match[1]}{'≈' if match[2] else '='}{match[3]}"


def _members_equal(answer: Chain, wanted: str) -> bool | Algebra:
    """One side is the gold answer, and all the others are equal to it, or round to it across a sign for "nearly"."""
    found = [_equal(member, wanted) for member in answer.members]
    if len(found) == 1:
        return found[0]
    stated = [verdict for verdict in found if verdict is True]
    number = parse_number(wanted)
    if not stated and (number or not any(isinstance(verdict, Algebra) for verdict in found)):
        return False
    pairs: list[Pair] = []
    for member, verdict in zip(answer.members, found, strict=True):
        if verdict is True:
            continue
        if answer.nearly and (digits := _decimals(member, wanted)) is not None:
            latex = _latex_pair(member, wanted, digits)
        else:
            latex = _latex_pair(member, wanted)
        if latex is None or (parse_number(member) and number and not answer.nearly):
            return False
        pairs.append(latex)
    return Algebra(tuple(pairs)) if pairs else True


def _decimals(first: str, second: str) -> int | None:
    """To how many decimals an approximation is written: the fewer where both have some."""
    counts = [len(match[1]) for match in map(_DECIMAL.fullmatch, (first, second)) if match]
    return min(counts) if counts else None


def _latex_pair(first: str, second: str, decimals: int | None = None) -> Pair | None:
    (one, one_unit), (other, other_unit) = split_unit(first), split_unit(second)
    left, right = to_latex(squeeze(one)), to_latex(squeeze(other))
    return Pair(left, right, decimals) if left and right and units_agree(one_unit, other_unit) else None


def _equal(given: str, wanted: str, *, member: bool = False) -> bool | Algebra:
    """Of two texts without equation signs; of members of lists also a number and an expression."""
    answer, gold = parse_quantity(given), parse_quantity(wanted)
    time, target = parse_clock(given), parse_clock(wanted)
    if target and (time or not (answer and answer[1])):
        return time is not None and clocks_equal(time, target)
    if answer and gold:
        return quantities_equal(answer, gold)
    if same_text(given, wanted):
        return True
    if not member and (gold or (answer and not _is_unfinished(wanted))):
        return False
    if _PROSE.fullmatch(given) and _PROSE.fullmatch(wanted):
        return False
    if _BASE.search(given) or _BASE.search(wanted):
        return _in_base(given) == _in_base(wanted) is not None
    if _INEQUALITY.search(given) or _INEQUALITY.search(wanted):
        return _algebra(given, wanted)
    lists = _lists_equal(given, wanted)
    if lists is not None:
        return lists
    return _algebra(given, wanted)


def _algebra(given: str, wanted: str) -> bool | Algebra:
    pair = _latex_pair(given, wanted)
    return Algebra((pair,)) if pair else False


_PROSE = re.compile(
    r"(?!.*\b(?:and|or|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|sqrt)\b)[A-Za-z]{3,}(?: [A-Za-z]{2,}){0,12}", re.IGNORECASE
)
"""Words that are neither a list nor mathematics."""
_INEQUALITY = re.compile(r"[<>≤≥]|\\(?:[lg]eq?|[lg]t)(?![a-z])")
_OPERATION = re.compile(r"[\\^√!]")
_SYMBOL = re.compile(r"(?<![\\A-Za-z])(?!(?:pi|sqrt)(?![a-z]))[A-Za-z]")


def _is_unfinished(gold: str) -> bool:
    """Whether the gold answer is an expression that a number may be the value of: ``2^{10}``, but not ``10-20``."""
    return bool(_OPERATION.search(gold)) and not _SYMBOL.search(split_unit(gold)[0])


def _in_base(text: str) -> tuple[str, int] | None:
    match = _IN_BASE.fullmatch(text)
    if match is None:
        return None
    base = read_number_words((match[2] or match[3]).lower())
    number = int(base) if base.isdigit() else 0
    return match[1].lower().lstrip("0") or "0", number


# ----------------------------------------------------------------------------------------------------------- lists


def _lists_equal(given: str, wanted: str) -> bool | Algebra | None:
    """Of two lists, in the same order where the gold answer has one; None where either is no list.

    Brackets may be left out. Round and square ones are left to algebra: they may be intervals.
    """
    answer, gold = parse_list(given), parse_list(wanted)
    if answer is None or gold is None:
        # A list is not one number.
        return None if answer is None and gold is None else (False if _is_number_list(answer or gold) else None)
    if len(answer.items) != len(gold.items):
        return False
    if {answer.opening, gold.opening} == {"(", "["}:
        return None
    if not gold.ordered or "±" in given:
        return _sets_equal(answer.items, gold.items)
    return _all([_equal(first, second, member=True) for first, second in zip(answer.items, gold.items, strict=True)])


def _is_number_list(members: Members | None) -> bool:
    return members is not None and any(parse_number(item) for item in members.items)


def _sets_equal(answer: tuple[str, ...], gold: tuple[str, ...]) -> bool | Algebra:
    left = list(gold)
    for item in answer:
        match = next((each for each in left if _equal(item, each, member=True) is True), None)
        if match is None:
            first, second = (rf"\{{{','.join(squeeze(each) for each in items)}\}}" for items in (answer, gold))
            return _algebra(first, second)
        left.remove(match)
    return not left


def _all(verdicts: list[bool | Algebra]) -> bool | Algebra:
    if any(verdict is False for verdict in verdicts):
        return False
    pairs = tuple(pair for verdict in verdicts if isinstance(verdict, Algebra) for pair in verdict.pairs)
    return Algebra(pairs) if pairs else True
