"""Algebraic equality by math-verify: what the answer checker's worker process runs.

Nothing here is imported by the job itself: a comparison may take for ever, and its process is then killed.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import signal
import sys
from typing import Any

_MEMORY_BYTES = 1 << 30
_RELATIVE_ERROR = 1e-9
_ROUNDING = 1e-30
_ROUNDING_OF_DECIMALS = 1e-14
_DIGITS = 40
_MAX_DIGITS = 400


def serve() -> None:
    """The worker: one JSON object per line in (first, second, decimals, seconds), one out. Ends at end of input.

    Each comparison runs under a processor-time alarm that ends the process, also from inside a C loop.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not garble the replies
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    except (ValueError, OSError):
        pass  # some systems have no such limit; the time limit stands
    try:
        # Also loads the grammar, so that the first comparison's time limit is for that comparison.
        ready = symbolically_equal("x+1", "1+x")
        start: dict[str, Any] = {"ready": ready, "reason": "" if ready else "math-verify finds x+1 unequal to 1+x"}
    except ImportError as error:
        start = {"ready": False, "reason": str(error)}
    print(json.dumps(start), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        first, second, decimals = request["first"], request["second"], request["decimals"]
        equal = symbolically_equal(first, second) if decimals is None else nearly_equal(first, second, decimals)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"equal": equal}), file=replies)


def symbolically_equal(answer: str, gold: str) -> bool:
    """Whether two LaTeX expressions are equal to math-verify; False where either cannot be read. May take for ever.

    Before that, both are compared at one point by their relative error: math-verify takes any difference below an
    absolute tolerance for nothing, and is slow to find expressions unequal. That decides plain numbers.
    """
    math_verify = importlib.import_module("math_verify")
    target, candidate = _parsed_gold(gold), _parsed(answer)
    if not target or not candidate:
        return False
    found = _same_inequality(target[0], candidate[0])
    if found is None:
        found = _compare(target[0], candidate[0])
    if found is not None:
        return found
    return bool(math_verify.verify(list(target), candidate, timeout_seconds=None))


def nearly_equal(first: str, second: str, decimals: int) -> bool:
    """Whether two numbers agree to so many decimals."""
    values = [_number(found[0]) for found in (_parsed(first), _parsed_gold(second)) if found]
    if len(values) != 2 or None in values:
        return False
    return bool(abs(values[0] - values[1]) <= 0.5 * 10**-decimals * (1 + _RELATIVE_ERROR))


def _same_inequality(first: Any, second: Any) -> bool | None:
    """Of inequalities in one unknown, by what solves them: ``x > 3`` is ``3 < x`` and the interval ``(3, \\infty)``;
    None where that does not tell."""
    solutions = [_solutions(each) for each in (first, second)]
    if solutions == [None, None]:
        return None
    if None not in solutions and first.free_symbols != second.free_symbols:
        return False
    one, other = (each if found is None else found for each, found in zip((first, second), solutions, strict=True))
    return bool(one == other) or None


def _solutions(expression: Any) -> Any:
    """The real numbers that an inequality in one unknown allows; None for anything else."""
    sympy = importlib.import_module("sympy")
    kinds = (sympy.StrictGreaterThan, sympy.GreaterThan, sympy.StrictLessThan, sympy.LessThan, sympy.And, sympy.Or)
    if not isinstance(expression, kinds) or len(expression.free_symbols) != 1:
        return None
    try:
        return expression.as_set()
    except Exception:  # sympy raises anything here
        return None


def _compare(first: Any, second: Any) -> bool | None:
    """By values at one point: whether they are equal; None where that does not tell."""
    sympy = importlib.import_module("sympy")
    if isinstance(first, sympy.Tuple) and isinstance(second, sympy.Tuple):
        maybe = len(first) == len(second) and all(
            _compare(*pair) is not False for pair in zip(first, second, strict=True)
        )
        return None if maybe else False
    if isinstance(first, sympy.FiniteSet) and isinstance(second, sympy.FiniteSet):
        maybe = all(any(_compare(one, other) is not False for other in second) for one in first)
        return None if maybe else False
    if not (isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr)):
        return None
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    # An irregular point, where expressions do not meet by chance; the same for a name whatever is assumed of it.
    names = sorted({symbol.name for symbol in symbols})
    point = {symbol: sympy.Rational(10007 + 31 * names.index(symbol.name), 9001) for symbol in symbols}
    one, other = (_number(each.xreplace(point) if point else each) for each in (first, second))
    if one is None or other is None:
        return None
    difference, size = abs(one - other), max(abs(one), abs(other))
    if symbols:
        return None if difference <= _RELATIVE_ERROR * size else False
    pair = (first, second)
    if any(isinstance(each, sympy.Float) for each in pair) and any(each.is_rational is False for each in pair):
        return False  # no decimal is a root or pi
    if any(each.has(sympy.Float) for each in pair):  # math-verify keeps fifteen digits of one
        return bool(difference <= _ROUNDING_OF_DECIMALS * size)
    return bool(difference <= _ROUNDING * size) and _is_zero(first - second)


def _is_zero(difference: Any) -> bool:
    """Whether an exact expression is nothing: sympy computes more digits until it finds one, or has seen enough."""
    sympy = importlib.import_module("sympy")
    try:
        return bool(difference.evalf(2, maxn=_MAX_DIGITS, strict=True) == 0)
    except sympy.core.evalf.PrecisionExhausted:
        return True


def _number(expression: Any) -> Any:
    try:
        value = expression.evalf(_DIGITS)
    except Exception:  # sympy raises anything here
        return None
    return value if value.is_number and value.is_finite else None


def _parsed(latex: str) -> list[Any]:
    """What math-verify reads; empty where it cannot.

    Only the LaTeX grammar is used: math-verify's reader of plain expressions would hand them to Python's ``eval``.
    """
    math_verify = importlib.import_module("math_verify")
    rules = math_verify.LatexNormalizationConfig(basic_latex=True, units=False, malformed_operators=True)
    config = math_verify.LatexExtractionConfig(normalization_config=rules)
    found: list[Any] = math_verify.parse(f"${latex}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return [_with_imaginary_unit(each) for each in found]


def _with_imaginary_unit(expression: Any) -> Any:
    """``i`` as the imaginary unit: math-verify reads a symbol, and not always the same one."""
    sympy = importlib.import_module("sympy")
    symbols = expression.free_symbols if isinstance(expression, sympy.Basic) else ()
    return expression.xreplace({symbol: sympy.I for symbol in symbols if symbol.name == "i"}) if symbols else expression


@functools.lru_cache(maxsize=256)
def _parsed_gold(latex: str) -> list[Any]:
    """:func:`_parsed`, once for all responses to a query, which follow one another."""
    return _parsed(latex)
