"""The select phase: from judged and scored responses to what the policy is trained on."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, get_args

from mstar_mega.config import SelectionConfig, SelectionRule
from mstar_mega.data.pictures import file_size
from mstar_mega.data.records import write_selected
from mstar_mega.data.types import CheckReasoning, Group, Query
from mstar_mega.data.written_out import bare_answer
from mstar_mega.evaluation.prm_quality import judge_reasoning
from mstar_mega.kernels.noise import key_of
from mstar_mega.platform.distributed import all_gather_objects, sum_over_data
from mstar_mega.recipe.blocks import Blocks, Place
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.generate import iteration_directory
from mstar_mega.recipe.intervals import Interval
from mstar_mega.rewards.selection import CEILING, SCORED_RULES, choose_responses, select, weight_of
from mstar_mega.training.batches import Examples, TrainGroup


@dataclass
class Chosen:
    """Which responses were selected and where they lie: ids and numbers, about a hundred bytes a query."""

    ids: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("i"))
    """Selected responses of each query."""
    positions: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    """Together with the position the :data:`Place` of its group."""
    indices: array[int] = field(default_factory=lambda: array("i"))
    """Sample indices of the selected responses, one query's after another's."""
    weights: array[float] = field(default_factory=lambda: array("d"))
    """Theirs in the loss; empty where all have the same."""
    tokens: array[int] = field(default_factory=lambda: array("q"))
    """Of each query's prompt and selected responses, about."""

    def add(self, id: str, place: Place, indices: Sequence[int], weights: Sequence[float], tokens: int) -> None:
        """One query with its selected responses."""
        self.tokens.append(tokens)
        self.ids.append(id)
        self.sizes.append(len(indices))
        self.positions.append(place[0])
        self.offsets.append(place[1])
        self.indices.extend(indices)
        self.weights.extend(weights)

    def extend(self, other: Chosen) -> None:
        """Another rank's queries behind these."""
        self.ids += other.ids
        self.sizes += other.sizes
        self.positions += other.positions
        self.offsets += other.offsets
        self.indices += other.indices
        self.weights += other.weights
        self.tokens += other.tokens


def choose(job: Job, now: Interval, groups: Blocks) -> Examples:
    """Apply the selection to this rank's groups and gather what was selected: the same examples on every rank."""
    settings, check = job.config.selection, job.task.check_reasoning
    mine, chosen, reasoning = Chosen(), Chosen(), Counter[str]()
    key = key_of(job.config.seed, "select", now.number)
    for block, places in groups.read_blocks():
        for group, place, selected in zip(block, places, select(block, settings, key, check), strict=True):
            if selected:
                weights = [] if settings.weight == "none" else [weight_of(group, r, settings) for r in selected]
                tokens = prompt_tokens(job, group.query) + sum(len(response.tokens) for response in selected)
                mine.add(group.query.id, place, [response.index for response in selected], weights, tokens)
        if check is not None:
            reasoning += _count_reasoning(block, settings, key, check)
    for of_rank in all_gather_objects(mine):
        chosen.extend(of_rank)
    ends = array("q", accumulate(chosen.sizes))

    def indices_of(i: int) -> array[int]:
        return chosen.indices[ends[i] - chosen.sizes[i] : ends[i]]

    def weights_of(i: int) -> list[float] | None:
        return chosen.weights[ends[i] - chosen.sizes[i] : ends[i]].tolist() if chosen.weights else None

    if job.layout.is_main:
        selected_of = ((id, indices_of(i)) for i, id in enumerate(chosen.ids))
        write_selected(job.rollouts / iteration_directory(now.number), selected_of)
    kept = Counter(chosen.sizes) + Counter({0: len(groups.queries) - len(chosen.ids)})
    job.log(
        "selection",
        iteration=now.number,
        rule=settings.rule,
        selected=len(chosen.indices),
        queries_with_selection=len(chosen.ids),
        kept_per_query={str(size): queries for size, queries in sorted(kept.items())},
        **_reasoning_fields(job, reasoning),
    )
    if not chosen.ids:
        job.say(f"   iteration {now.number}: NO RESPONSE SELECTED, nothing is trained in this iteration")

    def read(i: int) -> TrainGroup:
        group = groups.read((chosen.positions[i], chosen.offsets[i]))
        tokens = {response.index: response.tokens for response in group.responses}
        return TrainGroup(group.query, [tokens[index] for index in indices_of(i)], weights=weights_of(i))

    return Examples(chosen.ids, chosen.sizes, read, chosen.tokens)


def prompt_tokens(job: Job, query: Query) -> int:
    """Tokens of a query's prompt, for sharing out work; where nothing is shared out, 0: images are looked at for it."""
    if job.layout.data_size == 1:
        return 0
    return job.family.prompt_length(query.question, [file_size(image.path) for image in query.images])


def _count_reasoning(
    block: Sequence[Group], settings: SelectionConfig, key: int, check: CheckReasoning
) -> Counter[str]:
    """For each rule that can be applied here: ``RULE known`` and ``RULE right`` responses that it would select."""
    right = [{r.index: verdict for r, verdict in judge_reasoning(group, check)} for group in block]
    unscored = any(r.score is None for group in block for r in group.responses if r.correct)
    counts: Counter[str] = Counter()
    for rule in get_args(SelectionRule):
        if rule == CEILING or (unscored and rule in SCORED_RULES):
            continue
        for verdicts, chosen in zip(right, choose_responses(block, replace(settings, rule=rule), key), strict=True):
            known = [verdicts[response.index] for response in chosen if response.index in verdicts]
            counts.update({f"{rule} known": len(known), f"{rule} right": sum(known)})
    return counts


def _reasoning_fields(job: Job, counts: Counter[str]) -> dict[str, Any]:
    """The field ``right_reasoning``: by rule, the share of right reasoning among what it would select, of all ranks."""
    if job.task.check_reasoning is None:
        return {}
    whole, by_rule = sum_over_data(counts), {}
    for rule in get_args(SelectionRule):
        right, known = int(whole.get(f"{rule} right", 0)), int(whole.get(f"{rule} known", 0))
        if known:
            by_rule[rule] = {"share": right / known, "responses": known}
    own = by_rule.get(job.config.selection.rule)
    if own is not None:
        everyone, chosen = 100 * by_rule["all_correct"]["share"], 100 * own["share"]
        job.say(f"   right reasoning: {everyone:.1f}% of the correct responses, {chosen:.1f}% of those selected")
    return {"right_reasoning": by_rule}


def gold_examples(job: Job, now: Interval) -> Examples:
    """The SFT baseline: gold answers without reasoning."""

    def read(i: int) -> TrainGroup:
        query = now.labelled[i]
        assert query.answer is not None, "it is labelled"
        return TrainGroup(query, [job.family.response_tokens(bare_answer(query.answer))])

    ids = [query.id for query in now.labelled]
    return Examples(ids, array("i", [1]) * len(ids), read)
