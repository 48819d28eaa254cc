"""The rule that chooses a temperature, on simulated sweeps whose true curve is known."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist, fmean

import numpy as np
import pytest

from mstar_mega.config import TemperatureConfig
from mstar_mega.recipe.temperature import choose_temperature
from mstar_mega.report.sweep import sweep_points, sweep_words

GRID = TemperatureConfig().grid
MIDDLE = (GRID[0] + GRID[-1]) / 2
QUERIES = 250
SPREAD = 2.0
"""Of the queries' difficulty, in units of a sample's noise: what the temperatures' values have in common."""
# Reward-Pass@2 of the paper's policy before and after its training, read off its figure.
AT = [0.5, 0.7, 1.0, 1.2, 1.5, 1.7, 2.0]
EARLY = [0.532, 0.520, 0.440, 0.424, 0.344, 0.296, 0.192]
LATE = [0.51, 0.51, 0.512, 0.524, 0.512, 0.492, 0.46]


def curve(values: Sequence[float]) -> list[float]:
    """The true criterion at each temperature of the grid."""
    return [float(value) for value in np.interp(GRID, AT, values)]


def sweep(rng: np.random.Generator, truth: Sequence[float]) -> dict[float, list[float]]:
    """One sweep's outcomes: a query's difficulty is the same at each temperature, its samples' luck is not."""
    difficulty = rng.normal(0, SPREAD, QUERIES)
    ease = [NormalDist().inv_cdf(mean) * (1 + SPREAD**2) ** 0.5 for mean in truth]
    return {
        temperature: [float(hit) for hit in difficulty + of_temperature + rng.normal(0, 1, QUERIES) > 0]
        for temperature, of_temperature in zip(GRID, ease, strict=True)
    }


def chosen(
    truth: Sequence[float], tolerance: float, start: float, sweeps: int, runs: int, seed: int = 1
) -> list[float]:
    """The temperature after so many sweeps, each with the one before it in use."""
    rng = np.random.default_rng(seed)
    ends = []
    for _ in range(runs):
        present = start
        for _ in range(sweeps):
            present = choose_temperature(sweep(rng, truth), tolerance, present, int(rng.integers(2**31)))
        ends.append(present)
    return ends


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0])
def test_on_a_flat_curve_the_temperature_does_not_drift(tolerance: float) -> None:
    """From the middle of the grid it goes up as often as down; from its ends equally far back towards the middle.

    A rule that takes the highest temperature within one error ends half a unit above the middle.
    """
    flat = [0.5] * len(GRID)
    ends = chosen(flat, tolerance, MIDDLE, 3, 80)
    error = float(np.std(ends, ddof=1)) / len(ends) ** 0.5
    assert abs(fmean(ends) - MIDDLE) < 4 * error
    low, high = (chosen(flat, tolerance, start, 2, 80, seed) for seed, start in ((2, GRID[0]), (3, GRID[-1])))
    error = float(np.hypot(np.std(low, ddof=1), np.std(high, ddof=1))) / len(low) ** 0.5
    assert abs(fmean(low) + fmean(high) - 2 * MIDDLE) < 4 * max(error, 0.01)
    if tolerance == 2.0:
        assert float(np.std(ends)) < 0.25, "what noise alone may have done is left as it is"


def test_the_best_of_the_papers_curves_is_found_within_a_point() -> None:
    """Without tolerance the choice is near the true best; with it no farther than what the sweep cannot tell."""
    for truth, most_lost in ((curve(EARLY), 0.005), (curve(LATE), 0.010)):
        best = max(truth)
        for tolerance, start in ((0.0, 1.0), (1.0, 0.3), (1.0, 1.6)):
            ends = chosen(truth, tolerance, start, 2, 40)
            lost = fmean(best - truth[GRID.index(temperature)] for temperature in ends)
            assert lost < most_lost + 0.012 * tolerance, (tolerance, start, lost)


def test_equal_temperatures_are_decided_by_the_one_in_use() -> None:
    better, worse = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    criterion = {0.5: better, 0.7: worse, 1.0: better[::-1], 1.3: better}
    for coin in (0, 1):
        assert choose_temperature(criterion, 0.0, 0.3, coin) == 0.5
        assert choose_temperature(criterion, 0.0, 0.7, coin) == 0.5, "the one in use is not among the best"
        assert choose_temperature(criterion, 0.0, 1.1, coin) == 1.0
        assert choose_temperature(criterion, 0.0, 2.0, coin) == 1.3
    # Equally far on both sides, though 1.0 - 0.7 and 1.3 - 1.0 differ as floats.
    both = {0.7: better, 1.0: worse, 1.3: better}
    assert {choose_temperature(both, 0.0, 1.0, coin) for coin in range(4)} == {0.7, 1.3}
    assert choose_temperature({0.5: [1.0], 1.0: [1.0]}, 0.0, 1.0, 0) == 1.0


def test_the_tolerance_counts_standard_errors_of_the_paired_difference() -> None:
    rng = np.random.default_rng(5)
    good = [float(hit) for hit in rng.random(200) < 0.6]
    # One query in 40 lost: within two standard errors; one in 4: clearly worse.
    a_bit_worse = [0.0 if i % 40 == 0 else value for i, value in enumerate(good)]
    worse = [0.0 if i % 4 == 0 else value for i, value in enumerate(good)]
    assert sum(worse) < sum(a_bit_worse) < sum(good)
    for present, low, high in ((1.5, 0.5, 1.0), (0.2, 0.5, 0.5)):
        criterion = {0.5: good, 1.0: a_bit_worse, 1.5: worse}
        assert choose_temperature(criterion, 0.0, present, 0) == low
        assert choose_temperature(criterion, 2.0, present, 0) == high
    mirrored = {0.5: worse, 1.0: a_bit_worse, 1.5: good}
    assert choose_temperature(mirrored, 2.0, 0.5, 0) == 1.0, "downwards as well as upwards"


def test_a_sweep_is_told_with_its_margins() -> None:
    grid = [
        {"temperature": 0.5, "pass_at_k": 0.6, "reward_pass_at_k": 0.50, "random_pass_at_k": 0.45, "difference": -0.04,
         "difference_stderr": 0.02},
        {"temperature": 1.0, "pass_at_k": 0.7, "reward_pass_at_k": 0.54, "random_pass_at_k": 0.55, "difference": 0.0,
         "difference_stderr": 0.0},
    ]  # fmt: skip
    event = {"event": "temperature", "mode": "reward_pass_at_k", "k": 2, "temperature": 1.0, "grid": grid}
    assert sweep_words(event) == (
        "temperature 1 is chosen by Reward-Pass@2, 54.0%; +4.0 ± 2.0 points to the best of the others, 0.5; "
        "2 responses at random have 55.0%"
    )
    assert sweep_words({**event, "mode": "pass_at_k", "temperature": 0.5}).startswith(
        "temperature 0.5 is chosen by Pass@2, 60.0%; -10.0"
    )
    assert [point.is_as_good_as_chosen for point in sweep_points(event)] == [True, True], "two errors below it"
    grid[0]["difference_stderr"] = 0.019
    assert [point.is_as_good_as_chosen for point in sweep_points(event)] == [False, True]
    assert sweep_words({**event, "grid": []}) == "temperature 1.0 is chosen"
