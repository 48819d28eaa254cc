"""An index beside a large training file, built once: where each row stands, what is wrong with it, its split.

It is an SQLite file, so neither building nor reading it needs memory that grows with the set. It is made under another
name and renamed when it is whole; it is made again when the data file, or a setting that it depends on, has changed.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from mstar_mega.platform.files import sha256_file

FORMAT = 2
"""Raised whenever what an index holds changes."""
_COMPUTED = re.compile(r"\b(AS|VIRTUAL)\b", re.IGNORECASE)
"""In a table's definition; a table that is made of a query has a definition without it."""


def build_index(path: Path, source: Path, settings: dict[str, Any], fill: Callable[[sqlite3.Connection], None]) -> bool:
    """Make ``path`` an index of ``source``, unless it is one already; returns whether it was made.

    An index is good when ``source`` has the size and modification time that it notes (or, with another time, the same
    bytes) and ``settings`` are equal. Raises ValueError and OSError as ``fill`` and reading the source do.
    """
    stat = source.stat()
    wanted = {"format": FORMAT, "settings": settings, "size": stat.st_size}
    known = read_meta(path)
    if known is not None and all(known.get(name) == value for name, value in wanted.items()):
        if known.get("mtime") == stat.st_mtime_ns:
            return False
        if known.get("sha256") == sha256_file(source):
            with closing(sqlite3.connect(path)) as index, index:
                _write_meta(index, {**known, "mtime": stat.st_mtime_ns})
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(temporary)) as index:
            # Nobody else sees the file before it is whole, so no journal is needed; sorting goes to disk as well.
            index.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA temp_store=FILE;")
            index.execute("CREATE TABLE meta (value TEXT)")
            fill(index)
            _write_meta(index, {**wanted, "mtime": stat.st_mtime_ns, "sha256": sha256_file(source)})
            index.commit()
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except sqlite3.Error as error:
        raise OSError(f"the index {path} cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def file_mark(path: Path, index: Path | None = None) -> dict[str, Any]:
    """Size and SHA-256 of a file: ``{"size": bytes, "sha256": hexadecimal}``.

    An index of the file, where there is one, saves reading it. Raises OSError where it cannot be read.
    """
    stat = path.stat()
    known = read_meta(index) if index is not None else None
    if known is not None and (known.get("size"), known.get("mtime")) == (stat.st_size, stat.st_mtime_ns):
        return {"size": stat.st_size, "sha256": str(known.get("sha256"))}
    return {"size": stat.st_size, "sha256": sha256_file(path)}


def read_meta(path: Path) -> dict[str, Any] | None:
    """What an index says about itself; None when it is missing or no index."""
    if not path.is_file():
        return None
    try:
        with closing(connect(path)) as index:
            if not _is_plain(index):
                return None
            found = json.loads(index.execute("SELECT value FROM meta").fetchone()[0])
    except (sqlite3.Error, ValueError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _is_plain(index: sqlite3.Connection) -> bool:
    """Whether an index has tables alone, which hold what they hold: a view or a computed column is a program, and may
    run for ever."""
    index.execute("PRAGMA trusted_schema = OFF")
    made = index.execute("SELECT type, coalesce(sql, '') FROM sqlite_master").fetchall()
    return all(kind == "index" or (kind == "table" and not _COMPUTED.search(text)) for kind, text in made)


def connect(path: Path) -> sqlite3.Connection:
    """A connection that only reads. Needs no locks, which some shared file systems lack: a finished index is fixed."""
    # A pool of connections may hand one from thread to thread, never to two at once.
    uri = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
    return sqlite3.connect(uri, uri=True, check_same_thread=False)


def _write_meta(index: sqlite3.Connection, meta: dict[str, Any]) -> None:
    index.execute("DELETE FROM meta")
    index.execute("INSERT INTO meta VALUES (?)", (json.dumps(meta),))


class IndexedFile:
    """An index and the file that it is about, opened anew in every process and thread that reads."""

    def __init__(self, index: Path, source: Path) -> None:
        self.index, self.source = index, source
        self._open: list[tuple[sqlite3.Connection, BinaryIO]] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @contextmanager
    def opened(self) -> Iterator[tuple[sqlite3.Connection, BinaryIO]]:
        """The index and the file, for one reader at a time."""
        with self._lock:
            if self._pid != os.getpid():  # a forked process must not share descriptors with its parent
                self._open, self._pid = [], os.getpid()
            pair = self._open.pop() if self._open else None
        if pair is None:
            pair = connect(self.index), open(self.source, "rb")
        try:
            yield pair
        except (sqlite3.Error, TypeError, OverflowError) as error:
            raise ValueError(f"the index {self.index} is damaged ({error}): delete it, it is made again") from error
        finally:
            with self._lock:
                self._open.append(pair)

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "source": self.source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        IndexedFile.__init__(self, **state)
