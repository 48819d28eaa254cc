"""Training files in other formats than JSON: CSV, parquet, arrow, and folders that Hugging Face ``datasets`` saved.

Each is written once as JSON lines, with the pictures that it holds beside them; what reads sets from disk goes on with
these. They are written again when the source's bytes have changed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter

from mstar_mega.data.index import file_mark
from mstar_mega.data.rows import MAX_ROW_BYTES
from mstar_mega.data.screen import MAX_BYTES
from mstar_mega.data.simple import RIGHT_SHAPE
from mstar_mega.data.types import image_digest
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.platform.inputs import checked, must_be_regular, open_input, read_object

ROWS_FILE, PICTURES, SOURCE_FILE = "rows.jsonl", "pictures", "source.json"
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
"""Ends of file names; everything else is read as JSON."""
_SAVED = "state.json"
"""In a folder that ``datasets`` saved: its arrow files in their order."""
_BATCH = 256
_BATCH_BYTES = 1 << 26
"""Rows of more than this together are taken one by one."""
_MOST_TIMES, _LEAST_ROOM = 200, 1 << 24
"""A table's rows take at most so many times its own bytes, and so many bytes more: tables are compressed."""


class _Part(BaseModel):
    filename: str


class _State(BaseModel):
    data_files: list[_Part] = Field([], alias="_data_files")


_STATE = TypeAdapter(_State)


def is_table(path: Path) -> bool:
    """Whether a path is read through this module."""
    return path.is_dir() or path.suffix.lower() in TABLES


def mark_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a source, of a folder's files together. Raises ValueError and OSError as :func:`parts_of`."""
    marks = [file_mark(part) for part in parts_of(path)]
    if len(marks) == 1:
        return marks[0]
    together = hashlib.sha256("".join(mark["sha256"] for mark in marks).encode()).hexdigest()
    return {"size": sum(mark["size"] for mark in marks), "sha256": together}


def as_rows(path: Path, dir: Path) -> tuple[Path, Path | None]:
    """(JSON lines, folder of the pictures that the table holds) of a table, below ``dir``; None: it holds none.

    Raises ValueError where the table cannot be read, or has no column ``question`` or ``conversations``.
    """
    made = dir / "table"
    mark = mark_of(path)
    if not _is_made_of(made, mark):
        _must_be_ours(made)
        shutil.rmtree(made, ignore_errors=True)
        (made / PICTURES).mkdir(parents=True)
        with open(made / ROWS_FILE, "w", encoding="utf-8") as file:
            room = _LEAST_ROOM + _MOST_TIMES * mark["size"]
            for row in _plain_rows(_read(path), made / PICTURES):
                room -= file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                if room < 0:
                    raise ValueError(
                        f"{path} is {mark['size']:,} bytes and unpacks to more than {_MOST_TIMES} times that"
                    )
        write_text_atomic(made / SOURCE_FILE, json.dumps(mark) + "\n")
    return made / ROWS_FILE, (made / PICTURES if any((made / PICTURES).iterdir()) else None)


def _must_be_ours(made: Path) -> None:
    """Before the folder is deleted: ``data.dir`` may be any, and may come from a run that somebody has handed on."""
    if made.is_dir() and (others := {path.name for path in made.iterdir()} - {ROWS_FILE, PICTURES, SOURCE_FILE}):
        raise ValueError(f"{made} holds {sorted(others)[0]!r}, which is no part of a table: choose another data.dir")


def _is_made_of(made: Path, mark: dict[str, Any]) -> bool:
    try:
        return read_object(made / SOURCE_FILE) == mark and (made / ROWS_FILE).is_file()
    except (OSError, ValueError):
        return False


def parts_of(path: Path) -> list[Path]:
    """The files that a path stands for, in order. Raises ValueError for a folder that holds no table."""
    if not path.is_dir():
        return [path]
    if (path / _SAVED).is_file():
        saved = checked(_STATE, read_object(path / _SAVED), path / _SAVED)
        files = [path / Path(each.filename).name for each in saved.data_files]
        if files and all(file.is_file() for file in files):
            return files
    if (path / "train" / _SAVED).is_file():
        raise ValueError(f"{path} holds several splits: name one of them, as in {path / 'train'}")
    for end in (".parquet", ".arrow"):
        if files := sorted(file for file in path.iterdir() if file.suffix == end and file.is_file()):
            return files
    raise ValueError(
        f"{path} is a folder without a table that can be read: name the file itself (JSON, JSON lines, CSV, parquet), "
        f"or a folder that Hugging Face datasets saved. A row in the right shape is {RIGHT_SHAPE}"
    )


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for part in parts_of(path):
        must_be_regular(part)
        if part.suffix.lower() in (".csv", ".tsv"):
            yield from _csv_rows(part)
        else:
            yield from _arrow_rows(part)


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_input(path) as binary:
        start = binary.read(1 << 16).decode("utf-8-sig", "replace")
    head = start.partition("\n")[0]
    # The header's names decide: a question may hold every mark, a name holds none.
    delimiter = max(",;\t", key=head.count)
    csv.field_size_limit(MAX_ROW_BYTES)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            _check_columns(path, [str(name) for name in reader.fieldnames or ()])
            for row in reader:
                yield {name: value for name, value in row.items() if name is not None and value not in (None, "")}
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: it is no CSV ({error})") from None


def _arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    try:
        for batch in _batches(path):
            _check_columns(path, batch.schema.names)
            yield from _rows_of(batch)
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, pa.ArrowException):
            raise
        raise ValueError(f"{path} cannot be read as a table: {' '.join(str(error).split())[:200]}") from None


def _rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    if batch.nbytes <= _BATCH_BYTES:
        yield from batch.to_pylist()
        return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        if row.nbytes > MAX_BYTES + MAX_ROW_BYTES:
            raise ValueError(f"a row of the table has {row.nbytes:,} bytes, more than the {MAX_BYTES:,} of a picture")
        yield from row.to_pylist()


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH)
        return
    with pa.OSFile(str(path)) as source:
        try:
            reader: Iterable[Any] = pa.ipc.open_stream(source)  # as datasets writes it
        except pa.ArrowInvalid:
            source.seek(0)
            whole = pa.ipc.open_file(source)
            reader = (whole.get_batch(i) for i in range(whole.num_record_batches))
        for batch in reader:
            for start in range(0, batch.num_rows, _BATCH):
                yield batch.slice(start, _BATCH)


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if "question" in names or "conversations" in names:
        return
    listed = ", ".join(islice(names, 12)) or "none"
    raise ValueError(
        f"{path} has the columns {listed}: there is neither question nor conversations. A row in the right shape is "
        f"{RIGHT_SHAPE}"
    )


def _plain_rows(rows: Iterable[dict[str, Any]], pictures: Path) -> Iterator[dict[str, Any]]:
    """Rows whose pictures are files: of ``{bytes, path}`` columns, as ``datasets`` has them, the bytes are written."""
    for row in rows:
        row = {name: value for name, value in row.items() if value is not None}
        image = row.get("image")
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes | bytearray):
            if len(image) > MAX_BYTES:
                raise ValueError(
                    f"a picture of the table has {len(image)} bytes, more than the {MAX_BYTES} that are read"
                )
            name = image_digest(bytes(image))
            if not (pictures / name).exists():
                (pictures / name).write_bytes(image)
            image = name
        if image is not None:
            row["image"] = image
        yield row
