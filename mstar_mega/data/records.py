"""Groups on disk: JSON lines behind a header that tells a whole file from a damaged one.

    {"format": "mstar-groups", "version": 1, "groups": 2, "seconds": {}, "sha256": "<of every byte after this line>"}
    {"query": {...}, "responses": [...]}
    {"query": {...}, "responses": [...]}

Floats are written as their shortest exact form, so log-probs come back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from mstar_mega.data.types import Group, Query
from mstar_mega.platform.files import write_bytes_atomic
from mstar_mega.platform.inputs import checked, open_input, parse_json, problems

FORMAT = "mstar-groups"
VERSION = 1
_BEGIN = '{"query":'
_COMMA = ",\n"


_MEND = "delete it to make it anew"
_LONGEST_HEADER = 1 << 16


class _Header(BaseModel):
    groups: Annotated[int, Field(strict=True)]
    sha256: Annotated[str, Field(strict=True)]
    seconds: dict[str, float] = {}


_HEADER = TypeAdapter(_Header)
_GROUP = TypeAdapter(Group)
_QUERY = TypeAdapter(Query)
_INDICES = TypeAdapter(list[Annotated[int, Field(strict=True, ge=0)]])


class DamagedFileError(ValueError):
    """A file that is cut off, altered or not what it should be; the message names it and what is wrong."""


def write_groups(path: str | Path, groups: Sequence[Group], seconds: Mapping[str, float] | None = None) -> None:
    """Write ``groups`` atomically. Raises OSError (a full disk names the path and leaves an earlier file intact).

    ``seconds``: what making them took, by phase; see :func:`read_seconds`.
    """
    # vars() gives the same objects as dataclasses.asdict without its deep copy of every token: three times as fast.
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=vars).encode
    body = "".join(f"{encode(group)}\n" for group in groups).encode("utf-8")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "groups": len(groups),
        "seconds": dict(seconds or {}),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    write_bytes_atomic(path, f"{json.dumps(header)}\n".encode() + body)


def read_groups(path: str | Path) -> list[Group]:
    """The groups of a file, in order. Raises DamagedFileError, or FileNotFoundError when there is no file."""
    return [group for _, group in placed_groups(path)]


def placed_groups(path: str | Path) -> Iterator[tuple[int, Group]]:
    """The groups of a file of any size, one at a time, each with the byte that it begins at. Raises as ``read_groups``.

    The checksum is compared before the first one comes.
    """
    for offset, line in _verified_lines(Path(path)):
        yield offset, _group(path, line)


def read_group(path: str | Path, offset: int) -> Group:
    """The group that :func:`placed_groups` found at a byte. Raises DamagedFileError where it no longer is one."""
    with open_input(path) as file:
        file.seek(offset)
        return _group(path, file.readline())


def read_queries(path: str | Path) -> list[Query]:
    """The queries of a file's groups; the responses are not parsed. Raises as :func:`read_groups`."""
    decoder = json.JSONDecoder()
    try:
        # A line begins with the query: see Group's fields.
        lines = (line.decode("utf-8") for _, line in _verified_lines(Path(path)))
        return [_QUERY.validate_python(decoder.raw_decode(line, len(_BEGIN))[0]) for line in lines]
    except DamagedFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: a query is not as expected ({_why(error)}); {_MEND}") from None


def _group(path: str | Path, line: bytes) -> Group:
    try:
        return _GROUP.validate_json(line, strict=True)
    except ValueError as error:
        # The checksum held, so it was written like this: by another version of the program.
        raise DamagedFileError(f"{path}: a group is not as expected ({_why(error)}); {_MEND}") from None


def _why(error: Exception) -> str:
    return problems(error)[0] if isinstance(error, ValidationError) else str(error) or type(error).__name__


def read_seconds(path: str | Path) -> dict[str, float]:
    """What making a file's groups took, by phase. Raises as :func:`read_groups`; the groups are not read."""
    with open_input(path) as file:
        return _header(Path(path), file.readline(_LONGEST_HEADER)).seconds


SELECTED = "selected.json"
"""Beside an iteration's blocks: which responses of each query were selected. The blocks are older than the choice."""


def write_selected(directory: Path, selected: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Write the sample indices of every query's selected responses atomically: a JSON object, a query a line."""
    lines = (f"{json.dumps(id, ensure_ascii=False)}: {list(indices)}" for id, indices in selected)
    write_bytes_atomic(directory / SELECTED, f"{{\n{_COMMA.join(lines)}\n}}\n".encode())


def read_selected(directory: Path, ids: Container[str]) -> dict[str, list[int]]:
    """What :func:`write_selected` wrote of these queries; empty before the selection. Raises DamagedFileError."""
    path = directory / SELECTED
    found: dict[str, list[int]] = {}
    line = ""
    try:
        with TextIOWrapper(open_input(path), encoding="utf-8", newline="\n") as file:
            for line in file:
                if line not in ("{\n", "}\n", "\n"):
                    [(id, indices)] = json.loads(f"{{{line.rstrip().removesuffix(',')}}}").items()
                    if id in ids:
                        found[id] = _INDICES.validate_python(indices)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        line = ""
    if line != "}\n":
        raise DamagedFileError(f"{path} is cut off or altered; the selected responses cannot be shown")
    return found


def _verified_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(first byte, content) of every line after the header, once the checksum has been compared."""
    with open_input(path) as file:
        head = file.readline(_LONGEST_HEADER)
        header = _header(path, head if head.endswith(b"\n") else b"")
        digest, count = hashlib.sha256(), 0
        while block := file.read(1 << 20):
            digest.update(block)
            count += block.count(b"\n")
        if digest.hexdigest() != header.sha256:
            raise DamagedFileError(f"{path} is cut off or altered: its checksum differs; delete it to make it anew")
        if count != header.groups:
            raise DamagedFileError(f"{path}: the header announces {header.groups} groups, {count} are there; delete it")
        offset = file.seek(len(head))
        for line in file:
            yield offset, line
            offset += len(line)


def _header(path: Path, line: bytes) -> _Header:
    try:
        content = parse_json(line, path)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedFileError(f"{path} does not begin with a {FORMAT} header: it is cut off, or another kind of file")
    if content.get("version") != VERSION:
        raise DamagedFileError(f"{path} has version {content.get('version')}, this program reads version {VERSION}")
    try:
        return checked(_HEADER, content, "header")
    except ValueError as error:
        raise DamagedFileError(f"{path}: its {FORMAT} {error}") from None
