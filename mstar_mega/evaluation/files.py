"""Benchmark files as they are distributed: JSON, JSON lines, TSV with base64 images, parquet. A row at a time."""

from __future__ import annotations

import ast
import base64
import binascii
import codecs
import csv
import json
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from mstar_mega.data.prompts import lettered
from mstar_mega.data.rows import DuplicateKeyError, RowProblem, has_surrogate, read_rows, unique
from mstar_mega.evaluation.problem import Picture
from mstar_mega.platform.files import refuse_lfs_pointer
from mstar_mega.platform.inputs import must_be_regular, open_input, read_input

MAX_CELL_CHARS = 1 << 27
"""A cell of a table holds at most an image."""
MAX_LIST_CHARS = 1 << 16
MAX_WHOLE_FILE = 1 << 28
MAX_REFERENCE = 64
"""An image cell this short is the index of the row that holds the image (VLMEvalKit)."""
READABLE = (".json", ".jsonl", ".tsv", ".csv", ".parquet")


@dataclass(frozen=True)
class Cells:
    """One row of a file: the cells by column, and where it stands."""

    file: Path
    number: int
    """From 1."""
    values: Mapping[str, Any]
    problem: str = ""
    """Why it has no usable cells at all."""
    place: int = 0
    """Of the row among all of the benchmark's files, from 0."""

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"

    @property
    def id(self) -> str:
        """What the row seems to be called, usable or not; empty where nothing says so."""
        found = next((self.values[name] for name in ("pid", "id", "index") if self.values.get(name)), "")
        return str(found) if isinstance(found, (str, int)) else ""

    def refuse(self, column: str, reason: str) -> NoReturn:
        """Raise what makes the row unusable."""
        raise RowProblem(column, reason)

    def text(self, column: str) -> str:
        """A cell that must be there."""
        if column not in self.values:
            self.refuse(column, f"there is no such column (there are {', '.join(map(str, self.values))[:300]})")
        found = self.optional(column)
        if not found.strip():
            self.refuse(column, "it is empty")
        return found

    def optional(self, column: str) -> str:
        """A cell as text; empty where there is none."""
        value = self.values.get(column)
        if value is None or value != value:  # a missing cell that went through pandas is a float, not a number
            return ""
        if isinstance(value, (dict, list, bytes)):
            self.refuse(column, f"it is a {type(value).__name__}, not text")
        return str(value)

    def integer(self, column: str) -> int:
        """A cell that is a whole number."""
        text = self.text(column).strip()
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            self.refuse(column, f"it is {text[:40]!r}, not a whole number")
        return int(text)

    def list(self, column: str) -> list[str]:
        """A list of texts, also written as JSON or as Python writes one; None is empty."""
        value = self.values.get(column)
        if isinstance(value, str):
            value = self._written_list(column, value)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, (str, int, float)) for item in value):
            self.refuse(column, "it is not a list of texts")
        return [str(item) for item in value]

    def lettered(self, column: str) -> dict[str, str]:
        """The texts of a list by letter."""
        texts = self.list(column)
        try:
            return lettered(texts)
        except ValueError as error:
            self.refuse(column, str(error))

    def options(self) -> dict[str, str]:
        """The options in the columns A, B, ...; an empty cell is no option."""
        return {letter: text for letter in string.ascii_uppercase if (text := self.optional(letter)).strip()}

    def picture(self) -> Picture | None:
        """The image in this row, or what it refers to; None where there is nothing."""
        for column in ("decoded_image", "image", "image_path"):
            found = self._picture(column, self.values.get(column))
            if found is not None:
                return found
        return None

    def _picture(self, column: str, value: Any) -> Picture | None:
        if isinstance(value, dict):  # parquet as the hub's viewer writes it
            data, path = value.get("bytes"), value.get("path")
            return Picture(data=data) if isinstance(data, bytes) else self._picture(column, path)
        if isinstance(value, bytes):
            return Picture(data=value)
        if isinstance(value, int):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            return None
        if len(value) <= MAX_REFERENCE or column == "image_path" or "." in value[-6:]:
            return Picture(path=value)
        try:
            return Picture(data=base64.b64decode(value, validate=True))
        except (binascii.Error, ValueError):
            self.refuse(column, "it is not base64")

    def _written_list(self, column: str, text: str) -> Any:
        if not text.strip():
            return None
        if len(text) > MAX_LIST_CHARS:
            self.refuse(column, f"it has {len(text)} characters")
        try:
            return ast.literal_eval(text)  # literals only: nothing is executed
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: {[]: 1}
            self.refuse(column, "it is not a list")


