"""Measure a policy: greedy accuracy, Pass@K and Reward-Pass@K on validation and test queries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from mstar_mega.data.types import Group, Query
from mstar_mega.evaluation.passk import Exploration, accuracy_by_kind, greedy_accuracy, measure
from mstar_mega.evaluation.prm_quality import (
    describe,
    judge_reasoning,
    measure_quality,
    measure_reasoning_quality,
    share_of,
    warn_not_better,
)
from mstar_mega.recipe.blocks import Blocks
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.recipe.rollouts import (
    VALIDATION_NOISE,
    Actors,
    Sampling,
    drawn,
    gather_groups,
    rollout,
    score_responses,
)

Split = Literal["validation", "test"]


def split_queries(job: Job, split: Split) -> Sequence[Query]:
    """The queries of an evaluation split."""
    return job.task.validation if split == "validation" else job.task.test


def measure_greedy(job: Job, actors: Actors, stage: str, iteration: int, split: Split, at: str = "") -> float | None:
    """Greedy accuracy of a split, logged with its standard error and by question type.

    ``at`` sets apart a policy inside its iteration (see :func:`measure_exploration`).
    """
    timer = Timer(job)
    groups = _greedy(job, actors, iteration, split, at)
    accuracy = greedy_accuracy(groups)
    job.log("evaluation", **_greedy_fields(stage, iteration, split, groups), seconds=timer.seconds)
    if accuracy is not None:
        job.say(f"   {stage} {iteration}: {split} greedy accuracy {100 * accuracy:.1f}% of {len(groups)}")
    return accuracy


def measure_exploration(job: Job, actors: Actors, stage: str, iteration: int, at: str = "") -> Exploration:
    """Greedy accuracy, Pass@K and (with a PRM) Reward-Pass@K on the validation queries, sampled at temperature 1.

    ``at`` becomes part of the responses' directory, so that a policy inside its iteration, or other settings, leave
    those of others alone. The random numbers are the same for all, after every iteration.
    """
    timer = Timer(job)
    settings = job.config.evaluation
    greedy = _greedy(job, actors, iteration, "validation", at)
    sampled = gather_groups(exploration_responses(job, actors, iteration, at))
    result = measure(sampled, settings.k, settings.reward_k, job.config.selection.distinct)
    fields = {**_greedy_fields(stage, iteration, "validation", greedy), **asdict(result), **drawn([*greedy, *sampled])}
    check = job.task.check_reasoning
    if check is not None:
        right = [right for group in sampled for _, right in judge_reasoning(group, check)]
        fields["right_reasoning"] = share_of(right)
    job.log("evaluation", **fields, seconds=timer.seconds)
    job.say(f"   {stage} {iteration}: validation {exploration_in_words(result)}")
    if actors.prm is not None:
        log_prm_quality(job, sampled, stage, iteration, "validation")
    return result


def exploration_responses(job: Job, actors: Actors, iteration: int, at: str = "") -> Blocks:
    """The scored responses that :func:`measure_exploration` reads: sampled, where they are not on disk already."""
    name = f"evaluation_{iteration:04d}{at}_validation_sampled"
    sampling = Sampling(name, 1.0, job.config.evaluation.k, key=VALIDATION_NOISE)
    return rollout(job, actors, job.task.validation, sampling)


def measure_refreshed(job: Job, actors: Actors, iteration: int, measured: Blocks) -> None:
    """What a refresh after an iteration has gained: the same responses of the same policy in the order of the new PRM.

    ``measured``: :func:`exploration_responses` of the PRM before.
    """
    assert actors.prm is not None, "a refreshed PRM"
    groups = list(measured)
    score_responses(job, actors.prm, groups)
    log_prm_quality(job, gather_groups(groups), "refresh", iteration, "validation")


def exploration_in_words(result: Exploration) -> str:
    """The measures of exploration in one line."""

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}%"

    text = (
        f"Pass@{result.k} {shown(result.pass_at_k)}, Pass@{result.reward_k} {shown(result.pass_at_reward_k)} at random"
    )
    if result.reward_pass_at_k is None or result.reward_gain is None:
        return text
    error = "" if result.reward_gain_stderr is None else f" ± {100 * result.reward_gain_stderr:.1f}"
    gain = f"{100 * result.reward_gain:+.1f}{error} points to random"
    return f"{text}, Reward-Pass@{result.reward_k} {shown(result.reward_pass_at_k)} ({gain})"


def log_prm_quality(
    job: Job, groups: Sequence[Group], stage: str, iteration: int, split: Literal["held_out", "validation"], **more: Any
) -> None:
    """Log and tell how well the PRM orders the responses of these judged and scored groups.

    ``more`` joins the event. Warns where what is free orders them as well.
    """
    check = job.task.check_reasoning
    quality = measure_quality(groups)
    reasoning = None if check is None else measure_reasoning_quality(groups, check)
    fields = {**asdict(quality), "reasoning": None if reasoning is None else asdict(reasoning)}
    job.log("prm_quality", stage=stage, iteration=iteration, split=split, **fields, **more)
    where = split.replace("_", "-")
    job.say(f"   PRM on {where} responses: {describe(quality)}")
    if reasoning is not None:
        job.say(f"   and their reasoning, where the answer is right: {describe(reasoning)}")
    warning = warn_not_better(quality)
    if warning is not None:
        job.say(warning)


def _greedy(job: Job, actors: Actors, iteration: int, split: Split, at: str) -> list[Group]:
    sampling = Sampling(f"evaluation_{iteration:04d}{at}_{split}_greedy", 0.0, 1)
    unscored = Actors(job, actors.policy, None)
    return gather_groups(rollout(job, unscored, split_queries(job, split), sampling))


def _greedy_fields(stage: str, iteration: int, split: Split, groups: list[Group]) -> dict[str, Any]:
    accuracy = greedy_accuracy(groups)
    count = len(groups)
    return {
        "stage": stage,
        "iteration": iteration,
        "split": split,
        "greedy_accuracy": accuracy,
        "standard_error": None if not count or accuracy is None else (accuracy * (1 - accuracy) / count) ** 0.5,
        "queries": count,
        **drawn(groups),
        "by_kind": accuracy_by_kind(groups),
        "kind_queries": dict(sorted(Counter(group.query.kind for group in groups).items())),
    }
