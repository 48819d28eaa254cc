"""Sets in MathV360K's shape, of any size: queries are read from the file when they are asked for."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mstar_mega.config import DataConfig
from mstar_mega.data.index import IndexedFile, build_index, file_mark
from mstar_mega.data.mathv360k import parse_row, to_query
from mstar_mega.data.order import OnDemand
from mstar_mega.data.pictures import PictureReading
from mstar_mega.data.prompts import template_of
from mstar_mega.data.rows import has_surrogate, read_row, read_rows
from mstar_mega.data.splits import LEFT_OVER, SplitSettings, fill
from mstar_mega.data.tables import as_rows, is_table, mark_of
from mstar_mega.data.types import ImageRef, Query, Skipped, Task
from mstar_mega.data.written_out import Named, bare_answer, id_of, name_of, problem_of

ROWS_INDEX, WARMUP_INDEX = "rows.sqlite", "warmup.sqlite"
LISTED = 100
"""So many skipped rows are named one by one; the others are counted by their reason."""


@dataclass(frozen=True)
class Extent:
    """How large a row is, known without reading it."""

    position: int
    """In its split, or among the written-out examples."""
    number: int
    """Its row in the training file."""
    id: str
    bytes: int
    """Of its JSON: more than its question has."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of its images in pixels."""
    response_bytes: int = 0
    """At most what the written-out response has."""


_EXTENT = "rows.number, rows.id, rows.length, width, height"
_WITH_IMAGES = "JOIN rows USING (number) LEFT JOIN images ON images.path = rows.image"


@dataclass(frozen=True)
class Source:
    """A training file with its index, and how its rows become queries."""

    file: IndexedFile
    images: Path
    template: str
    """See ``prompts.template_of``."""
    instruct: bool

    def query(self, number: int, hide: bool) -> Query:
        """The query of row ``number``. Raises ValueError where the file has changed under the index."""
        with self.file.opened() as (index, data):
            id, offset, length, digest = index.execute(
                "SELECT id, offset, length, digest FROM rows WHERE number = ?", (number,)
            ).fetchone()
            try:
                question = parse_row(read_row(data, offset, length))
            except ValueError:
                question = None
        if question is None or question.id != id:
            raise ValueError(
                f"{self.file.source}: row {number} is not what the index {self.file.index} says: the file was changed "
                "while it was in use; start again"
            )
        images = () if question.image is None else (ImageRef(str(self.images / question.image), digest),)
        return to_query(question, template_of(self.template), images, self.instruct, hide)

    def number_at(self, split: str, position: int) -> int:
        """Row number of a split's query at ``position``."""
        with self.file.opened() as (index, _):
            sql = "SELECT number FROM places WHERE split = ? AND position = ?"
            return int(index.execute(sql, (split, position)).fetchone()[0])

    def size(self, split: str) -> int:
        """Number of queries of a split."""
        with self.file.opened() as (index, _):
            return int(index.execute("SELECT count(*) FROM places WHERE split = ?", (split,)).fetchone()[0])

    def find(self, id: str) -> tuple[int, Named] | None:
        """Row number and place of a query, None if no split has it."""
        if has_surrogate(id):
            return None  # an index holds no half characters, and cannot be asked for them
        sql = "SELECT number, split, image, digest FROM rows JOIN places USING (number) WHERE id = ? AND problem = ''"
        with self.file.opened() as (index, _):
            found = index.execute(sql, (id,)).fetchone()
        if found is None:
            return None
        number, split, image, digest = found
        return number, Named(split, () if image is None else (digest,))

    def why_not(self, id: str) -> str | None:
        """Why the rows with this id are in no split; None where the file has none."""
        sql = "SELECT number, field, problem FROM rows WHERE id = ? AND problem != '' ORDER BY number"
        with self.file.opened() as (index, _):
            found = [f"row {number}: {field}: {problem}" for number, field, problem in index.execute(sql, (id,))]
        return "; ".join(found[:3]) or None


class DiskQueries(OnDemand[Query]):
    """A split of a source, in its fixed order; nothing but its size is in memory."""

    def __init__(self, source: Source, split: str, limit: int | None = None) -> None:
        self.source, self._split = source, split
        size = source.size(split)
        self._size = size if limit is None else min(size, limit)

    def __len__(self) -> int:
        return self._size

    def extents(self) -> Iterator[Extent]:
        """How large each row is, in order."""
        sql = (
            f"SELECT position, {_EXTENT} FROM places {_WITH_IMAGES} WHERE split = ? AND position < ? ORDER BY position"
        )
        with self.source.file.opened() as (index, _):
            for position, number, id, length, width, height in index.execute(sql, (self._split, self._size)):
                yield Extent(position, number, id, length, _sizes(width, height))

    def find(self, id: str) -> Query | None:
        """The split's query of that id, without reading others."""
        found = self.source.find(id)
        if found is None or found[1].split != self._split:
            return None
        return self.source.query(found[0], hide=self._split == "unlabelled")

    def _item(self, place: int) -> Query:
        return self.source.query(self.source.number_at(self._split, place), hide=self._split == "unlabelled")


