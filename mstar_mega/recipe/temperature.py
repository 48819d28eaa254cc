"""Automatic balancing (paper, dynamics section): sample the validation queries at each temperature, take the best.

The criterion is Reward-Pass@K (exploration and exploitation together), Pass@K, or the mean of a function of the user's
own over the queries. All sweeps and all temperatures draw with the same random numbers, so that two of them differ by
what temperature or training has changed, and the errors that count are those of paired differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mstar_mega.data.types import Group
from mstar_mega.evaluation.passk import (
    mean,
    paired_difference,
    pass_at_k_of_each,
    random_pass_at_k_of_each,
    reward_pass_at_k_of_each,
)
from mstar_mega.functions import is_path, load, number
from mstar_mega.kernels.noise import key_of
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.recipe.rollouts import VALIDATION_NOISE, Actors, Sampling, drawn, gather_groups, rollouts
from mstar_mega.report.sweep import sweep_words


def tune_temperature(job: Job, actors: Actors, iteration: int, present: float | None = None) -> float:
    """Sweep the grid with the present policy and return the chosen temperature.

    ``present``: the one in use, None before the first sweep (then ``temperature.value`` is taken for it).
    """
    settings = job.config.temperature
    if settings.mode == "fixed":
        return settings.value
    timer = Timer(job)
    present = settings.value if present is None else present
    queries = sorted(job.task.validation, key=lambda query: key_of(job.config.seed, "sweep", query.id))
    rows: dict[float, dict[str, float | None]] = {}
    criterion: dict[float, list[float]] = {}
    total: Counter[str] = Counter()
    samplings = [
        Sampling(f"temperature_{iteration:04d}_{t:.2f}", t, settings.responses, key=VALIDATION_NOISE)
        for t in settings.grid
    ]
    swept = rollouts(job, actors, queries[: settings.queries], samplings)
    for temperature, blocks in zip(settings.grid, swept, strict=True):
        groups = gather_groups(blocks)
        total.update(drawn(groups))
        measures = _measures(job, actors, groups)
        if is_path(settings.mode):
            function = load("temperature.mode", settings.mode)
            measures["own"] = [number("temperature.mode", settings.mode, function(group, settings)) for group in groups]
        rows[temperature] = {"reward_pass_at_k": None, **{name: mean(values) for name, values in measures.items()}}
        criterion[temperature] = measures["own" if is_path(settings.mode) else settings.mode]
    chosen = choose_temperature(criterion, settings.tolerance, present, key_of(job.config.seed, "tie", iteration))
    for temperature, row in rows.items():
        row["difference"], row["difference_stderr"] = paired_difference(criterion[temperature], criterion[chosen])
    event: dict[str, Any] = {
        "iteration": iteration,
        "temperature": chosen,
        "mode": settings.mode,
        "k": settings.k,
        "most_k": _most_k(job),
        "distinct": job.config.selection.distinct,
        "queries": len(criterion[chosen]),
        **total,
        "grid": [{"temperature": temperature, **row} for temperature, row in rows.items()],
    }
    job.log("temperature", **event, seconds=timer.seconds)
    job.say(f"   {sweep_words(event)}")
    return chosen


def _most_k(job: Job) -> int:
    """K of the Pass@K that shows how much a temperature explores: evaluation's, as far as the samples reach."""
    return min(job.config.evaluation.k, job.config.temperature.responses)


def _measures(job: Job, actors: Actors, groups: Sequence[Group]) -> dict[str, list[float]]:
    """What one temperature's samples come to, by measure and query."""
    k, distinct = job.config.temperature.k, job.config.selection.distinct
    measures = {"pass_at_k": pass_at_k_of_each(groups, k), "pass_at_most_k": pass_at_k_of_each(groups, _most_k(job))}
    if actors.prm is not None:
        measures["reward_pass_at_k"] = reward_pass_at_k_of_each(groups, k, distinct)
        measures["random_pass_at_k"] = random_pass_at_k_of_each(groups, k, distinct)
    return measures


def choose_temperature(
    criterion: Mapping[float, Sequence[float]], tolerance: float, present: float, coin: int
) -> float:
    """Of the temperatures within ``tolerance`` standard errors of the best, the one nearest to ``present``.

    ``criterion`` has each temperature's value on each query, the same queries in the same order; the error is that of
    the mean difference to the best over queries. Without tolerance only the best and those exactly equal to it remain.
    Of two equally near ones the parity of ``coin`` takes the lower or the higher. Neither direction is preferred
    anywhere: on a flat curve the temperature does not drift.
    """
    top = max(mean(values) or 0.0 for values in criterion.values())
    bests = [values for values in criterion.values() if (mean(values) or 0.0) == top]

    def is_as_good(values: Sequence[float]) -> bool:
        gaps = [paired_difference(best, values) for best in bests]
        return any((behind or 0.0) <= tolerance * (error or 0.0) for behind, error in gaps)

    good = [temperature for temperature, values in criterion.items() if is_as_good(values)]
    # Rounded: 0.7 and 1.3 are equally far from 1.0.
    return min(good, key=lambda t: (round(abs(t - present), 9), t if coin % 2 else -t))
