"""What a training file in MathV360K's shape holds, and what is wrong with it: the facts behind ``mstar data check``."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mstar_mega.data.disk import Source
from mstar_mega.data.pictures import DEFAULT, PictureReading
from mstar_mega.data.screen import MAX_BYTES
from mstar_mega.data.splits import LEFT_OVER, SPLITS
from mstar_mega.data.types import image_digest
from mstar_mega.platform.inputs import read_input
from mstar_mega.platform.terminal import one_line

EXAMPLES = 3
"""So many rows are named for each problem and each leak."""
REASONS = 30
"""So many reasons have a line each."""


@dataclass(frozen=True)
class EvaluationItem:
    """What is compared with a training file of one question that must not be trained on."""

    set: str
    id: str
    question: bytes
    """``splits.question_key`` of its question and choices."""
    digest: str
    """Of its image's bytes; empty without an image."""


@dataclass
class Found:
    """How often something was found, with a few places."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """One more."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(one_line(example))


@dataclass
class FileReport:
    """The facts about a training file."""

    path: str
    bytes: int
    rows: int
    usable: int
    sources: dict[str, dict[str, int]]
    """Usable rows by source and type: ``multiple choice``, ``free form``."""
    problems: dict[str, Found]
    """Unusable rows by reason; unreadable images, duplicates and conflicts are among them."""
    letters_without_choices: Found
    """Usable rows whose answer is a letter, and in which no choices were found."""
    left_over: int
    """Good rows that no split has, as their image is set aside with enough others."""
    images: dict[str, int]
    """Distinct paths, pictures (by bytes), unreadable ones; smallest and largest width and height of readable ones."""
    changed: dict[str, Found]
    """Pictures that a plain reading of the file would show otherwise, by what is done with them."""
    splits: dict[str, dict[str, int]]
    """Queries and pictures of each split."""
    shared_between_splits: dict[str, int]
    """Pictures that stand in two splits (0 unless the index is broken), and questions with equal words that do."""
    leaks: dict[str, dict[str, Found]]
    """By evaluation set: training rows with the same image, the same question, both."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def report_on(source: Source, evaluation: Iterable[EvaluationItem], reading: PictureReading = DEFAULT) -> FileReport:
    """The facts about a source and its overlap with evaluation questions; ``reading``: how its pictures are read."""
    path = source.file.source
    with source.file.opened() as (index, _):
        one = _Asker(index)
        return FileReport(
            path=str(path),
            bytes=path.stat().st_size,
            rows=one("SELECT count(*) FROM rows"),
            usable=one("SELECT count(*) FROM places"),
            sources=_sources(index),
            problems=_problems(index),
            letters_without_choices=_letters_without_choices(index),
            left_over=one(f"SELECT count(*) FROM rows WHERE field = '{LEFT_OVER}'"),
            images=_images(index, one),
            changed=_changed(index, reading),
            splits={split: _split(one, split) for split in SPLITS},
            shared_between_splits=_shared(one),
            leaks=_leaks(index, evaluation),
        )


class _Asker:
    """The single number that a statement asks for."""

    def __init__(self, index: sqlite3.Connection) -> None:
        self._index = index

    def __call__(self, sql: str, *values: object) -> int:
        return int(self._index.execute(sql, values).fetchone()[0] or 0)


def _sources(index: sqlite3.Connection) -> dict[str, dict[str, int]]:
    sql = "SELECT source, choices > 0, count(*) FROM rows WHERE problem = '' GROUP BY 1, 2 ORDER BY 1, 2"
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for source, has_choices, count in index.execute(sql):
        found[source or "(none)"]["multiple choice" if has_choices else "free form"] = count
    return dict(found)


_UNUSABLE = f"FROM rows WHERE problem != '' AND field != '{LEFT_OVER}' ORDER BY number"


def unusable_rows(source: Source) -> Iterator[dict[str, Any]]:
    """Every unusable row: its number, id, where the problem is (a field or an image path) and what it is."""
    with source.file.opened() as (index, _):
        for row in index.execute(f"SELECT number, id, field, problem {_UNUSABLE}"):
            yield dict(zip(("row", "id", "where", "problem"), row, strict=True))


def _letters_without_choices(index: sqlite3.Connection) -> Found:
    found = Found()
    sql = "SELECT number, id FROM rows WHERE problem = '' AND choices = 0 AND answer GLOB '[A-Z]' ORDER BY number"
    for number, id in index.execute(sql):
        found.add(f"row {number} (id {id})")
    return found


def _problems(index: sqlite3.Connection) -> dict[str, Found]:
    found: dict[str, Found] = defaultdict(Found)
    for number, id, where, problem in index.execute(f"SELECT number, id, field, problem {_UNUSABLE}"):
        is_path = "/" in where or "." in where
        kind = f"image: {problem}" if is_path else f"{where}: {problem}"
        found[kind].add(f"row {number}" + (f" (id {id})" if id else "") + (f" {where}" if is_path else ""))
    return dict(sorted(found.items(), key=lambda item: (-item[1].count, item[0])))


def _images(index: sqlite3.Connection, one: _Asker) -> dict[str, int]:
    good = "FROM images WHERE problem = ''"
    return {
        "paths": one("SELECT count(*) FROM images"),
        "pictures": one(f"SELECT count(DISTINCT digest) {good}"),
        "unreadable": one("SELECT count(*) FROM images WHERE problem != ''"),
        **{
            f"{how}_{side}": one(f"SELECT {how}({side}) {good}")
            for side in ("width", "height")
            for how in ("min", "max")
        },
    }


def _changed(index: sqlite3.Connection, reading: PictureReading) -> dict[str, Found]:
    found: dict[str, Found] = defaultdict(Found)
    sql = "SELECT min(path), traits FROM images WHERE problem = '' AND traits != '' GROUP BY digest ORDER BY 1"
    for path, traits in index.execute(sql):
        for trait in traits.split(","):
            found[reading.tells(trait)].add(path)
    return dict(found)


def _split(one: _Asker, split: str) -> dict[str, int]:
    joined = "FROM places JOIN rows USING (number) WHERE split = ?"
    return {
        "queries": one(f"SELECT count(*) {joined}", split),
        "pictures": one(f"SELECT count(DISTINCT digest) {joined} AND image IS NOT NULL", split),
    }


def _shared(one: _Asker) -> dict[str, int]:
    def in_two(column: str) -> int:
        return one(
            f"SELECT count(*) FROM (SELECT 1 FROM places JOIN rows USING (number) GROUP BY {column} "
            "HAVING count(DISTINCT split) > 1)"
        )

    return {"pictures": in_two("digest"), "questions": in_two("question")}


def _leaks(index: sqlite3.Connection, evaluation: Iterable[EvaluationItem]) -> dict[str, dict[str, Found]]:
    items = list(evaluation)  # evaluation sets are small
    leaks = {item.set: {kind: Found() for kind in ("image", "question", "image and question")} for item in items}
    by_question: dict[bytes, list[EvaluationItem]] = defaultdict(list)
    by_image: dict[str, list[EvaluationItem]] = defaultdict(list)
    for item in items:
        by_question[item.question].append(item)
        if item.digest:
            by_image[item.digest].append(item)
    if not items:
        return leaks
    for number, id, question, digest in index.execute(
        "SELECT number, id, question, digest FROM rows WHERE problem = ''"
    ):
        for item in by_question.get(question, ()):
            same_image = bool(item.digest) and item.digest == digest
            leaks[item.set]["image and question" if same_image else "question"].add(
                f"row {number} (id {id}) = {item.id}"
            )
        for item in by_image.get(digest, ()):
            if item.question != question:
                leaks[item.set]["image"].add(f"row {number} (id {id}) = {item.id}")
    return leaks


def to_text(report: FileReport) -> str:
    """The report for a person."""
    lines = [f"{report.path}: {report.rows} rows, {report.bytes / 1e6:.1f} MB, {report.usable} usable"]
    lines.append("sources:")
    for source, types in report.sources.items():
        source = one_line(source)
        lines.append(f"  {source:<16}" + ", ".join(f"{count} {name}" for name, count in types.items()))
    images = report.images
    lines.append(
        f"images: {images['paths']} paths, {images['pictures']} pictures, {images['unreadable']} unreadable, "
        f"{images['min_width']} to {images['max_width']} wide, {images['min_height']} to {images['max_height']} high"
    )
    lines += [f"  {found.count:>6}  {what}: {places(found)}" for what, found in report.changed.items()]
    lines.append("splits:")
    for split, counts in report.splits.items():
        lines.append(f"  {split:<16}{counts['queries']} queries about {counts['pictures']} pictures")
    if report.left_over:
        lines.append(f"  {'in no split':<16}{report.left_over} (their image is set aside with enough other questions)")
    shared = report.shared_between_splits
    lines.append(f"  in two splits   {shared['pictures']} pictures, {shared['questions']} questions with equal words")
    lines.append(f"unusable: {sum(found.count for found in report.problems.values())}")
    shown = list(report.problems.items())
    lines += [f"  {found.count:>6}  {reason} ({places(found)})" for reason, found in shown[:REASONS]]
    if len(shown) > REASONS:
        rest = sum(found.count for _, found in shown[REASONS:])
        lines.append(f"  {rest:>6}  for {len(shown) - REASONS} other reasons")
    if report.letters_without_choices.count:
        lines.append(
            f"read as free form, with a letter as the answer: {report.letters_without_choices.count} "
            f"({places(report.letters_without_choices)}): are their choices below a line 'Choices:', a line each?"
        )
    for name, kinds in report.leaks.items():
        lines.append(f"shared with {name}:")
        lines += [f"  {found.count:>6}  the same {kind}{_dash(places(found))}" for kind, found in kinds.items()]
    return "\n".join(lines)


def places(found: Found) -> str:
    """The examples, for a person."""
    return ", ".join(found.examples) + (", ..." if found.count > len(found.examples) else "")


def _dash(text: str) -> str:
    return f": {text}" if text else ""


def digest_of(path: Path) -> str:
    """An image file's digest as the index notes it; empty when there is no such file."""
    return image_digest(read_input(path, MAX_BYTES)) if path.is_file() else ""
