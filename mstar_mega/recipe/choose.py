"""The select phase: from judged and scored responses to what the policy is trained on."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from mstar_mega.data.records import write_selected
from mstar_mega.kernels.noise import key_of
from mstar_mega.platform.distributed import all_gather_objects
from mstar_mega.recipe.blocks import Blocks, Place
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.generate import iteration_directory
from mstar_mega.recipe.intervals import Interval
from mstar_mega.recipe.method import gold_response
from mstar_mega.rewards.selection import select
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

    def add(self, id: str, place: Place, indices: Sequence[int]) -> None:
        """One query with its selected responses."""
        self.ids.append(id)
        self.sizes.append(len(indices))
        self.positions.append(place[0])
        self.offsets.append(place[1])
        self.indices.extend(indices)

    def extend(self, other: Chosen) -> None:
        """Another rank's queries behind these."""
        self.ids += other.ids
        self.sizes += other.sizes
        self.positions += other.positions
        self.offsets += other.offsets
        self.indices += other.indices


def choose(job: Job, now: Interval, groups: Blocks) -> Examples:
    """Apply the selection to this rank's groups and gather what was selected: the same examples on every rank."""
    settings = job.config.selection
    mine, chosen = Chosen(), Chosen()
    key = key_of(job.config.seed, "select", now.number)
    for block, places in groups.read_blocks():
        for group, place, selected in zip(block, places, select(block, settings, key), strict=True):
            if selected:
                mine.add(group.query.id, place, [response.index for response in selected])
    for of_rank in all_gather_objects(mine):
        chosen.extend(of_rank)
    ends = array("q", accumulate(chosen.sizes))

    def indices_of(i: int) -> array[int]:
        return chosen.indices[ends[i] - chosen.sizes[i] : ends[i]]

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
    )
    if not chosen.ids:
        job.say(f"   iteration {now.number}: NO RESPONSE SELECTED, nothing is trained in this iteration")

    def read(i: int) -> TrainGroup:
        group = groups.read((chosen.positions[i], chosen.offsets[i]))
        tokens = {response.index: response.tokens for response in group.responses}
        return TrainGroup(group.query, [tokens[index] for index in indices_of(i)])

    return Examples(chosen.ids, chosen.sizes, read)


def gold_examples(job: Job, now: Interval) -> Examples:
    """The SFT baseline: gold answers without reasoning."""

    def read(i: int) -> TrainGroup:
        query = now.labelled[i]
        assert query.answer is not None, "it is labelled"
        return TrainGroup(query, [job.family.response_tokens(gold_response(query.answer))])

    ids = [query.id for query in now.labelled]
    return Examples(ids, array("i", [1]) * len(ids), read)
