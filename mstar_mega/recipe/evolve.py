"""Self-evolving training: the recipe's loop (arXiv 2412.17451, sections 3 to 7).

Everything it compares is a setting: the method (where weights and optimizer start), the interval, the selection, the
prompts, the temperature.
"""

from __future__ import annotations

from mstar_mega.models.lmm import LMM
from mstar_mega.recipe.choose import choose, gold_examples
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.evaluate import measure_exploration, measure_greedy
from mstar_mega.recipe.fit import Position, fit, restore, save, weights_to_start_from
from mstar_mega.recipe.generate import check_log_probs, generate
from mstar_mega.recipe.intervals import next_interval
from mstar_mega.recipe.method import resolve_method
from mstar_mega.recipe.rollouts import Actors
from mstar_mega.recipe.temperature import tune_temperature
from mstar_mega.training.batches import Examples, split_into_epochs
from mstar_mega.training.trainer import Trainer


def evolve(job: Job, policy: Trainer, prm: LMM | None, warmup_steps: int) -> Position:
    """Generate and improve until the budget is spent. ``policy`` holds the warm-up weights."""
    method = resolve_method(job.config.evolve)
    actors = Actors(job, policy.model, prm)
    start = weights_to_start_from(job, policy, method.start_from)
    position = restore(job, policy, "evolve") or Position(iteration=1, total_steps=warmup_steps)
    if position.iteration == 1 and position.step == 0:
        measure_exploration(job, actors, "warmup", 0)

    while (now := next_interval(job, method, position)) is not None:
        with job.quiet(position.step > 0):  # resumed inside this iteration: its beginning is logged already
            if position.step == 0 and now.sweep:
                position.temperature = tune_temperature(job, actors, now.number, position.temperature)
            if job.config.evolve.method == "sft":
                examples = gold_examples(job, now)
            else:
                groups = generate(job, actors, now, position)  # and reward: judged and scored, on disk
                if position.step == 0:
                    check_log_probs(job, policy.model, now, groups, position.temperature)
                examples = choose(job, now, groups)  # select
            if position.step == 0 and examples:
                if start is not None and (now.number == 1 or not method.starts_once):
                    policy.load_weights(start)  # the present policy generated; training starts over
                if not method.inherit_optimizer:
                    policy.reset_optimizer()
        improve(job, policy, examples, position)
        measure(job, actors, position)
        position.begin_next_iteration()
        save(job, policy, "evolve", position)
    if not _is_measured(job, position.iteration - 1):
        measure_exploration(job, actors, "evolve", position.iteration - 1)
    return position


def improve(job: Job, policy: Trainer, examples: Examples, position: Position) -> None:
    """Train on all selected responses: the iteration that reaches the step budget is trained whole, as the paper's."""
    settings = job.config.evolve
    key = (job.config.seed, "improve", position.iteration)
    batches = split_into_epochs(examples, settings.optimizer, settings.epochs, key)
    if not resolve_method(settings).inherit_optimizer:  # the schedule has started over, and ends with the iteration
        policy.set_total_steps(len(batches))
    loss = fit(job, policy, "evolve", batches, position)
    position.barren = 0 if examples else position.barren + 1
    job.log(
        "improve",
        iteration=position.iteration,
        steps=len(batches),
        loss=loss,
        total_steps=position.total_steps,
        seconds=round(position.seconds, 3),
    )


def measure(job: Job, actors: Actors, position: Position) -> None:
    """Validation and test measures of the policy after an iteration."""
    if _is_measured(job, position.iteration):
        measure_exploration(job, actors, "evolve", position.iteration)
    measure_greedy(job, actors, "evolve", position.iteration, "test")


def _is_measured(job: Job, iteration: int) -> bool:
    """Whether the exploration measures are due after this iteration (0: the start, which always has them)."""
    every = job.config.evaluation.every
    return iteration == 0 or bool(every) and iteration % every == 0
