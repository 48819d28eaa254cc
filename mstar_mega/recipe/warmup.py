"""Warm-up: SFT on written-out chains of thought gives the policy its first ability to reason in steps."""

from __future__ import annotations

from array import array

from mstar_mega.recipe.context import Job
from mstar_mega.recipe.evaluate import measure_greedy
from mstar_mega.recipe.fit import Position, fit, load_start, note_more_steps, restore, save
from mstar_mega.recipe.rollouts import Actors
from mstar_mega.training.batches import Batches, Examples, TrainGroup, split_into_epochs
from mstar_mega.training.trainer import Trainer


def warmup_batches(job: Job) -> Batches:
    """All batches of the warm-up, epoch after epoch; a fractional epoch is cut short."""
    settings = job.config.warmup
    examples, key = _written_out(job), (job.config.seed, "warmup")
    return split_into_epochs(examples, settings.optimizer, settings.epochs, key)


def _written_out(job: Job) -> Examples:
    """The chains of thought that come with the data, or that a file brings."""

    def read(i: int) -> TrainGroup:
        query, text = job.task.warmup[i]
        return TrainGroup(query, [job.family.response_tokens(text)])

    ids = [query.id for query, _ in job.task.warmup]
    return Examples(ids, array("i", [1]) * len(ids), read)


def warmup(job: Job, policy: Trainer, batches: Batches) -> Position:
    """Train the warm-up policy (or load it) and measure it."""
    with job.stage("warmup"):
        position = restore(job, policy, "warmup")
        if position is None:
            load_start(job, policy)
            position = Position()
        note_more_steps(job, "warmup", position, len(batches))
        if not position.finished:
            fit(job, policy, "warmup", batches, position)
            position.finished = True
            save(job, policy, "warmup", position)
        actors = Actors(job, policy.model, None)
        measure_greedy(job, actors, "warmup", 0, "validation")
        measure_greedy(job, actors, "warmup", 0, "test")
    return position
