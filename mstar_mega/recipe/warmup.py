"""Warm-up: SFT on written-out chains of thought gives the policy its first ability to reason in steps."""

from __future__ import annotations

import math

from mstar_mega.recipe.context import Job
from mstar_mega.recipe.evaluate import measure_greedy
from mstar_mega.recipe.fit import Position, fit, load_start, restore, save
from mstar_mega.recipe.rollouts import Actors
from mstar_mega.recipe.warmup_data import read_warmup_set
from mstar_mega.training.batches import TrainGroup, split_into_steps
from mstar_mega.training.trainer import Trainer


def warmup_steps(job: Job) -> list[list[TrainGroup]]:
    """All batches of the warm-up, epoch after epoch; a fractional epoch is cut short."""
    settings = job.config.warmup
    if settings.set is None:
        groups = [TrainGroup(query, [job.family.response_tokens(text)]) for query, text in job.task.warmup]
    else:
        groups = [TrainGroup(g.query, [r.tokens for r in g.responses]) for g in read_warmup_set(job, settings.set)]
    batches: list[list[TrainGroup]] = []
    for epoch in range(math.ceil(settings.epochs)):
        cut = split_into_steps(groups, settings.optimizer.batch_size, (job.config.seed, "warmup", epoch))
        batches += cut[: math.ceil(len(cut) * min(1.0, settings.epochs - epoch) - 1e-9)]
    return batches


def warmup(job: Job, policy: Trainer) -> Position:
    """Train the warm-up policy (or load it) and measure it."""
    with job.stage("warmup"):
        position = restore(job, policy, "warmup")
        if position is None:
            load_start(job, policy)
            position = Position()
        if not position.finished:
            fit(job, policy, "warmup", warmup_steps(job), position)
            position.finished = True
            save(job, policy, "warmup", position)
        actors = Actors(job, policy.model, None)
        measure_greedy(job, actors, "warmup", 0, "validation")
        measure_greedy(job, actors, "warmup", 0, "test")
    return position