class DiskExamples(OnDemand[tuple[Query, str]]):
    """Written-out chains of thought: JSON lines ``{"id": ..., "response": ...}`` that name queries of a source."""

    def __init__(self, source: Source, file: IndexedFile, limit: int | None = None) -> None:
        self._source, self._file = source, file
        with file.opened() as (index, _):
            self.whole = int(index.execute("SELECT count(*) FROM examples").fetchone()[0])
        self._size = self.whole if limit is None else min(self.whole, limit)

    def __len__(self) -> int:
        return self._size

    def _item(self, place: int) -> tuple[Query, str]:
        with self._file.opened() as (index, data):
            sql = "SELECT offset, length, number FROM examples WHERE position = ?"
            offset, length, number = index.execute(sql, (place,)).fetchone()
            response = read_row(data, offset, length)["response"]
        return self._source.query(number, hide=False), response

    def extents(self) -> Iterator[Extent]:
        """How large each example and its row are, in order."""
        examples = "SELECT position, number, length FROM examples WHERE position < ? ORDER BY position"
        row = f"SELECT {_EXTENT} FROM (SELECT ? AS number) {_WITH_IMAGES}"
        with self._file.opened() as (index, _), self._source.file.opened() as (rows, _):
            for position, number, response_bytes in index.execute(examples, (self._size,)):
                _, id, length, width, height = rows.execute(row, (number,)).fetchone()
                yield Extent(position, number, id, length, _sizes(width, height), response_bytes)


class DiskAnswers(OnDemand[tuple[Query, str]]):
    """Labelled queries with their bare answers, in the place of chains of thought."""

    def __init__(self, labelled: DiskQueries, limit: int | None = None) -> None:
        self._labelled, self.whole = labelled, len(labelled)
        self._size = self.whole if limit is None else min(self.whole, limit)

    def __len__(self) -> int:
        return self._size

    def _item(self, place: int) -> tuple[Query, str]:
        query = self._labelled[place]
        assert query.answer is not None, "it is labelled"
        return query, bare_answer(query.answer)

    def extents(self) -> Iterator[Extent]:
        """How large each example and its row are, in order."""
        for extent in islice(self._labelled.extents(), self._size):
            yield replace(extent, response_bytes=extent.bytes + len(bare_answer("")))


def _sizes(width: int | None, height: int | None) -> tuple[tuple[int, int], ...]:
    return () if width is None or height is None else ((width, height),)


def build(config: DataConfig, dir: Path, seed: int) -> Task:
    """The task of a file in MathV360K's shape; its indices are written below ``dir``. The splits ignore ``seed``.

    Raises ValueError where a setting is missing or does not fit the file, or, if ``data.bad_rows`` says so, for the
    first unusable row.
    """
    source = open_source(config, dir)
    warmup, skipped = examples(config, source, dir)
    skipped = [*_skipped(source.file, "rows", str(source.file.source)), *skipped]
    bad = [each for each in skipped if not each.reason.startswith(f"{LEFT_OVER}:")]
    refuse_unusable(config, bad)
    sets = {name: DiskQueries(source, name, getattr(config, f"{name}_queries")) for name in ("labelled", "unlabelled")}
    cut = {f"data.{name}_queries": (len(queries), source.size(name)) for name, queries in sets.items()}
    if isinstance(warmup, DiskExamples | DiskAnswers):
        cut["data.warmup_examples"] = (len(warmup), warmup.whole)
    return Task(
        warmup=warmup,
        labelled=sets["labelled"],
        unlabelled=sets["unlabelled"],
        validation=DiskQueries(source, "validation"),
        test=DiskQueries(source, "test"),
        skipped=skipped,
        cut={name: counts for name, counts in cut.items() if counts[0] < counts[1]},
    )


def refuse_unusable(config: DataConfig, skipped: Sequence[Skipped]) -> None:
    """Raise ValueError for the first, where ``data.bad_rows`` refuses unusable rows."""
    if skipped and config.bad_rows == "refuse":
        first = skipped[0]
        raise ValueError(
            f"{first.where}: {first.what} cannot be used ({first.reason}), and data.bad_rows is 'refuse'; "
            "`mstar data check --out FILE.json` lists all such rows"
        )


