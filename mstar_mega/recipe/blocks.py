"""Blocks of queries on disk: the unit of work of a model copy and of a resume.

A block's responses depend on nothing outside it, and its file is written atomically when they are finished. What a
killed run had finished is taken as it is, if it comes from the same weights and settings: a file beside the blocks says
from which. Nothing of a block stays in memory; whoever needs its groups, on any rank, reads them from the run
directory, which all ranks share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mstar_mega.data.records import (
    DamagedFileError,
    placed_groups,
    read_group,
    read_queries,
    read_seconds,
    write_groups,
)
from mstar_mega.data.types import Group, Query
from mstar_mega.platform.distributed import barrier, broadcast_object, taken
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.platform.inputs import read_object
from mstar_mega.recipe.context import Job, Timer

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


def in_blocks(
    job: Job,
    queries: Sequence[Query],
    directory: Path,
    description: str,
    origin: Mapping[str, Any],
    make: Callable[[list[Query]], list[Group]],
) -> Blocks:
    """Run ``make`` on each of this rank's blocks of queries that is not finished on disk. Collective.

    ``origin`` (plain data) is what the responses depend on besides the queries: blocks of another origin are made anew.
    """
    blocks = cut(job, queries, directory)
    if job.layout.is_main:
        _clear_foreign(job, directory, origin)
    finished = broadcast_object(_finished(job, blocks) if job.layout.is_main else set())
    waiting = [block for block in blocks.mine if block not in finished]
    _count_time(job, blocks, finished)
    done = len(blocks.mine) - len(waiting)
    with job.progress.task(description, len(blocks.mine), "blocks", done=done) as task:
        for i, block in enumerate(waiting):
            for soon in waiting[i : i + 2]:  # images of the next block are decoded while this one is sampled
                job.prompt.expect(blocks.of(soon))
            timer, score_seconds = Timer(job), job.score_seconds
            made = make(list(blocks.of(block)))
            if job.writes_files:
                seconds = {"all": timer.seconds, "score": round(job.score_seconds - score_seconds, 3)}
                write_groups(blocks.path(block), made, seconds)
            task.advance(1)
    barrier()  # from here on every rank may read every block
    return blocks


@dataclass(frozen=True)
class Wanted:
    """One of several rollouts of the same queries that are made together."""

    directory: Path
    origin: Mapping[str, Any]
    """As in :func:`in_blocks`."""


Made = tuple[int, list[list[Group]]]
"""A block's number and its groups for each rollout that was wanted."""


def stream_blocks(
    job: Job,
    queries: Sequence[Query],
    wanted: Sequence[Wanted],
    description: str,
    make: Callable[[Iterator[tuple[int, Sequence[Query]]]], Iterator[Made]],
) -> list[Blocks]:
    """As :func:`in_blocks`, for several rollouts at once and without an end between blocks. Collective.

    ``make`` is given the blocks that are missing in any of the rollouts, with their numbers, and asks for the next one
    when it has room for it. A model copy takes blocks until none is left: who made one changes nothing in it.
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
        for block, made in make(_taken(job, first, missing)):
            if job.writes_files:
                share = len(wanted)
                seconds = {"all": timer.seconds / share, "score": (job.score_seconds - score_seconds) / share}
                for blocks, groups in zip(rollouts, made, strict=True):
                    write_groups(blocks.path(block), groups, {name: round(s, 3) for name, s in seconds.items()})
            timer, score_seconds = Timer(job), job.score_seconds
            task.advance(1)
    barrier()  # from here on every rank may read every block
    return rollouts


def _taken(job: Job, blocks: Blocks, missing: list[int]) -> Iterator[tuple[int, Sequence[Query]]]:
    """The missing blocks that this model copy gets to, images decoded a block ahead."""
    job.streams_begun += 1
    ahead: list[int] = []
    for block in taken(missing, f"blocks {job.streams_begun}", job.layout):
        job.prompt.expect(blocks.of(block))
        ahead.append(block)
        if len(ahead) > 1:
            yield ahead[0], blocks.of(ahead.pop(0))
    for block in ahead:
        yield block, blocks.of(block)


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