def files_of(path: Path) -> list[Path]:
    """The benchmark's file, or all files of a folder that can be read, in order of their names.

    Raises ValueError where there is none.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file")
    files = sorted(file for file in path.iterdir() if file.suffix in READABLE) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no file of the kinds {', '.join(READABLE)}")
    return files


def read_cells(path: Path) -> Iterator[Cells]:
    """All rows of a file, or of all files of a folder.

    Raises ValueError for what cannot be read at all, naming file and place.
    """
    rows = (cells for file in files_of(path) for cells in read_file(file))
    for place, cells in enumerate(rows):
        yield replace(cells, place=place)


def read_file(path: Path) -> Iterator[Cells]:
    """All rows of one file. Raises ValueError as :func:`read_cells`."""
    refuse_lfs_pointer(path)
    if path.suffix in (".tsv", ".csv"):
        yield from _table(path, "\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        yield from json_rows(path)
    else:
        raise ValueError(f"{path}: benchmarks are read from {', '.join(READABLE)}, not from '{path.suffix}'")


def _table(path: Path, delimiter: str) -> Iterator[Cells]:
    csv.field_size_limit(MAX_CELL_CHARS)
    with open_input(path) as raw:
        if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path} is UTF-16 text: save it as UTF-8")
    with TextIOWrapper(open_input(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        twice = [name for name, many in Counter(reader.fieldnames or ()).items() if many > 1]
        if twice:
            raise ValueError(f"{path}: the column '{twice[0]}' stands twice in its first line: which one is meant?")
        number = 0
        try:
            for cells in reader:
                number += 1
                yield Cells(path, number, cells, _table_problem(cells, reader.line_num))
        except csv.Error as error:
            raise ValueError(f"{path}: after row {number}, line {reader.line_num}: {error}") from None


def _table_problem(cells: Mapping[str | None, Any], line: int) -> str:
    if None in cells:
        return f"it has more cells than there are columns (line {line})"
    missing = [name for name, value in cells.items() if value is None]
    if missing:
        return f"it ends before the column '{missing[0]}' (line {line})"
    for name, value in cells.items():
        if has_surrogate(value):
            return f"its column '{name}' is not UTF-8 (line {line})"
    return ""


def _parquet(path: Path) -> Iterator[Cells]:
    import pyarrow
    from pyarrow import parquet

    must_be_regular(path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for values in batch.to_pylist():
                    number += 1
                    yield Cells(path, number, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: after row {number} it is no readable parquet ({_first_line(error)})") from None


def json_rows(path: Path) -> Iterator[Cells]:
    """A JSON list, JSON lines, or (MathVista) one object of objects by id."""
    problems = _object_of_objects(path)
    if problems is not None:
        for number, (key, values) in enumerate(problems.items(), 1):
            if isinstance(values, dict):
                yield Cells(path, number, {"pid": key, **values})
            else:
                yield Cells(path, number, {}, f"its value of {key!r} is not an object")
        return
    for row in read_rows(path):
        ok = isinstance(row.value, dict)
        yield Cells(path, row.number, row.value if ok else {}, row.problem or ("" if ok else "it is not an object"))


def _object_of_objects(path: Path) -> dict[str, Any] | None:
    if path.suffix != ".json" or path.stat().st_size > MAX_WHOLE_FILE:
        return None
    try:
        text = read_input(path, MAX_WHOLE_FILE).decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None
    except DuplicateKeyError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("logs"), list):  # lmms-eval's older samples file
        return {str(number): each for number, each in enumerate(value["logs"])}
    if all(isinstance(each, dict) for each in value.values()):
        return value
    if "\n" in text.strip():  # not the one row of a file of JSON lines
        raise ValueError(
            f"{path} is an object, but its values are not problems: is it another of the benchmark's files?"
        )
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
