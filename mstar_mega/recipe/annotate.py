"""Monte-Carlo annotation: how often does the policy reach the gold answer from the end of each step?

Every response of a query and all continuations of its steps share the query's image and prompt; a beginning that
several responses have in common is continued once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mstar_mega.config import AnnotateConfig
from mstar_mega.data.order import shuffled
from mstar_mega.data.types import Group, Query, Response
from mstar_mega.generation.engine import Request, Sample, SampleSpec
from mstar_mega.kernels.noise import key_of
from mstar_mega.platform.distributed import sum_over_data
from mstar_mega.recipe.blocks import in_blocks
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.recipe.rollouts import Actors, Sampling, judge, sample_groups, sampling_limits, to_response
from mstar_mega.rewards.steps import count_stepless, warn_stepless

Beginning = tuple[int, ...]
"""Token ids from a response's start to the end of one of its steps."""


def annotate(job: Job, actors: Actors) -> list[Group]:
    """Step labels for this rank's share of the annotated queries, from disk where they are finished.

    All of them are in memory here and in the PRM's training: ``annotate.queries`` bounds that, not the set's size.
    """
    with job.stage("annotate"):
        return label_steps(job, actors)


def label_steps(job: Job, actors: Actors, after: int = 0) -> list[Group]:
    """This rank's share of the queries annotated by the policy after an iteration (0: the warm-up's).

    Each time other queries, other random numbers and a directory of its own.
    """
    timer = Timer(job)
    name = f"annotate_{after:04d}" if after else "annotate"
    labelled = in_blocks(
        job,
        annotated_queries(job, after),
        job.rollouts / name,
        "annotate steps",
        _origin(job, actors),
        lambda block: _label(job, actors, name, block),
    )
    groups = list(labelled)
    _log(job, groups, after, timer.seconds)
    return groups


def annotated_queries(job: Job, after: int) -> Sequence[Query]:
    """The labelled queries that are annotated after an iteration (0: before the first)."""
    key = (job.config.seed, "annotate", *([after] if after else []))
    return shuffled(job.task.labelled, *key)[: job.config.annotate.queries]


def _origin(job: Job, actors: Actors) -> dict[str, Any]:
    """What the labels depend on, besides the queries and the seed."""
    settings = job.config.annotate
    counts = {"responses": settings.responses, "rollouts": settings.rollouts, "temperature": settings.temperature}
    return {"drawn_by": actors.fingerprint(), **counts, **sampling_limits(job)}


def _log(job: Job, groups: list[Group], after: int, seconds: float) -> None:
    steps = [step for group in groups for response in group.responses for step in response.steps]
    counts = sum_over_data(
        {
            "queries": len(groups),
            "responses": sum(len(group.responses) for group in groups),
            "steps": len(steps),
            "tokens": sum(_tokens(group) for group in groups),
            "rollouts": sum(len(_beginnings(group)) for group in groups) * job.config.annotate.rollouts,
            "positive": sum((step.label or 0) > 0 for step in steps),
            "without_steps": count_stepless(groups),
            "truncated": sum(response.truncated for group in groups for response in group.responses),
        }
    )
    positive = counts.pop("positive") / max(1, counts["steps"])
    whole = {name: int(value) for name, value in counts.items()}
    job.log("annotation", iteration=after, **whole, positive_share=positive, seconds=seconds)
    job.say(f"   {whole['steps']} steps of {whole['responses']} responses labelled, {100 * positive:.1f}% can succeed")
    warning = warn_stepless(whole["without_steps"], whole["responses"])
    if warning:
        job.say(warning)


def _tokens(group: Group) -> int:
    """Tokens drawn for a group, in responses and continuations."""
    return group.continuation_tokens + sum(len(response.tokens) for response in group.responses)


def _label(job: Job, actors: Actors, name: str, queries: list[Query]) -> list[Group]:
    """Sample responses of a block of queries and label their steps. ``name`` names the random numbers."""
    settings = job.config.annotate
    sampling = Sampling(name, settings.temperature, settings.responses)
    groups = sample_groups(job, actors.engine, queries, sampling)
    judge(job, groups)
    shares = _success_shares(job, actors, groups, settings, name)
    for group, share in zip(groups, shares, strict=True):
        for response in group.responses:
            for step in response.steps[:-1]:
                step.label = share[tuple(response.tokens[: step.end])]
            # Nothing follows the last step: its outcome is the answer's.
            for step in response.steps[-1:]:
                step.label = float(bool(response.correct))
    return groups


def _success_shares(
    job: Job, actors: Actors, groups: Sequence[Group], settings: AnnotateConfig, name: str
) -> list[dict[Beginning, float]]:
    """For each group, the share of correct continuations of every beginning."""
    requests: list[Request] = []
    for group in groups:
        drafts = [response.tokens for response in group.responses]
        samples = [
            SampleSpec(key_of(name, group.query.id, beginning, i), draft, len(beginning))
            for beginning, draft in _beginnings(group).items()
            for i in range(settings.rollouts)
        ]
        requests.append(Request(job.prompt(group.query), samples, drafts))
    drawn = actors.engine.generate(requests, settings.temperature)
    for group, of_group in zip(groups, drawn, strict=True):
        group.continuation_tokens = sum(len(sample.tokens) for sample in of_group)
    continued = [
        Group(group.query, _continuations(job, group, samples, settings.rollouts))
        for group, samples in zip(groups, drawn, strict=True)
    ]
    judge(job, continued)
    return [
        _shares(list(_beginnings(group)), continuations.responses, settings.rollouts)
        for group, continuations in zip(groups, continued, strict=True)
    ]


def _beginnings(group: Group) -> dict[Beginning, int]:
    """Every distinct beginning that ends at a step before the last, with a response that has it."""
    found: dict[Beginning, int] = {}
    for response in group.responses:
        for step in response.steps[:-1]:
            found.setdefault(tuple(response.tokens[: step.end]), response.index)
    return found


def _continuations(job: Job, group: Group, samples: list[Sample], rollouts: int) -> list[Response]:
    """Whole responses: each beginning with what was drawn after it."""
    beginnings = [beginning for beginning in _beginnings(group) for _ in range(rollouts)]
    return [
        to_response(job, i, Sample([*beginning, *sample.tokens], sample.log_probs, sample.truncated))
        for i, (beginning, sample) in enumerate(zip(beginnings, samples, strict=True))
    ]


def _shares(beginnings: list[Beginning], continuations: list[Response], rollouts: int) -> dict[Beginning, float]:
    return {
        beginning: sum(bool(r.correct) for r in continuations[b * rollouts : (b + 1) * rollouts]) / rollouts
        for b, beginning in enumerate(beginnings)
    }
