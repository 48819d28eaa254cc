"""What a training file holds and which split each row belongs to, worked out inside its index.

Unusable rows are noted with the field and the reason. The unit of the splits is the image: all questions of one image,
recognised by the bytes of its file, stand in one split. An image belongs to the labelled or the unlabelled part by a
hash of the smallest id among its questions, and inside a part everything is ordered by such hashes, so that no split
depends on the order of the file, on the run's seed or on the machine. The parts are halves unless the settings say
otherwise. Validation queries are set aside from the labelled part, test queries from the unlabelled part, or from the
labelled one where it is the whole file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from mstar_mega.data.mathv360k import parse_row
from mstar_mega.data.pictures import DEFAULT, PictureReading
from mstar_mega.data.rows import Row, RowProblem, read_rows
from mstar_mega.data.screen import MAX_BYTES, look_at_image, problem_of
from mstar_mega.data.types import image_digest
from mstar_mega.kernels.noise import key_of
from mstar_mega.platform.inputs import read_input

T = TypeVar("T")
SPLITS = ("labelled", "unlabelled", "validation", "test")
LEFT_OVER = "split"
"""The field of a good row that no split has: its image is in one that has enough questions."""
_BATCH = 512
_THREADS = 8

_TABLES = """
CREATE TABLE rows (
    number INTEGER PRIMARY KEY, offset INTEGER, length INTEGER, id TEXT, image TEXT, question BLOB, answer TEXT,
    source TEXT, choices INTEGER, key INTEGER, digest TEXT DEFAULT '', field TEXT DEFAULT '', problem TEXT DEFAULT ''
);
CREATE TABLE images (path TEXT PRIMARY KEY, digest TEXT, width INTEGER, height INTEGER, traits TEXT, problem TEXT)
    WITHOUT ROWID;
"""


class SplitError(ValueError):
    """The file has too few usable questions for the splits that the settings ask for."""


@dataclass(frozen=True)
class SplitSettings:
    """What the splits depend on, besides the rows and the images."""

    images: str
    """Folder of the images."""
    validation: int
    test: int
    conflicts: Literal["drop", "first"]
    """What becomes of questions that stand in the file with several answers: none is used, or the first."""
    labelled_share: float = 0.5
    """Of the pictures that is labelled, in (0, 1]."""
    rotate: bool = DEFAULT.rotate
    """Whether sizes are those of pictures turned as their EXIF data say."""


def fill(index: sqlite3.Connection, source: Path, settings: SplitSettings) -> None:
    """Make the tables ``rows``, ``images``, ``groups`` and ``places`` of a training file.

    Raises ValueError for a file whose rows cannot be told apart, and SplitError where a part has too few questions.
    """
    index.executescript(_TABLES)
    marks = ", ".join("?" * 12)
    columns = "number, offset, length, id, image, question, answer, source, choices, key, field, problem"
    index.executemany(f"INSERT INTO rows ({columns}) VALUES ({marks})", map(_entry, read_rows(source)))
    _mark_repeated_ids(index)
    _read_images(index, Path(settings.images), replace(DEFAULT, rotate=settings.rotate))
    _mark_duplicates(index, settings.conflicts)
    _group(index, settings.labelled_share)
    if settings.validation + settings.test and not index.execute("SELECT count(*) FROM groups").fetchone()[0]:
        raise SplitError(
            f"{source} has no usable row: `mstar data check {source} --data.images {settings.images}` says why"
        )
    _set_aside(index, "validation", 0, settings.validation)
    _set_aside(index, "test", 0 if settings.labelled_share == 1 else 1, settings.test)
    _place(index, {"validation": settings.validation, "test": settings.test})


def question_key(question: str, choices: Iterable[str]) -> bytes:
    """16 bytes that are equal for questions that differ in nothing but white space and case."""
    text = "\x1f".join(" ".join(part.split()).casefold() for part in (question, *choices))
    return blake2b(text.encode(), digest_size=16).digest()


def _entry(row: Row) -> tuple[object, ...]:
    try:
        if row.problem:
            raise RowProblem("row", row.problem)
        found = parse_row(row.value)
    except RowProblem as problem:
        id = row.value.get("id") if isinstance(row.value, dict) else None
        id = id if isinstance(id, str) and id.isprintable() else ""
        nothing = (None, None, None, "", 0, 0)
        return (row.number, row.offset, row.length, id, *nothing, problem.field, problem.reason)
    key = key_of("split", found.id)
    asked = question_key(found.question, found.choices)
    place = (row.number, row.offset, row.length)
    return (*place, found.id, found.image, asked, found.answer, found.source, len(found.choices), key, "", "")


def _mark_repeated_ids(index: sqlite3.Connection) -> None:
    index.execute("CREATE INDEX rows_by_id ON rows (id, number)")
    index.execute(
        "UPDATE rows SET field = 'id', problem = 'an earlier row has the same' WHERE problem = '' AND EXISTS "
        "(SELECT 1 FROM rows AS other WHERE other.id = rows.id AND other.number < rows.number AND other.key != 0)"
    )


def _read_images(index: sqlite3.Connection, folder: Path, reading: PictureReading) -> None:
    """Look at every image once, several at a time, and give the rows their image's digest and problem."""

    def look(path: str) -> tuple[str, str, int, int, str, str]:
        found: list[tuple[str, int, int, str]] = []
        problem = problem_of(lambda: found.append(look_at(folder / path, reading)))
        return (path, *(found[0] if found else ("", 0, 0, "")), problem)

    paths = index.execute("SELECT DISTINCT image FROM rows WHERE problem = '' AND image IS NOT NULL")
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in _batches((path for (path,) in paths), _BATCH):
            index.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", pool.map(look, batch))
    index.executescript(
        """
        UPDATE rows SET digest = (SELECT digest FROM images WHERE path = image),
            problem = (SELECT problem FROM images WHERE path = image) WHERE problem = '' AND image IS NOT NULL;
        UPDATE rows SET field = image WHERE problem != '' AND field = '';
        UPDATE rows SET digest = 'none ' || id WHERE problem = '' AND image IS NULL;
        """
    )


