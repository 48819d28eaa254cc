"""PRM training: the warm-up policy's trunk learns to score reasoning steps from Monte-Carlo labels.

A refresh trains it on with labels of a later policy.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from torch import Tensor

from mstar_mega.data.types import Group, Query
from mstar_mega.evaluation.passk import accuracy, auc
from mstar_mega.models.build import build_model
from mstar_mega.models.lmm import LMM
from mstar_mega.platform.distributed import broadcast_object
from mstar_mega.recipe.annotate import annotated_queries, label_steps
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.evaluate import log_prm_quality
from mstar_mega.recipe.fit import (
    Position,
    checkpoint_folder,
    fit,
    forget_old_refreshes,
    note_more_steps,
    restore,
    restore_weights,
    save,
    steps_taken,
)
from mstar_mega.recipe.held_out import divide
from mstar_mega.recipe.outside_prm import load_outside_prm
from mstar_mega.recipe.rollouts import Actors, score_responses
from mstar_mega.rewards.reader import PRM, Reader
from mstar_mega.training.batches import Batches, Examples, TrainGroup, split_into_epochs
from mstar_mega.training.checkpoint import find_checkpoints
from mstar_mega.training.trainer import Trainer, weights_of


def build_prm(job: Job, policy: LMM) -> LMM:
    """A PRM whose trunk is a copy of the policy's present weights."""
    prm = build_model(job.config, job.family, job.config.prm.head, draw=False)
    weights = policy.state_dict()
    own = {name: value for name, value in prm.state_dict().items() if name in ("score_head", "likelihood_weights")}
    prm.load_state_dict(own | {name: weights[name] for name in prm.state_dict() if name not in own})
    if job.config.prm.freeze_vision and prm.pre_process:
        for module in (prm.vision, prm.connector):
            module.requires_grad_(False)
    return prm


def train_prm(job: Job, policy: LMM, groups: Sequence[Group]) -> PRM:
    """Train and measure the PRM on this rank's annotated groups. ``policy`` holds the warm-up weights."""
    with job.stage("prm"):
        return _train(job, policy, groups, Position())


def refresh_prm(job: Job, actors: Actors, after: int, before: int) -> None:
    """Let the present policy, that after an iteration, label other queries, and train the PRM on with them.

    Weights go on from the present ones, optimizer and schedule start over. Checkpoints lie in a folder of their own: a
    killed refresh goes on, a finished one is read back. ``before``: the refresh that the present PRM is from.
    """
    assert actors.prm is not None, "a refresh without a PRM"
    begun = broadcast_object(bool(find_checkpoints(checkpoint_folder(job, "prm", after))))
    job.say(f"== PRM refresh after iteration {after}")
    with job.quiet(begun):
        groups = label_steps(job, actors, after)
    start = Position(iteration=after, total_steps=steps_taken(job, "prm", before))
    weights = weights_of(actors.prm.model)
    actors.use_prm(None)
    actors.use_prm(_train(job, actors.policy, groups, start, weights))
    forget_old_refreshes(job)


def _train(
    job: Job, policy: LMM, groups: Sequence[Group], start: Position, weights: dict[str, Tensor] | None = None
) -> PRM:
    """Train from ``weights`` (None: the policy's trunk and a fresh head), save, load what was saved, and measure."""
    settings, after = job.config.prm, start.iteration
    train, held_out = divide(job, groups, _annotated_before(job, after))
    batches = _batches(job, train, after)
    model = build_prm(job, policy)
    if weights is not None:
        model.load_state_dict(weights)
        weights.clear()  # with the last reference to the PRM before, whose memory the training may need
    trainer = Trainer(model, settings.optimizer, job.prompt, len(batches), job.config.parallel)
    position = restore(job, trainer, "prm", after) or start
    note_more_steps(job, "prm", position, len(batches))
    if not position.finished:
        fit(job, trainer, "prm", batches, position)
        position.finished = True
        save(job, trainer, "prm", position)
    del model, trainer  # what is used from here on is what was saved
    gc.collect()  # gradients and moments hang on hooks that refer to each other
    prm = load_prm(job, policy, after)
    assert prm is not None, "just saved"
    _measure(job, prm, held_out, after)
    return prm


def load_prm(job: Job, policy: LMM, refreshed: int = 0) -> PRM | None:
    """The PRM of the settings, frozen: the one from outside, or the run's own, refreshed after that iteration.

    None when the run's is not finished.
    """
    if job.config.prm.checkpoint is not None:
        return load_outside_prm(job)
    prm = PRM(build_prm(job, policy).requires_grad_(False), Reader(job.prompt))
    position = restore_weights(job, prm.model, "prm", refreshed)
    return prm if position is not None and position.finished else None


def _annotated_before(job: Job, after: int) -> list[Sequence[Query]]:
    every = max(1, job.config.prm.refresh_every)
    return [annotated_queries(job, earlier) for earlier in range(0, after, every)]


def _batches(job: Job, groups: Sequence[Group], after: int) -> Batches:
    settings = job.config.prm
    examples = [example for group in groups if (example := _example(group, settings.labels == "hard")).responses]
    key = (job.config.seed, "prm", *([after] if after else []))
    return split_into_epochs(Examples.of(examples), settings.optimizer, settings.epochs, key)


def _example(group: Group, hard: bool) -> TrainGroup:
    """Responses with their labelled step ends; a response without steps teaches nothing and is left out."""
    responses = [response for response in group.responses if response.steps]
    labels = [[_label(step.label, hard) for step in response.steps] for response in responses]
    return TrainGroup(
        group.query,
        [response.tokens for response in responses],
        [[step.end for step in response.steps] for response in responses],
        labels,
    )


def _label(share: float | None, hard: bool) -> float:
    assert share is not None, "an annotated step has a label"
    return float(share > 0) if hard else share


def _measure(job: Job, prm: PRM, held_out: list[Group], after: int) -> None:
    """How well the PRM orders a held-out query's responses, and accuracy and AUC over all held-out steps together.

    A step counts as good where its label is at least the threshold that its score must reach: the head has learnt
    the label itself, hard or soft.
    """
    score_responses(job, prm, held_out)
    steps = [step for group in held_out for response in group.responses for step in response.steps]
    scores = [step.score for step in steps if step.score is not None]
    threshold = 0.5
    labels = [int(_label(step.label, job.config.prm.labels == "hard") >= threshold) for step in steps]
    pooled = {"pooled_step_accuracy": accuracy(scores, labels, threshold), "pooled_step_auc": auc(scores, labels)}
    positive = sum(labels) / max(1, len(labels))
    if labels and positive in (0.0, 1.0):
        job.warn(
            f"every held-out step is labelled {'good' if positive else 'bad'}: the PRM has learnt nothing that tells "
            "responses apart. More or longer rollouts (annotate.rollouts, annotate.queries), or a better warm-up, help"
        )
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in pooled.items() if value is not None)
    job.say(f"   PRM on {len(steps)} held-out steps, {100 * positive:.1f}% good: {shown or 'nothing to measure on'}")
    more = {**pooled, "steps": len(steps), "positive_share": positive, "threshold": threshold}
    log_prm_quality(job, held_out, "prm", after, "held_out", **more)
