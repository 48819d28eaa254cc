"""Rows of a large JSON file, one at a time: a JSON list, or JSON lines. Memory does not grow with the file."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from mstar_mega.platform.files import refuse_lfs_pointer
from mstar_mega.platform.inputs import open_input

MAX_ROW_BYTES = 1 << 24
"""No row of text is longer; a file that claims so is damaged."""
_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class DuplicateKeyError(ValueError):
    """An object of JSON has a key twice, so nobody knows which value is meant."""


class RowProblem(ValueError):
    """What makes a row unusable; ``field`` says which part of it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Row:
    """One row and where it stands."""

    number: int
    """From 1."""
    offset: int
    length: int
    """Its bytes are [offset, offset + length) of the file."""
    value: Any
    """The parsed JSON; None where there is a problem."""
    problem: str = ""


def read_rows(path: Path) -> Iterator[Row]:
    """All rows of a file in order. A row that is not JSON, or not UTF-8, comes with its problem.

    Raises ValueError, with the row, where a JSON list is broken so that the rows behind cannot be found, and for a file
    in another encoding than UTF-8. Raises OSError as open does.
    """
    refuse_lfs_pointer(path)
    with open_input(path) as file:
        head = file.read(4)
        if head.startswith(_WIDE_MARKS):
            raise ValueError(f"{path} is UTF-16 text: save it as UTF-8")
        start = 3 if head.startswith(codecs.BOM_UTF8) else 0
        file.seek(start)
        if _first_character(file) == b"[":
            yield from _list_rows(path, file)
        else:
            file.seek(start)
            yield from _line_rows(path, file)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``object_pairs_hook``. Raises DuplicateKeyError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, many in Counter(key for key, _ in pairs).items() if many > 1)
        raise DuplicateKeyError(f"the key {twice[:40]!r} stands twice in one object of it: which one is meant?")
    return found


def has_surrogate(text: str) -> bool:
    """Whether there is half of a character in it, or a byte that was not UTF-8: it cannot be written."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def read_row(file: BinaryIO, offset: int, length: int) -> Any:
    """The value of a row that :func:`read_rows` found without a problem. Raises ValueError if it is no longer JSON."""
    if not (0 <= offset and 0 <= length <= MAX_ROW_BYTES):
        raise ValueError(f"there is no row of {length} bytes at byte {offset}")
    file.seek(offset)
    return json.loads(file.read(length))


def _first_character(file: BinaryIO) -> bytes:
    while (character := file.read(1)) and character in b" \t\r\n":
        pass
    return character


def _line_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    number, offset = 0, file.tell()
    while line := file.readline(MAX_ROW_BYTES):
        if not line.endswith(b"\n") and len(line) == MAX_ROW_BYTES:
            raise ValueError(f"{path}: the line at byte {offset} is longer than {MAX_ROW_BYTES} bytes")
        if line.strip():
            number += 1
            yield _parsed(number, offset, line)
        offset += len(line)


def _parsed(number: int, offset: int, line: bytes) -> Row:
    try:
        return Row(number, offset, len(line), json.loads(line, object_pairs_hook=unique))
    except DuplicateKeyError as error:
        problem = str(error)
    except UnicodeDecodeError as error:
        problem = f"it is not UTF-8 (byte {offset + error.start})"
    except json.JSONDecodeError as error:
        problem = f"it is not JSON ({error.msg.removesuffix(' at')} at character {error.pos})"
    except RecursionError:
        problem = "it is nested too deeply"
    return Row(number, offset, len(line), None, problem)


def _list_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    """Rows of a JSON list whose opening bracket has been read."""
    # Bytes that are not UTF-8 become lone surrogates and encode back to themselves: lengths in bytes stay exact.
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    twice: list[str] = []
    parse = json.JSONDecoder(object_pairs_hook=partial(_noted, twice)).raw_decode
    text, place, number, offset, ended = "", 0, 0, file.tell(), False

    def refill() -> bool:
        nonlocal text, place, ended
        chunk = file.read(_CHUNK)
        ended = not chunk
        text = text[place:] + decoder.decode(chunk, final=ended)
        place = 0
        return not ended

    def skip_space() -> str:
        nonlocal place, offset
        while True:
            start = place
            while place < len(text) and text[place] in _SPACE:
                place += 1
            offset += place - start
            if place < len(text) or not refill():
                return text[place : place + 1]

    while (character := skip_space()) != "]":
        if number:
            if character != ",":
                raise ValueError(f"{path}: after row {number} (byte {offset}) stands {character!r}, not a comma or ]")
            place, offset = place + 1, offset + 1
            skip_space()
        while True:
            twice.clear()
            try:
                value, end = parse(text, place)
            except RecursionError:
                raise ValueError(f"{path}: row {number + 1} (byte {offset}) is nested too deeply") from None
            except json.JSONDecodeError as error:
                if len(text) - place < MAX_ROW_BYTES and refill():
                    continue
                raise ValueError(
                    f"{path}: row {number + 1} (byte {offset}) is not JSON ({error.msg}), so the rows behind it cannot "
                    "be found: mend the file, or save it as JSON lines"
                ) from None
            if end == len(text) and refill():  # a number may go on
                continue
            break
        number += 1
        raw = text[place:end]
        length = end - place if raw.isascii() else len(raw.encode("utf-8", "surrogateescape"))
        yield Row(number, offset, length, None, twice[0]) if twice else _checked(number, offset, length, value, raw)
        place, offset = end, offset + length


def _noted(twice: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """:func:`unique` that goes on, so that the row's end is found."""
    try:
        return unique(pairs)
    except DuplicateKeyError as error:
        twice.append(str(error))
        return {}


def _checked(number: int, offset: int, length: int, value: Any, raw: str) -> Row:
    if not raw.isascii():
        try:
            raw.encode()
        except UnicodeEncodeError as error:
            before = len(raw[: error.start].encode("utf-8", "surrogateescape"))
            return Row(number, offset, length, None, f"it is not UTF-8 (byte {offset + before})")
    return Row(number, offset, length, value)
