"""Groups on disk: JSON lines behind a header that tells a whole file from a damaged one.

    {"format": "mstar-groups", "version": 1, "groups": 2, "seconds": {}, "sha256": "<of every byte after this line>"}
    {"query": {...}, "responses": [...]}
    {"query": {...}, "responses": [...]}

Floats are written as their shortest exact form, so log-probs come back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mstar_mega.data.types import Group, group_from_json
from mstar_mega.platform.files import write_bytes_atomic

FORMAT = "mstar-groups"
VERSION = 1


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
    count, body = _read_verified(Path(path))
    try:
        groups = [group_from_json(json.loads(line)) for line in body.splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # The checksum held, so it was written like this: by another version of the program.
        raise DamagedFileError(f"{path}: a group is not as expected ({error!r}); delete it to make it anew") from None
    if len(groups) != count:
        raise DamagedFileError(f"{path}: the header announces {count} groups, {len(groups)} are there; delete it")
    return groups


def read_seconds(path: str | Path) -> dict[str, float]:
    """What making a file's groups took, by phase. Raises as :func:`read_groups`; the groups are not read."""
    with open(path, "rb") as file:
        seconds = _header(Path(path), file.readline()).get("seconds")
    return seconds if isinstance(seconds, dict) else {}


SELECTED = "selected.json"
"""Beside an iteration's blocks: which responses of each query were selected. The blocks are older than the choice."""


def write_selected(directory: Path, parts: Sequence[Mapping[str, Sequence[int]]]) -> None:
    """Write the sample indices of every query's selected responses, given in parts (one a rank), atomically."""
    merged = {id: list(indices) for part in parts for id, indices in part.items()}
    write_bytes_atomic(directory / SELECTED, json.dumps(merged, ensure_ascii=False).encode("utf-8"))


def read_selected(directory: Path) -> dict[str, list[int]]:
    """What :func:`write_selected` wrote; empty before the selection. Raises DamagedFileError."""
    path = directory / SELECTED
    try:
        selected = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        selected = None
    if not isinstance(selected, dict):
        raise DamagedFileError(f"{path} is cut off or altered; the selected responses cannot be shown")
    return selected


def is_complete(path: str | Path) -> bool:
    """Whether ``path`` exists and is whole; its groups are not parsed."""
    try:
        _read_verified(Path(path))
    except (DamagedFileError, FileNotFoundError):
        return False
    return True


def _read_verified(path: Path) -> tuple[int, bytes]:
    """Number of groups and the bytes after the header, whose checksum has been compared."""
    head, newline, body = path.read_bytes().partition(b"\n")
    header = _header(path, head if newline else b"")
    if hashlib.sha256(body).hexdigest() != header["sha256"]:
        raise DamagedFileError(f"{path} is cut off or altered: its checksum differs; delete it to make it anew")
    return int(header["groups"]), body


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DamagedFileError(f"{path} does not begin with a {FORMAT} header: it is cut off, or another kind of file")
    if header.get("version") != VERSION:
        raise DamagedFileError(f"{path} has version {header.get('version')}, this program reads version {VERSION}")
    if not isinstance(header.get("sha256"), str) or not isinstance(header.get("groups"), int):
        raise DamagedFileError(f"{path}: its {FORMAT} header lacks the checksum or the number of groups")
    return header