def look_at(path: Path, reading: PictureReading = DEFAULT) -> tuple[str, int, int, str]:
    """(digest, width, height, traits with commas) of an image file. Raises OSError or ValueError when it cannot be
    decoded to its end."""
    content = read_input(path, MAX_BYTES)
    seen = look_at_image(content, reading)
    return image_digest(content), seen.width, seen.height, ",".join(seen.traits)


def _mark_duplicates(index: sqlite3.Connection, conflicts: Literal["drop", "first"]) -> None:
    """Of equal questions about one picture one is kept; with different answers, what ``conflicts`` says."""
    index.executescript(
        """
        CREATE INDEX rows_by_question ON rows (digest, question, number) WHERE problem = '';
        CREATE TABLE repeated AS SELECT digest, question, min(number) AS first, count(DISTINCT lower(answer)) AS answers
            FROM rows WHERE problem = '' GROUP BY digest, question HAVING count(*) > 1;
        CREATE INDEX repeated_by_question ON repeated (digest, question);
        """
    )
    ours = "repeated.digest = rows.digest AND repeated.question = rows.question"
    for answers, first, reason in (
        ("answers > 1", conflicts == "first", "another row answers the same question about the same image differently"),
        ("answers = 1", True, "an earlier row has the same question, image and answer"),
    ):
        spared = "AND rows.number != first" if first else ""
        index.execute(
            "UPDATE rows SET field = 'answer', problem = ? WHERE problem = '' AND EXISTS "
            f"(SELECT 1 FROM repeated WHERE {ours} AND {answers} {spared})",
            (reason,),
        )


def part_of(id: str, labelled_share: float) -> int:
    """0 for labelled, 1 for unlabelled. A larger share keeps every labelled one labelled."""
    key = key_of("half", id)
    # The lowest bit comes first, as it alone decides between halves.
    return int((key & 1) << 62 | key >> 1 >= labelled_share * 2**63)


def _group(index: sqlite3.Connection, labelled_share: float) -> None:
    """One group of questions for each image, in the part that the smallest id says."""
    index.create_function("part_of", 1, lambda id: part_of(id, labelled_share), deterministic=True)
    index.create_function("order_of", 1, lambda id: key_of("order", id), deterministic=True)
    index.executescript(
        """
        CREATE TABLE groups (digest TEXT PRIMARY KEY, size INTEGER, part INTEGER, key INTEGER, split TEXT)
            WITHOUT ROWID;
        INSERT INTO groups SELECT digest, count(*), part_of(min(id)), order_of(min(id)), '' FROM rows
            WHERE problem = '' GROUP BY digest;
        UPDATE groups SET split = CASE part WHEN 0 THEN 'labelled' ELSE 'unlabelled' END;
        """
    )


def _set_aside(index: sqlite3.Connection, split: str, part: int, wanted: int) -> None:
    """Give whole images of a part to a split until it has ``wanted`` questions."""
    name = ("labelled", "unlabelled")[part]
    chosen: list[str] = []
    count = 0
    for digest, size in index.execute("SELECT digest, size FROM groups WHERE split = ? ORDER BY key, digest", (name,)):
        if count >= wanted:
            break
        chosen.append(digest)
        count += size
    if count < wanted:
        raise SplitError(
            f"data.{split}_queries is {wanted}, and the {name} part of the file, from which they are set aside, has "
            f"{count} usable questions: ask for fewer"
        )
    index.executemany("UPDATE groups SET split = ? WHERE digest = ?", ((split, digest) for digest in chosen))


def _place(index: sqlite3.Connection, limits: dict[str, int]) -> None:
    """Positions 0, 1, ... of every split's rows, ordered by the hash of their ids."""
    index.executescript(
        "CREATE TABLE places (split TEXT, position INTEGER, number INTEGER, PRIMARY KEY (split, position)) "
        "WITHOUT ROWID; CREATE INDEX rows_by_key ON rows (key, id) WHERE problem = '';"
    )
    query = (
        "SELECT rows.number FROM rows INDEXED BY rows_by_key JOIN groups USING (digest) "
        "WHERE problem = '' AND split = ? ORDER BY rows.key, rows.id"
    )
    for split in SPLITS:
        numbers = (number for (number,) in index.execute(query, (split,)))
        placed = ((split, position, number) for position, number in enumerate(islice(numbers, limits.get(split))))
        index.executemany("INSERT INTO places VALUES (?, ?, ?)", placed)
    index.execute("CREATE INDEX places_by_number ON places (number)")
    index.execute(
        "UPDATE rows SET field = ?, problem = 'it has enough questions without this one, whose image it alone may "
        "have' WHERE problem = '' AND NOT EXISTS (SELECT 1 FROM places WHERE places.number = rows.number)",
        (LEFT_OVER,),
    )


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
