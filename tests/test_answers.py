"""Answers: extraction, normal form, numbers, choices and plain equality."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from fractions import Fraction

import pytest

from mstar_mega.rewards.answers import (
    Verdict,
    answer_key,
    extract_answer,
    plain_verdict,
)
from mstar_mega.rewards.choices import resolve_choice
from mstar_mega.rewards.dressing import normalize
from mstar_mega.rewards.equality import Algebra, to_latex
from mstar_mega.rewards.quantities import Number, parse_number


def answers_equal(answer: str, gold: str, choices: Sequence[str] = ()) -> bool:
    """Whether plain comparison finds them equal: as text, as a number, or as a choice."""
    verdict = plain_verdict(answer, gold, choices)
    return isinstance(verdict, Verdict) and verdict.correct


# ------------------------------------------------------------------------------------------------------ extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First.\n\nSecond.\n\n# Answer\n\n12", "12"),
        ("First.\n# Answer\n12\n\n\n", "12"),
        ("# answer\n\n  No  ", "No"),
        ("a\r\n\r\n#ANSWER:\r\n\r\nB\r\n", "B"),
        ("a\n\n## **Answer** 7", "7"),
        ("a\n\n  # Answer: 3/4", "3/4"),
        ("# Answer\n\n1\n\n# Answer\n\n2", "2"),
        ("# Answer\n\n1\n\n# Answer\n\n", None),
        ("# Answer\n\n  \n", None),
        ("the # Answer 5", None),
        ("# Answers\n\n5", None),
        ("#Answering", None),
        ("Answer\n\n5", None),
        ("", None),
        ("# Answer\n\n5\n\nBecause.", "5\n\nBecause."),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("  The CAT. ", "the cat"),
        ("$\\boxed{12}$", "12"),
        ("\\boxed{\\text{no}}", "no"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("**`B`**", "b"),
        ('"yes!"', "yes"),
        ("5!", "5!"),
        (".5", ".5"),
        ("\\[ x + 1 \\]", "x+1"),
        ("\\left( 1 , 2 \\right)", "(1,2)"),
        ("50\\%", "50%"),
        ("\u221212", "-12"),
        ("1\u200b2", "12"),
        ("1\x002", "1 2"),
        ("...", ""),
    ],
)
def test_normalize(raw: str, plain: str) -> None:
    assert normalize(raw) == plain


def test_normalize_is_idempotent_and_total_on_random_strings() -> None:
    rng = random.Random(0)
    pieces = ["\\boxed{", "\\text{", "{", "}", "$", "**", "_", '"', ".", "!", " ", "\n", "\\", "5", "ab", "\\%", ","]
    pieces += ["#", "\x00", "\u0663", "\u00df", "\u0130", "\U0001f600", "\ud800", "{,}", "\\,", "te", "xt{", "("]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        once = normalize(text)
        assert normalize(once) == once, repr(text)
        parse_number(once)
        to_latex(once)
        assert answers_equal(text, text) == bool(text.strip()), repr(text)


# ---------------------------------------------------------------------------------------------------- plain equality


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("+12.0", 12),
        ("-0.50", Fraction(-1, 2)),
        (".5", Fraction(1, 2)),
        ("12.", 12),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("3 \\times 10^{4}", 30000),
        ("-10^2", -100),
        ("3/4", Fraction(3, 4)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("\\frac12", Fraction(1, 2)),
        ("2 1/2", Fraction(5, 2)),
        ("2\\frac{1}{2}", Fraction(5, 2)),
        ("007", 7),
    ],
)
def test_parse_number(text: str, value: int | Fraction) -> None:
    assert parse_number(normalize(text)) == Number(Fraction(value))


@pytest.mark.parametrize(
    "text",
    ["", "x", "1,23", "12,3456", "1.2.3", "1/0", "--1", "1e", "\u0661\u0662", "1_000", "inf", "nan", "0x10", "1 2",
     "5 cm", "1e999999999", "1e-99999", "10^{999}", "9" * 129, "9" * 10_000_000, "1/" + "9" * 200],
)  # fmt: skip
def test_not_a_number_or_too_large_for_one(text: str) -> None:
    start = time.perf_counter()
    assert parse_number(normalize(text)) is None
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("NO", "No", True),
        ("\\boxed{20}", "20", True),
        ("20.0", "20", True),
        ("1,000", "1000", True),
        ("$1{,}000$", "1000", True),
        ("0.5", "1/2", True),
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("50", "50%", True),
        ("50", "0.5", False),
        ("5%", "50%", False),
        ("0.333", "1/3", False),
        ("x = 5", "5", True),
        ("x=5", "y=5", False),
        ("3+5", "8", False),
        ("2-1", "1", False),
        ("5 cm", "5 kg", False),
        ("20", "twenty", True),
        ("12", "1 2", False),
        ("\u0665", "5", False),
        ("", "5", False),
        ("...", "5", False),
        ("?", "?", True),
        ("(B)", "B", True),
        ("b.", "B", True),
        ("A or B", "B", False),
        ("x+1", "1+x", False),
        ("5 cm", "5", True),
        ("5", "5 cm", True),
        ("5.0 centimeters", "5cm", True),
        ("5 cm", "6 cm", False),
        ("\\$1,250.50", "1250.5", True),
        ("$5\\text{ m/s}^2$", "5", True),
        ("12 square feet", "12 ft^2", True),
        ("12 square feet", "12 ft", False),
        ("1 m", "100 cm", False),
        ("30 km per hour", "30 km/h", True),
        ("5m", "5", False),
        ("5x", "5", False),
        ("5 apples", "5", True),
        ("[1, 2.0, 3]", "[1,2,3]", True),
        ("1, 1/2", "[1, 0.5]", True),
        ("[1, 2]", "[2, 1]", False),
        ("[1, 2]", "[1, 2, 3]", False),
        ("\u20ac5", "5", True),
    ],
)
def test_answers_equal(answer: str, gold: str, equal: bool) -> None:
    assert answers_equal(answer, gold) is equal


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(b)", "B"), ("[B]", "B"), ("B.", "B"), ("B)", "B"), ("**B**", "B"), ("Option B", "B"),
        ("B. 12", "B"), ("(B) 12", "B"), ("B: 12.0", "B"), ("12", "B"), ("12.0", "B"), ("\\boxed{\\text{B}}", "B"),
        ("red", "C"), ("Red.", "C"), ("1/2", "D"), ("0.5", "D"),
        ("B. 7", None), ("A. 12", None), ("A or B", None), ("AB", None), ("E", None), ("13", None), ("", None),
        ("B is wrong", None), ("the red one", None), ("blue", None),
    ],
)  # fmt: skip
def test_resolve_choice(answer: str, letter: str | None) -> None:
    assert resolve_choice(answer, ("7", "12", "Red", "$\\frac{1}{2}$")) == letter


def test_choice_verdicts_and_ambiguity() -> None:
    assert plain_verdict("12", "B", ("7", "12")) == Verdict(True, "choice")
    assert plain_verdict("7", "B", ("7", "12")) == Verdict(False, "none")
    assert not answers_equal("12", "A", ("12", "12")), "the same text twice is ambiguous"
    assert answers_equal("A", "A", ("12", "12"))
    labels = ("D", "A", "C", "B")
    assert answers_equal("B", "B", labels) and not answers_equal("B", "D", labels), "a lone letter is the letter"
    assert answers_equal("0.5", "B", ("1/2", "0.5")) and answers_equal("1/2", "A", ("1/2", "0.5"))
    assert answers_equal("B", "12", ("7", "12")), "a gold answer given as the choice's text"
    with pytest.raises(ValueError, match="27 choices"):
        resolve_choice("A", ("x",) * 27)


def test_undecided_only_where_both_are_short_mathematics() -> None:
    assert isinstance(plain_verdict("x+1", "1+x"), Algebra)
    assert isinstance(plain_verdict("2\\sqrt{3}", "\\sqrt{12}"), Algebra)
    for answer, gold in [("cat+dog", "1+x"), ("x+1", "a cat"), ("x+1", "3"), ("x" + "+1" * 400, "1+x"), ("y", "x")]:
        assert plain_verdict(answer, gold) == Verdict(False, "none")


def test_answer_key_agrees_with_equality() -> None:
    answers = ["5", "5.0", "+5", "10/2", "\\boxed{5}", "five", "Five.", "50%", "0.5", "1/2", "...", "(5)", "x=5"]
    for first, second in itertools.product(answers, repeat=2):
        if answer_key(first) == answer_key(second):
            assert answers_equal(first, second)
    assert len({answer_key(answer) for answer in answers[:5]}) == 1
    assert answer_key("B. 12", ("7", "12")) == answer_key("12", ("7", "12")) == answer_key("(b)", ("7", "12"))
