"""PRM training: the warm-up policy's trunk learns to score reasoning steps from Monte-Carlo labels."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from mstar_mega.data.types import Group
from mstar_mega.evaluation.passk import accuracy, auc
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.build import build_model
from mstar_mega.models.lmm import LMM
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.evaluate import log_prm_quality
from mstar_mega.recipe.fit import Position, fit, note_more_steps, restore, restore_weights, save
from mstar_mega.recipe.rollouts import gather_groups
from mstar_mega.rewards.process import score_groups
from mstar_mega.training.batches import Batches, Examples, TrainGroup, split_into_epochs
from mstar_mega.training.trainer import Trainer


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


def train_prm(job: Job, policy: LMM, groups: Sequence[Group]) -> LMM:
    """Train and measure the PRM on this rank's annotated groups. ``policy`` holds the warm-up weights."""
    settings = job.config.prm
    with job.stage("prm"):
        train, held_out = _split(job, groups)
        batches = _batches(job, train)
        cut = job.config.parallel.distributed_optimizer
        model = build_prm(job, policy)
        trainer = Trainer(model, settings.optimizer, job.prompt, len(batches), distributed_optimizer=cut)
        position = restore(job, trainer, "prm") or Position()
        note_more_steps(job, "prm", position, len(batches))
        if not position.finished:
            fit(job, trainer, "prm", batches, position)
            position.finished = True
            save(job, trainer, "prm", position)
        del model, trainer  # what is used from here on is what was saved
        gc.collect()  # gradients and moments hang on hooks that refer to each other
        prm = load_prm(job, policy)
        assert prm is not None, "just saved"
        _measure(job, prm, held_out)
    return prm


def load_prm(job: Job, policy: LMM) -> LMM | None:
    """The trained, frozen PRM of a run; None when it is not finished."""
    prm = build_prm(job, policy).requires_grad_(False)
    position = restore_weights(job, prm, "prm")
    return prm if position is not None and position.finished else None


def _split(job: Job, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """(training, held-out) annotated queries, over all ranks; a stable choice.

    Queries that share an image stand on one side, so the held-out ones can be a few more or fewer than their share.
    """
    everyone = sorted(gather_groups(groups), key=lambda group: key_of(job.config.seed, "held-out", group.query.id))
    wanted = round(len(everyone) * job.config.annotate.held_out)
    train: list[Group] = []
    held_out: list[Group] = []
    for together in _by_image(everyone):
        # A picture with many questions must not take the whole of a small set.
        fits = len(held_out) < wanted and 2 * (len(held_out) + len(together)) <= max(2, len(everyone))
        (held_out if fits else train).extend(together)
    return train, held_out


def _by_image(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups whose queries share an image, directly or through others, together; in the order of their first."""
    component: dict[str, int] = {}
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        digests = [image.digest for image in group.query.images]
        joined = sorted({component[digest] for digest in digests if digest in component} | {i})
        members[joined[0]] = [*(member for one in joined for member in members.pop(one, [])), i]
        held = (image.digest for member in members[joined[0]] for image in groups[member].query.images)
        component.update(dict.fromkeys(held, joined[0]))
    return [[groups[i] for i in of_image] for of_image in sorted(map(sorted, members.values()))]


def _batches(job: Job, groups: Sequence[Group]) -> Batches:
    settings = job.config.prm
    examples = [example for group in groups if (example := _example(group, settings.labels == "hard")).responses]
    key = (job.config.seed, "prm")
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


def _measure(job: Job, prm: LMM, held_out: list[Group]) -> None:
    """How well the PRM orders a held-out query's responses, and accuracy and AUC over all held-out steps together.

    A step counts as good where its label is at least the threshold that its score must reach: the head has learnt
    the label itself, hard or soft.
    """
    score_groups(prm, job.prompt, held_out, job.config.prm.reduction, job.config.generation.prefill_tokens)
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
    log_prm_quality(
        job, held_out, "prm", 0, "held_out", **pooled, steps=len(steps), positive_share=positive, threshold=threshold
    )