def open_source(config: DataConfig, dir: Path) -> Source:
    """The training file of the settings with its index, made below ``dir`` where it is missing or outdated."""
    if not config.path:
        raise ValueError(f"data.path is not set: data.name '{config.name}' needs the training file (docs/data.md)")
    path = existing(config.path, "data.path", folders=True)
    images = Path(config.images) if config.images else path.parent
    if is_table(path):
        path, held = as_rows(path, dir)
        images = held or images
    if not images.is_dir():
        raise ValueError(f"data.images {images} is no folder: give the one that the rows' image paths begin in")
    file = IndexedFile(dir / ROWS_INDEX, path)
    settings = SplitSettings(
        str(images),
        config.validation_queries,
        config.test_queries,
        config.conflicts,
        config.labelled_share,
        PictureReading.of(config).rotate,
    )
    build_index(file.index, path, asdict(settings), lambda index: fill(index, path, settings))
    return Source(file, images, config.template or config.name, config.instruct)


def file_marks(config: DataConfig, dir: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files that the settings train on, by setting. Raises ValueError where one is missing."""
    files = {"data.path": (config.path, ROWS_INDEX), "data.warmup_file": (config.warmup_file, WARMUP_INDEX)}
    marks: dict[str, dict[str, Any]] = {}
    for name, (path, index) in files.items():
        if not path or (name == "data.path" and config.name != "mathv360k"):
            continue
        file = existing(path, name, folders=name == "data.path")
        marks[name] = mark_of(file) if is_table(file) else file_mark(file, dir / index)
    return marks


def examples(config: DataConfig, source: Source, dir: Path) -> tuple[Sequence[tuple[Query, str]], list[Skipped]]:
    """The written-out chains of thought, and the rows of their file that cannot be used."""
    if config.warmup_answers:
        labelled = DiskQueries(source, "labelled")
        return DiskAnswers(labelled, config.warmup_examples), []
    if not config.warmup_file:
        return (), [Skipped("the warm-up set", "data.warmup_file", "it is not set (docs/data.md: a start without it)")]
    file = IndexedFile(dir / WARMUP_INDEX, existing(config.warmup_file, "data.warmup_file"))
    stamp = source.file.index.stat().st_mtime_ns  # the row numbers are this index's
    build_index(file.index, file.source, {"rows": stamp}, lambda index: _fill_examples(index, file, source))
    return DiskExamples(source, file, config.warmup_examples), _skipped(file, "examples_skipped", config.warmup_file)


def existing(path: str, setting: str, folders: bool = False) -> Path:
    """Raises ValueError, naming the setting, where there is no such file. ``folders``: a folder will do."""
    if Path(path).is_dir():
        if folders:
            return Path(path)
        raise ValueError(f"{setting} {path} is a folder: name the file")
    if not Path(path).is_file():
        raise ValueError(f"{setting} {path}: there is no such file")
    return Path(path)


def _fill_examples(index: sqlite3.Connection, file: IndexedFile, source: Source) -> None:
    index.executescript(
        """
        CREATE TABLE examples (position INTEGER PRIMARY KEY, offset INTEGER, length INTEGER, number INTEGER);
        CREATE TABLE examples_skipped (number INTEGER PRIMARY KEY, id TEXT, field TEXT, problem TEXT);
        """
    )
    position = 0
    for row in read_rows(file.source):
        id = id_of(row)
        found = None if id is None else source.find(id)
        problem = problem_of(row, found and found[1], template_of(source.template))
        if problem is not None:
            index.execute("INSERT INTO examples_skipped VALUES (?, ?, ?, ?)", (row.number, name_of(row), *problem))
            continue
        assert found is not None, "it has no problem"
        index.execute("INSERT INTO examples VALUES (?, ?, ?, ?)", (position, row.offset, row.length, found[0]))
        position += 1


def _skipped(file: IndexedFile, table: str, path: str) -> list[Skipped]:
    """The unusable rows of a file: the first ones by name, the others counted by reason."""
    listed: list[Skipped] = []
    with file.opened() as (index, _):
        counts = Counter(
            dict(index.execute(f"SELECT problem, count(*) FROM {table} WHERE problem != '' GROUP BY problem"))
        )
        for number, id, field, problem in index.execute(
            f"SELECT number, id, field, problem FROM {table} WHERE problem != '' ORDER BY field = ?, number LIMIT ?",
            (LEFT_OVER, LISTED),
        ):
            named = f" (id {id})" if id else ""
            listed.append(Skipped(f"row {number}{named}", path, f"{field}: {problem}"))
            counts[problem] -= 1
    further = [Skipped(f"{count} further rows", path, problem) for problem, count in counts.most_common() if count]
    return listed + further
