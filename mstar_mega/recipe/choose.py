"""The select phase: from judged and scored responses to what the policy is trained on."""

from __future__ import annotations

from collections.abc import Sequence

from mstar_mega.data.records import write_selected
from mstar_mega.data.types import Group
from mstar_mega.kernels.noise import key_of
from mstar_mega.platform.distributed import all_gather_objects
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.generate import iteration_directory
from mstar_mega.recipe.intervals import Interval
from mstar_mega.recipe.method import gold_response
from mstar_mega.rewards.selection import SelectionSummary, select
from mstar_mega.training.batches import TrainGroup


def choose(job: Job, now: Interval, groups: Sequence[Group]) -> list[TrainGroup]:
    """Apply the selection to this rank's groups and gather what was selected: the same list on every rank."""
    settings = job.config.selection
    summary = SelectionSummary()
    examples: list[TrainGroup] = []
    indices: dict[str, list[int]] = {}
    chosen = select(groups, settings, key_of(job.config.seed, "select", now.number))
    for group, selected in zip(groups, chosen, strict=True):
        summary.add(group)
        if selected:
            examples.append(TrainGroup(group.query, [response.tokens for response in selected]))
            indices[group.query.id] = [response.index for response in selected]
    everyone = all_gather_objects((examples, summary, indices))
    total = SelectionSummary()
    for _, part, _ in everyone:
        total.merge(part)
    if job.layout.is_main:
        write_selected(job.rollouts / iteration_directory(now.number), [part for *_, part in everyone])
    job.log(
        "selection",
        iteration=now.number,
        rule=settings.rule,
        selected=total.selected,
        queries_with_selection=total.queries - total.queries_without_selection,
        kept_per_query=total.to_json()["kept_per_query"],
    )
    if not total.selected:
        job.say(f"   iteration {now.number}: NO RESPONSE SELECTED, nothing is trained in this iteration")
    return [example for part, *_ in everyone for example in part]


def gold_examples(job: Job, now: Interval) -> list[TrainGroup]:
    """The SFT baseline: gold answers without reasoning."""
    return [
        TrainGroup(query, [job.family.response_tokens(gold_response(query.answer))])
        for query in now.labelled
        if query.answer is not None
    ]
