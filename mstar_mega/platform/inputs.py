"""Files that somebody else wrote: only regular ones, of a size that is bounded, and one line about what is wrong.

A named pipe would be waited for without end, a link to a device read without end; text nested too deeply or a number
where a name should be would end in a traceback somewhere behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

MOST_JSON = 1 << 28
"""Bytes of a JSON file that is read as a whole; a tokenizer.json has some ten million."""
_LONGEST = 60

T = TypeVar("T")


def open_input(path: str | Path) -> BinaryIO:
    """Open a file for reading. Raises ValueError for what is no regular file, and OSError as open does."""
    # Asked before it is opened, as opening a device may do something, and after it, as it may have been exchanged.
    _must_be_regular(os.stat(path).st_mode, path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _must_be_regular(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def must_be_regular(path: str | Path) -> None:
    """Before a library opens the file by its name. Raises ValueError for what is no regular file, and OSError."""
    _must_be_regular(os.stat(path).st_mode, path)


def must_be_inside(directory: str | Path, path: str | Path, why: str) -> None:
    """Raise ValueError where a link in ``path`` leads out of ``directory``; ``why`` that matters, for the message.

    Hugging Face's cache keeps the files of a snapshot in ``blobs``, which belongs to it.
    """
    place, home = Path(path).resolve(), Path(directory).resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(place.is_relative_to(each) for each in allowed):
        raise ValueError(
            f"{path} is a link that leads out of {directory}: {why}. Put the file itself there, or remove the link"
        )


def refuse_links_out(directory: str | Path, why: str) -> None:
    """:func:`must_be_inside` for every link below a directory that is there, also while a job works in it."""
    folders = [Path(directory)]
    while folders:
        # A folder may have been moved since; one that cannot be looked into leads nowhere.
        with contextlib.suppress(FileNotFoundError, PermissionError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    must_be_inside(directory, entry.path, why)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))


def read_input(path: str | Path, most: int) -> bytes:
    """A file's bytes. Raises ValueError where there are more than ``most``, and as :func:`open_input`."""
    with open_input(path) as file:
        # As much memory is taken as is asked for, whatever the file holds.
        content = file.read(min(most, max(os.fstat(file.fileno()).st_size, 1 << 16)) + 1)
    if len(content) > most:
        raise ValueError(f"{path} is larger than the {most:,} bytes that such a file may have")
    return content


def read_json(path: str | Path, most: int = MOST_JSON) -> Any:
    """The content of a JSON file. Raises ValueError naming the file, and OSError as open does."""
    return parse_json(read_input(path, most), path)


def read_object(path: str | Path, most: int = MOST_JSON) -> dict[str, Any]:
    """The JSON object of a file. Raises as :func:`read_json`."""
    content = read_json(path, most)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def parse_json(text: bytes | str, where: object) -> Any:
    """JSON of at most some two hundred levels, ``NaN`` and ``Infinity`` allowed. Raises ValueError naming ``where``."""
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def checked(schema: TypeAdapter[T], value: Any, where: object) -> T:
    """``value`` as the schema has it. Raises ValueError naming ``where``, the place in it, and what should be."""
    try:
        return schema.validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{where}: {problems(error)[0]}") from None


def problems(error: ValidationError) -> list[str]:
    """What does not fit, a line each: ``llm_config.vocab_size is None: it should be a valid integer``."""
    found = []
    for each in error.errors(include_url=False, include_context=False):
        place = ".".join(str(part) for part in each["loc"] if part != "[key]")
        wanted = each["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        if each["type"] in ("model_type", "dict_type", "dataclass_type"):
            wanted = "an object"
        if each["type"] == "missing":
            found.append(f"{_cut(place)} is missing")
        else:
            found.append(f"{_cut(place) or 'it'} is {_shown(each['input'])}: it should be {wanted}")
    return found


def _shown(value: Any) -> str:
    """A value as a message shows it: never all of a large one."""
    if value is None:
        return "null"
    if isinstance(value, dict | list | tuple):
        return "an object" if isinstance(value, dict) else "a list"
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _must_be_regular(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file (a pipe, a socket or a device): it is not read")
