"""Which queries an iteration consumes, and when the run ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mstar_mega.data.order import Joined, shuffled
from mstar_mega.data.types import Query
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.fit import Position
from mstar_mega.recipe.method import ResolvedMethod, needs_prm


@dataclass(frozen=True)
class Interval:
    """One iteration's share of the queries."""

    number: int
    """The iteration, from 1."""
    labelled: Sequence[Query]
    unlabelled: Sequence[Query]
    sweep: bool
    """The temperature is tuned before this iteration."""
    refresh: bool = False
    """The PRM is trained on with the present policy's labels before this iteration."""

    @property
    def queries(self) -> Sequence[Query]:
        return Joined(self.labelled, self.unlabelled)


def iterations_per_pass(interval: float) -> int:
    """Iterations in one pass over the labelled queries."""
    return max(1, round(1 / interval))


def next_interval(job: Job, method: ResolvedMethod, position: Position) -> Interval | None:
    """The iteration that ``position`` is in or before; None when the budget is spent or nothing can be learned."""
    settings = job.config.evolve
    per_pass = iterations_per_pass(method.interval)
    number = position.iteration
    if settings.max_steps and position.total_steps >= settings.max_steps:
        return None
    if settings.passes and number > math.ceil(settings.passes * per_pass - 1e-9):
        return None
    if position.barren >= per_pass:
        job.say(
            f"Stopping: {position.barren} iterations in a row (a whole pass over the queries) selected no response. "
            "The policy answers nothing correctly, or the selection lets nothing through"
        )
        return None
    labelled = _share(job.task.labelled, number, per_pass, (job.config.seed, "labelled"))
    unlabelled: Sequence[Query] = []
    if _unlabelled_join(job, position, per_pass):
        unlabelled = _share(job.task.unlabelled, number, per_pass, (job.config.seed, "unlabelled"))
        if job.config.prompts.ratio is not None:  # every pass has its own order, so that others come in the next
            unlabelled = unlabelled[: round(job.config.prompts.ratio * len(labelled))]
    sweep = settings.method != "sft" and (number - 1) % job.config.temperature.every == 0
    every = job.config.prm.refresh_every
    refresh = number > 1 and bool(every) and (number - 1) % every == 0 and needs_prm(job.config)
    return Interval(number, labelled, unlabelled, sweep, refresh)


def _share(queries: Sequence[Query], number: int, per_pass: int, key: tuple[object, ...]) -> Sequence[Query]:
    """Iteration ``number``'s part of its pass; every pass has its own order, and parts differ by one query at most."""
    this_pass, part = divmod(number - 1, per_pass)
    order = shuffled(queries, *key, this_pass)
    return order[len(order) * part // per_pass : len(order) * (part + 1) // per_pass]


def _unlabelled_join(job: Job, position: Position, per_pass: int) -> bool:
    """Unlabelled prompts join once the share ``prompts.mixin`` of the training is done."""
    if job.config.prompts.unlabelled == "none":
        return False
    settings = job.config.evolve
    done = []
    if settings.max_steps:
        done.append((position.total_steps - position.step) / settings.max_steps)
    if settings.passes:
        done.append((position.iteration - 1) / (settings.passes * per_pass))
    return max(done, default=0.0) >= job.config.prompts.mixin
