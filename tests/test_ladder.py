"""The ladder's arithmetic: paired differences with an error that is neither too small nor too large, and its table."""

from __future__ import annotations

import random
import statistics

import ladder
import pytest


def drawn(rng: random.Random, seeds: int, questions: int, effect: float, spread: float) -> list[list[float]]:
    """Differences of two methods' answers (0, 1 or -1): seeds differ by ``spread``, questions by chance."""
    gaps = []
    for _ in range(seeds):
        better = effect + rng.gauss(0.0, spread)
        gaps.append([float((rng.random() < 0.5 + better) - (rng.random() < 0.5)) for _ in range(questions)])
    return gaps


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_error_of_a_paired_difference_is_that_of_repeated_experiments(spread: float) -> None:
    rng = random.Random(0)
    found = [ladder.paired(drawn(rng, 5, 100, 0.1, spread)) for _ in range(300)]
    assert statistics.mean(mean for mean, _ in found) == pytest.approx(0.1, abs=0.01)
    real = statistics.stdev(mean for mean, _ in found)
    told = statistics.mean(error for _, error in found)
    assert real * 0.9 < told < real * 1.4, "the larger of two estimates errs on the careful side"


def test_one_seed_has_the_error_of_its_questions() -> None:
    mean, error = ladder.paired([[1.0, 0.0, 0.0, -1.0, 1.0, 1.0, 0.0, 0.0]])
    assert mean == 0.25 and error == pytest.approx((0.4375 / 8) ** 0.5)


def test_every_row_stands_against_another_one() -> None:
    assert len(ladder.BY_NAME) == len(ladder.ROWS)
    assert all(row.reference in ladder.BY_NAME for row in ladder.ROWS)


def test_the_table_has_a_line_for_each_row() -> None:
    row = {
        "name": "top_2", "words": "PRM top-2", "seeds": [0, 1], "accuracy": {"mean": 61.25, "stderr": 1.04},
        "paired": {"reference": "random_2", "difference": 2.04, "stderr": 0.5, "seeds": [0, 1]},
        "responses": 1000, "tokens": 20000, "steps": 50, "paper": {"mathv360k": 45.3, "mathvista": 59.2},
    }  # fmt: skip
    text = ladder.table({"commit": "0123456789abcdef", "date": "2026-01-02", "rows": [row]})
    assert (
        "| PRM top-2 (`top_2`) | 2 | 61.2 ± 1.0 | random_2 | +2.0 ± 0.5 | 1,000 | 20,000 | 50 | 45.3 / 59.2 |" in text
    )
