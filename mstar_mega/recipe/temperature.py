"""Automatic balancing (paper, dynamics section): sample the validation queries at each temperature, take the best.

The criterion is Reward-Pass@K (exploration and exploitation together) or Pass@K.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from mstar_mega.evaluation.passk import mean, pass_at_k_of_each, reward_pass_at_k_of_each
from mstar_mega.kernels.noise import key_of
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.recipe.rollouts import Actors, Sampling, gather_groups, rollout


def tune_temperature(job: Job, actors: Actors, iteration: int) -> float:
    """Sweep the grid with the present policy and return the chosen temperature."""
    settings = job.config.temperature
    if settings.mode == "fixed":
        return settings.value
    timer = Timer(job)
    queries = sorted(job.task.validation, key=lambda query: key_of(job.config.seed, "sweep", query.id))
    grid: list[dict[str, float | None]] = []
    criterion: dict[float, list[float]] = {}
    for temperature in settings.grid:
        sampling = Sampling(f"temperature_{iteration:04d}_{temperature:.2f}", temperature, settings.responses)
        groups = gather_groups(rollout(job, actors, queries[: settings.queries], sampling))
        measures = {"pass_at_k": pass_at_k_of_each(groups, settings.k)}
        if actors.prm is not None:
            measures["reward_pass_at_k"] = reward_pass_at_k_of_each(groups, settings.k)
        means = {name: mean(values) for name, values in measures.items()}
        grid.append({"temperature": temperature, "reward_pass_at_k": None, **means})
        criterion[temperature] = measures[settings.mode]
    chosen = choose_temperature(criterion, settings.tolerance)
    job.log(
        "temperature", iteration=iteration, temperature=chosen, mode=settings.mode, k=settings.k, grid=grid,
        seconds=timer.seconds,
    )  # fmt: skip
    job.say(f"   temperature {chosen} is chosen by {settings.mode} ({100 * (mean(criterion[chosen]) or 0.0):.1f}%)")
    return chosen


def choose_temperature(criterion: Mapping[float, Sequence[float]], tolerance: float) -> float:
    """The highest temperature that falls short of the best by at most ``tolerance`` standard errors.

    ``criterion`` has each temperature's value on each query, the same queries in the same order. The error is that of
    the mean difference over queries. Without tolerance the best is taken, and the highest of equal ones.
    """

    def is_as_good(values: Sequence[float]) -> bool:
        gaps = [one - other for one, other in zip(best, values, strict=True)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
        return math.fsum(gaps) / max(1, len(gaps)) <= tolerance * error

    best = max(criterion.values(), key=math.fsum)
    return max(temperature for temperature, values in criterion.items() if is_as_good(values))
