"""Self-evolving training: the recipe's loop (arXiv 2412.17451, sections 3 to 7).

Everything it compares is a setting: the method (where weights and optimizer start), the interval, the selection, the
prompts, the temperature.
"""

from __future__ import annotations

from typing import Any

from mstar_mega.recipe.choose import choose, gold_examples
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.evaluate import (
    exploration_responses,
    measure_exploration,
    measure_greedy,
    measure_refreshed,
)
from mstar_mega.recipe.fit import Position, fit, restore, save, weights_to_start_from
from mstar_mega.recipe.generate import check_log_probs, generate
from mstar_mega.recipe.intervals import Interval, next_interval
from mstar_mega.recipe.method import ResolvedMethod, resolve_method
from mstar_mega.recipe.prm import refresh_prm
from mstar_mega.recipe.rollouts import Actors
from mstar_mega.recipe.temperature import tune_temperature
from mstar_mega.training.batches import Examples, split_into_epochs
from mstar_mega.training.trainer import Trainer


def evolve(job: Job, policy: Trainer, actors: Actors, warmup_steps: int) -> Position:
    """Generate and improve until the budget is spent. ``policy``, the actors' own, holds the warm-up weights."""
    method = resolve_method(job.config.evolve)
    start = weights_to_start_from(job, policy, method.start_from)
    position = restore(job, policy, "evolve") or Position(iteration=1, total_steps=warmup_steps)
    if position.is_new:
        measure_exploration(job, actors, "warmup", 0)

    while (now := next_interval(job, method, position)) is not None:
        with job.quiet(position.is_inside):  # an iteration's beginning is logged already
            refresh(job, actors, now, position)
            balance(job, actors, now, position)
            examples = generate_and_select(job, policy, actors, now, position)
            start_over(policy, method, start, now, position, examples)
        improve(job, policy, examples, position)
        measure(job, actors, position.iteration)
        position.begin_next_iteration()
        save(job, policy, "evolve", position)
    measure(job, actors, position.iteration - 1, due=False)  # of the last policy there is every measure
    return position


def refresh(job: Job, actors: Actors, now: Interval, position: Position) -> None:
    """Train the PRM on with labels of the present policy, and measure it on that policy's responses, where due."""
    if now.refresh and not position.is_inside:
        last = now.number - 1
        measured = exploration_responses(job, actors, last) if _is_due(job.config.evaluation.every, last) else None
        refresh_prm(job, actors, last, position.refreshed)
        position.refreshed = last
        if measured is not None:
            measure_refreshed(job, actors, last, measured)


def balance(job: Job, actors: Actors, now: Interval, position: Position) -> None:
    """Tune the sampling temperature where a sweep is due."""
    if now.sweep and not position.is_inside:
        position.temperature = tune_temperature(job, actors, now.number, position.temperature)


def generate_and_select(job: Job, policy: Trainer, actors: Actors, now: Interval, position: Position) -> Examples:
    """What the iteration trains on: selected ones of sampled, judged and scored responses (SFT: the gold answers)."""
    if job.config.evolve.method == "sft":
        return gold_examples(job, now)
    groups = generate(job, actors, now, position)  # and reward; on disk, also for a resume
    if not position.is_inside:
        check_log_probs(job, policy.model, now, groups, position.temperature)
    return choose(job, now, groups)


def start_over(
    policy: Trainer,
    method: ResolvedMethod,
    start: dict[str, Any] | None,
    now: Interval,
    position: Position,
    examples: Examples,
) -> None:
    """Give the policy the weights and the optimizer that the method begins an iteration with; it has generated."""
    if position.is_inside or not examples:
        return
    if start is not None and (now.number == 1 or not method.starts_once):
        policy.load_weights(start)
    if not method.inherit_optimizer:
        policy.reset_optimizer()


def improve(job: Job, policy: Trainer, examples: Examples, position: Position) -> None:
    """Train on all selected responses: the iteration that reaches the step budget is trained whole, as the paper's."""
    settings = job.config.evolve
    key = (job.config.seed, "improve", position.iteration)
    batches = split_into_epochs(examples, settings.optimizer, settings.epochs, key)
    if not resolve_method(settings).inherit_optimizer:  # the schedule has started over, and ends with the iteration
        policy.set_total_steps(len(batches))
    before = position.step
    loss = fit(job, policy, "evolve", batches, position)
    if position.step > before and _has_measures(job, position.iteration):
        save(job, policy, "evolve", position)  # training done is not lost with the measuring
    position.barren = 0 if examples else position.barren + 1
    job.log(
        "improve",
        iteration=position.iteration,
        steps=len(batches),
        loss=loss,
        total_steps=position.total_steps,
        seconds=round(position.seconds, 3),
    )


def measure(job: Job, actors: Actors, iteration: int, due: bool = True) -> None:
    """Validation and test measures of the policy after an iteration: those that are due then, or those that are not."""
    settings = job.config.evaluation
    if _is_due(settings.every, iteration) == due:
        measure_exploration(job, actors, "evolve", iteration)
    if _is_due(settings.test_every, iteration) == due:
        measure_greedy(job, actors, "evolve", iteration, "test")


def _has_measures(job: Job, iteration: int) -> bool:
    settings = job.config.evaluation
    return _is_due(settings.every, iteration) or _is_due(settings.test_every, iteration)


def _is_due(every: int, iteration: int) -> bool:
    """Whether a measurement is due after this iteration (0: the warm-up policy, which always has them all)."""
    return iteration == 0 or (every > 0 and iteration % every == 0)
