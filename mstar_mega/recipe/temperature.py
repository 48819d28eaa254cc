"""Automatic balancing (paper, dynamics section): sample the validation queries at each temperature, take the best.

The criterion is Reward-Pass@K (exploration and exploitation together) or Pass@K. Of equally good temperatures the
highest is taken: it explores more at no loss (the paper is silent on ties).
"""

from __future__ import annotations

from mstar_mega.evaluation.passk import pass_at_k, reward_pass_at_k
from mstar_mega.kernels.noise import key_of
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.recipe.rollouts import Actors, Sampling, gather_groups, rollout


def tune_temperature(job: Job, actors: Actors, iteration: int) -> float:
    """Sweep the grid with the present policy and return the chosen temperature."""
    settings = job.config.temperature
    if settings.mode == "fixed":
        return settings.value
    timer = Timer()
    queries = sorted(job.task.validation, key=lambda query: key_of(job.config.seed, "sweep", query.id))
    grid = []
    for temperature in settings.grid:
        sampling = Sampling(f"temperature_{iteration:04d}_{temperature:.2f}", temperature, settings.responses)
        groups = gather_groups(rollout(job, actors, queries[: settings.queries], sampling))
        reward = reward_pass_at_k(groups, settings.k) if actors.prm is not None else None
        grid.append(
            {"temperature": temperature, "reward_pass_at_k": reward, "pass_at_k": pass_at_k(groups, settings.k)}
        )
    best = max(grid, key=lambda row: (row[settings.mode] or 0.0, row["temperature"] or 0.0))
    chosen = float(best["temperature"] or settings.value)
    job.log(
        "temperature", iteration=iteration, temperature=chosen, mode=settings.mode, k=settings.k, grid=grid,
        seconds=timer.seconds,
    )  # fmt: skip
    job.say(f"   temperature {chosen} has the best {settings.mode} ({100 * (best[settings.mode] or 0.0):.1f}%)")
    return chosen
