"""Reading answers out of prose, and what all rules do with hostile responses."""

from __future__ import annotations

import time

import pytest
from hostile import HOSTILE

from mstar_mega.config import BenchmarkConfig
from mstar_mega.evaluation.benchmarks import BENCHMARKS
from mstar_mega.evaluation.problem import Problem, Reading, Rules
from mstar_mega.evaluation.scoring import Prediction, read
from mstar_mega.rewards.checker import AnswerChecker
from mstar_mega.rewards.extraction import Kind, find_answer

OPTIONS = dict(zip("ABCD", ("60°", "a cat", "a black cat", "NA"), strict=True))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so\n\n# Answer\n\nB", "B"),
        ("(A) is wrong, so the answer is (C).", "C"),
        ("The correct option is C, since A is out.", "C"),
        ("Option B.", "B"),
        ("It shows a black cat.", "C"),
        ("The picture has a cat in it.", "B"),
        ("Therefore, the angle is 60°.", "A"),
        ("\\boxed{B}", "B"),
        ("The answer is (B) a cat.\n\nQuestion: What else?\nThe answer is (C).", "B"),
        ("I cannot determine this without the image.", "N/A"),
        ("The answer cannot be determined.", "N/A"),
        ("It is (B) or (C).", "N/A"),
        ("The text does not provide any of that.", "N/A"),
        ("", "N/A"),
    ],
)
def test_options(response: str, answer: str) -> None:
    assert find_answer(response, "letter", OPTIONS) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("No, there are more cars.", "B"),
        ("There are fewer cars than bikes.", "A"),
        ("Red isn't the lowest. Blue is.", "B"),
        ("It is not clear from this.", "N/A"),
    ],
)
def test_statements_about_yes_and_no(response: str, answer: str) -> None:
    assert find_answer(response, "letter", {"A": "Yes", "B": "No"}) == answer


@pytest.mark.parametrize(
    ("response", "kind", "answer"),
    [
        ("so\n\n# Answer\n\n7", "integer", "7"),
        ("The area is 1,234.5 cm^2.", "float", "1234.5"),
        ("Hence x = 3 + 4 = 7.", "integer", "7"),
        ("There are two boxes with at least 60 pens.", "integer", "2"),
        ("There are 12 apples. The final answer is: 9", "integer", "9"),
        ("It fell by \u22125%.", "integer", "-5"),
        ("Only three remain.", "integer", "3"),
        ("I do not have enough information.", "integer", "N/A"),
        ("It peaks between 2007 and 2009.", "list", "[2007, 2009]"),
        ("First [1], then [1, 2, 3].", "list", "[1, 2, 3]"),
        ("", "float", "N/A"),
    ],
)
def test_values(response: str, kind: Kind, answer: str) -> None:
    assert find_answer(response, kind) == answer


def test_hostile_responses_neither_hang_nor_crash_any_rule() -> None:
    kinds: tuple[Kind, ...] = ("integer", "float", "list")
    valued = [Problem("o", "q", OPTIONS, "a cat", "text"), *(Problem(kind, "q", {}, "7", kind, 1) for kind in kinds)]
    lettered = Problem("l", "q", OPTIONS, "B")
    cases = [("mathvista", problem, "official") for problem in valued]
    cases += [("mathvista", problem, "vlmevalkit") for problem in valued[::2]]
    cases += [(name, lettered, "official") for name in ("m3cot", "mmstar", "mmbench")] + [("ai2d", lettered, "reward")]
    slowest = 0.0
    with AnswerChecker(timeout_seconds=0.5) as checker:
        for name, problem, named in cases:
            rules = Rules(BenchmarkConfig(rules=named))  # type: ignore[arg-type]
            for text in HOSTILE:
                start = time.process_time()
                for prediction in (Prediction("p", text), Prediction("p", None, text)):
                    assert isinstance(read(BENCHMARKS[name], problem, prediction, rules, checker), Reading)
                slowest = max(slowest, time.process_time() - start)
        assert checker.counts["error"] == 0
    assert slowest < 5, "seconds of this process for one response"
