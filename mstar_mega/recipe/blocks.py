"""Blocks of queries on disk: the unit of work of a model copy and of a resume.

A block's responses depend on nothing outside it, and its file is written atomically when they are finished. What a
killed run had finished is taken as it is, if it comes from the same weights and settings: a file beside the blocks says
from which. Nothing of a block stays in memory; whoever needs its groups, on any rank, reads them from the run
directory, which all ranks share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from mstar_mega.data.records import (
    DamagedFileError,
    placed_groups,
    read_group,
    read_queries,
    read_seconds,
    write_groups,
)
from mstar_mega.data.types import Group, Query
from mstar_mega.generation.engine import SamplingAbandoned
from mstar_mega.platform import stopping, watch
from mstar_mega.platform.distributed import broadcast_object, model_copy, taken
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.platform.inputs import read_object
from mstar_mega.recipe.context import Job, Timer

T = TypeVar("T")

ORIGIN = "origin.json"
_PIECES, _LEAST_BLOCK = 64, 8
"""Queries are cut into so many blocks, each of so many queries at least and ``queries_per_block`` at most."""

Place = tuple[int, int]
"""Where a group lies: its query's position among all, and the byte of the block's file at which it begins."""


@dataclass(frozen=True)
class Blocks:
    """Queries cut into blocks, and the files of their groups."""

    queries: Sequence[Query]
    directory: Path
    size: int
    """Queries of a block."""
    mine: range
    """The numbers of this data-parallel rank's blocks."""

    @property
    def count(self) -> int:
        """Blocks of all ranks."""
        return -(-len(self.queries) // self.size)

    def of(self, block: int) -> Sequence[Query]:
        """The queries of a block."""
        return self.queries[block * self.size : (block + 1) * self.size]

    def path(self, block: int) -> Path:
        """The file of a block."""
        return self.directory / f"block_{block:05d}.jsonl"

    def __iter__(self) -> Iterator[Group]:
        """This rank's groups in order, read block by block."""
        return (group for groups, _ in self.read_blocks() for group in groups)

    def read_blocks(self) -> Iterator[tuple[list[Group], list[Place]]]:
        """This rank's blocks: their groups, and where each lies for any rank to :meth:`read`."""
        for block in self.mine:
            offsets, groups = zip(*placed_groups(self.path(block)), strict=True)
            places = [(block * self.size + row, offset) for row, offset in enumerate(offsets)]
            yield list(map(_with_images_of, self.of(block), groups)), places

    def read(self, place: Place) -> Group:
        """One group of any rank's."""
        position, offset = place
        return _with_images_of(self.queries[position], read_group(self.path(position // self.size), offset))


def _meet(description: str, stopped: bool) -> None:
    """From here on every rank may read every block; raises :class:`stopping.Stopped` where one of them was stopped."""
    watch.beat(f"{description}: waiting for the other ranks")
    stopping.leave_if(stopped)


@dataclass(frozen=True)
class Wanted:
    """One of several rollouts of the same queries that are made together."""

    directory: Path
    origin: Mapping[str, Any]
    """What the responses depend on besides the queries (plain data): blocks of another origin are made anew."""


Made = tuple[int, list[list[Group]]]
"""A block's number and its groups for each rollout that was wanted."""


@dataclass
class OpenBlock(Generic[T]):
    """A block on its way through the engine."""

    number: int
    queries: Sequence[Query]
    made: dict[int, T] = field(default_factory=dict)
    """What has been made of a query, by its place in the block."""

    def add(self, place: int, made: T) -> bool:
        """Whether the block is whole with what is made of the query at ``place``."""
        self.made[place] = made
        return len(self.made) == len(self.queries)

    def in_order(self) -> list[T]:
        """What is made of all queries, of a whole block."""
        return [self.made[place] for place in range(len(self.queries))]


def stream_blocks(
    job: Job,
    queries: Sequence[Query],
    wanted: Sequence[Wanted],
    description: str,
    make: Callable[[Iterator[tuple[int, Sequence[Query]]]], Iterator[Made]],
) -> list[Blocks]:
    """Make the blocks that are not finished on disk, of several rollouts at once and without an end in between.

    Collective. ``make`` is given the blocks that are missing in any of the rollouts, with their numbers, and asks for
    the next one when it has room for it. A model copy takes blocks until none is left: who made one changes nothing in
    it. Asked to stop, it finishes what it has in hand, if ``run.grace_seconds`` suffice, and begins no other.
    """
    rollouts = [cut(job, queries, each.directory) for each in wanted]
    if job.layout.is_main:
        for each in wanted:
            _clear_foreign(job, each.directory, each.origin)
    finished = broadcast_object([_finished(job, one) for one in rollouts] if job.layout.is_main else [])
    for blocks, done in zip(rollouts, finished, strict=True):
        _count_time(job, blocks, done)
    whole = set.intersection(*finished)
    first = rollouts[0]
    missing = [block for block in range(first.count) if block not in whole]
    done_before = len([block for block in first.mine if block in whole])
    with job.progress.task(description, len(first.mine), "blocks", done=done_before) as task:
        timer, score_seconds = Timer(job), job.score_seconds
        source = _Source(job, first, missing, description)
        for block, made in source.until_abandoned(make(iter(source))):
            if job.writes_files:
                share = len(wanted)
                seconds = {"all": timer.seconds / share, "score": (job.score_seconds - score_seconds) / share}
                for blocks, groups in zip(rollouts, made, strict=True):
                    write_groups(blocks.path(block), groups, {name: round(s, 3) for name, s in seconds.items()})
            timer, score_seconds = Timer(job), job.score_seconds
            task.advance(1)
    _meet(description, source.stopped)
    return rollouts


class _Source:
    """The missing blocks that this model copy gets to, images decoded a block ahead; none after a request to stop."""

    def __init__(self, job: Job, blocks: Blocks, missing: list[int], description: str) -> None:
        job.streams_begun += 1
        self._job, self._blocks, self._description = job, blocks, description
        self._taken = taken(missing, f"blocks {job.streams_begun}", job.layout)
        self.stopped = False

    def __iter__(self) -> Iterator[tuple[int, Sequence[Query]]]:
        ahead: list[int] = []
        for block in self._taken:
            self._job.prompt.expect(self._blocks.of(block))
            ahead.append(block)
            if len(ahead) > 1:
                if self._stops():
                    return
                yield ahead[0], self._blocks.of(ahead.pop(0))
        for block in ahead:
            if self._stops():
                return
            yield block, self._blocks.of(block)

    def _stops(self) -> bool:
        watch.beat(self._description)
        self.stopped = stopping.agreed(model_copy())
        return self.stopped

    def until_abandoned(self, made: Iterator[Made]) -> Iterator[Made]:
        """What is made, until the time that there is after a request to stop is over."""
        try:
            yield from made
        except SamplingAbandoned:
            self.stopped = True


def cut(job: Job, queries: Sequence[Query], directory: Path) -> Blocks:
    """The blocks of these queries, and which of them are this rank's to read.

    Few queries are cut finer, so that many model copies have something to do.
    """
    size = min(job.config.generation.queries_per_block, max(_LEAST_BLOCK, -(-len(queries) // _PIECES)))
    whole = Blocks(queries, directory, size, range(0))
    return replace(whole, mine=range(job.layout.data_rank, whole.count, job.layout.data_size))


def all_finished(job: Job, blocks: Blocks, origin: Mapping[str, Any]) -> bool:
    """Whether every block of that origin is on disk and whole. Collective."""
    return broadcast_object(
        job.layout.is_main and _read_origin(blocks.directory) == origin and len(_finished(job, blocks)) == blocks.count
    )


def _count_time(job: Job, blocks: Blocks, finished: set[int]) -> None:
    """Count what this rank's blocks of an earlier start took, once."""
    if blocks.directory in job.counted_rollouts:
        return
    job.counted_rollouts.add(blocks.directory)
    for block in blocks.mine:
        if block in finished:
            seconds = read_seconds(blocks.path(block))
            job.recovered_seconds += seconds.get("all", 0.0)
            job.score_seconds += seconds.get("score", 0.0)


def _with_images_of(query: Query, group: Group) -> Group:
    """A group from disk with the images where they are now: a run directory may have been moved."""
    return replace(group, query=replace(group.query, images=query.images))


def _clear_foreign(job: Job, directory: Path, origin: Mapping[str, Any]) -> None:
    """Delete blocks of another origin, then note the present one."""
    if _read_origin(directory) == origin:
        return
    foreign = sorted(directory.glob("block_*.jsonl"))
    if foreign:
        job.warn(f"{directory} holds responses of another policy or of other settings: they are sampled again")
    for path in foreign:
        path.unlink()
    write_text_atomic(directory / ORIGIN, json.dumps(origin, indent=1) + "\n")


def _read_origin(directory: Path) -> dict[str, Any] | None:
    try:
        return read_object(directory / ORIGIN)
    except (FileNotFoundError, ValueError):
        return None


def _finished(job: Job, blocks: Blocks) -> set[int]:
    """Blocks whose file is whole and of these very queries. Rank 0 decides for all ranks."""
    finished: set[int] = set()
    for block in range(blocks.count):
        path = blocks.path(block)
        try:
            if not path.exists():
                continue
            found, wanted = read_queries(path), blocks.of(block)
            if len(found) == len(wanted) and all(map(_is_same_query, found, wanted)):
                finished.add(block)
        except DamagedFileError as error:
            job.warn(f"DAMAGED ROLLOUT FILE, its responses are sampled again: {error}")
    return finished


def _is_same_query(found: Query, query: Query) -> bool:
    """Whether a query on disk is this one, wherever its images lie now and whatever pseudo answer it was given."""

    def content(one: Query) -> Query:
        images = tuple(replace(image, path="") for image in one.images)
        return replace(one, images=images, answer=None if query.answer is None else one.answer)

    return content(found) == content(query)
