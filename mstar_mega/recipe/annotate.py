"""Monte-Carlo annotation: how often does the policy reach the gold answer from the end of each step?

Every response of a query and all continuations of its steps share the query's image and prompt; a beginning that
several responses have in common is continued once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mstar_mega.data.order import shuffled
from mstar_mega.data.types import Group, Query, Response
from mstar_mega.generation.engine import Engine, Request, Sample, SampleSpec
from mstar_mega.kernels.noise import key_of
from mstar_mega.platform.distributed import sum_over_data
from mstar_mega.recipe.blocks import Made, OpenBlock, Wanted, stream_blocks
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.recipe.rollouts import Actors, judge, sample_specs, sampling_limits, to_group, to_response
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
    wanted = [Wanted(job.rollouts / name, _origin(job, actors))]
    make = partial(label_blocks, job, actors.engine, name)
    (labelled,) = stream_blocks(job, annotated_queries(job, after), wanted, "annotate steps", make)
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


@dataclass(frozen=True)
class _Work:
    """A query on its way."""

    block: OpenBlock[Group]
    place: int
    """Of the query in the block."""
    group: Group | None = None
    """The query with its judged responses, whose steps are continued; None: the responses are drawn."""


def label_blocks(job: Job, engine: Engine, name: str, blocks: Iterator[tuple[int, Sequence[Query]]]) -> Iterator[Made]:
    """Sample responses to blocks of queries and label their steps, in one stream. ``name`` names the random numbers.

    A query's steps are continued as soon as its responses are in, before further queries are begun: slots are not
    drained between the two, and few blocks are open at a time.
    """
    settings = job.config.annotate
    sampled: deque[_Work] = deque()
    under_way: dict[int, _Work] = {}

    def requests() -> Iterator[Request | None]:
        fresh = (_Work(block, place) for block in _opened(blocks) for place in range(len(block.queries)))
        number = 0
        while True:
            work = sampled.popleft() if sampled else next(fresh, None)
            if work is not None:
                under_way[number] = work
                number += 1
                yield _request(job, name, work)
            elif any(each.group is None for each in under_way.values()):  # whose continuations are to come
                yield None
            else:
                return

    for number, samples in engine.stream(requests(), settings.temperature):
        work = under_way.pop(number)
        if work.group is None:
            group = to_group(job, work.block.queries[work.place], samples)
            judge(job, [group])
            sampled.append(replace(work, group=group))
            continue
        _label(job, work.group, samples, settings.rollouts)
        if work.block.add(work.place, work.group):
            yield work.block.number, [work.block.in_order()]


def _opened(blocks: Iterator[tuple[int, Sequence[Query]]]) -> Iterator[OpenBlock[Group]]:
    return (OpenBlock(number, queries) for number, queries in blocks)


def _request(job: Job, name: str, work: _Work) -> Request:
    """What the engine is asked for: responses to a query, or continuations of every beginning of those it has."""
    settings, query, group = job.config.annotate, work.block.queries[work.place], work.group
    if group is None:
        return Request(job.prompt(query), sample_specs(name, query, settings.responses))
    specs = [
        SampleSpec(key_of(name, query.id, beginning, i), draft, len(beginning))
        for beginning, draft in _beginnings(group).items()
        for i in range(settings.rollouts)
    ]
    return Request(job.prompt(query), specs, [response.tokens for response in group.responses])


def _label(job: Job, group: Group, samples: Sequence[Sample], rollouts: int) -> None:
    """Label the steps of a group by what its continuations have come to, in place."""
    group.continuation_tokens = sum(len(sample.tokens) for sample in samples)
    continued = Group(group.query, _continuations(job, group, samples, rollouts))
    judge(job, [continued])
    share = _shares(list(_beginnings(group)), continued.responses, rollouts)
    for response in group.responses:
        for step in response.steps[:-1]:
            step.label = share[tuple(response.tokens[: step.end])]
        # Nothing follows the last step: its outcome is the answer's.
        for step in response.steps[-1:]:
            step.label = float(bool(response.correct))


def _beginnings(group: Group) -> dict[Beginning, int]:
    """Every distinct beginning that ends at a step before the last, with a response that has it."""
    found: dict[Beginning, int] = {}
    for response in group.responses:
        for step in response.steps[:-1]:
            found.setdefault(tuple(response.tokens[: step.end]), response.index)
    return found


def _continuations(job: Job, group: Group, samples: Sequence[Sample], rollouts: int) -> list[Response]:
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
