"""Files that are either whole or absent, whatever kills the process or fills the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path

from mstar_mega.platform.inputs import open_input

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, of an exhausted quota and of a limit on a file's size."""


def write_text_atomic(path: str | Path, text: str) -> None:
    """:func:`write_bytes_atomic` of UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: readers, now or after a crash, see the old file or the new one, never a part.

    Directories above are made. Two processes may write the same path at once; the last rename wins. A process killed
    on the way leaves ``.<name>.<pid>.tmp`` beside it, which nothing reads. Raises OSError; for a full disk its message
    names the path and what to do, and the earlier file is untouched.
    """
    path = Path(path)
    # In the same directory, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # never through a link that somebody has put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise OSError(error.errno, _disk_full_message(path, len(data))) from error
        raise


def sha256_file(path: str | Path) -> str:
    """SHA-256 of the file's bytes, 64 hexadecimal digits; reads a block at a time. Raises ValueError for a pipe."""
    digest = hashlib.sha256()
    with open_input(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_LFS = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file's first bytes are those of the note that Git LFS keeps in place of a large file."""
    return content.startswith(_LFS)


def refuse_lfs_pointer(path: str | Path) -> None:
    """Raise ValueError, with the remedy, for a file that is a Git LFS pointer; a file that is missing is none."""
    path = Path(path)
    if not path.is_file():
        return
    with open(path, "rb") as file:
        head = file.read(len(_LFS))
    if is_lfs_pointer(head):
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is a Git LFS pointer, not the file itself: run `git lfs pull` where "
            "it was cloned, or download the file again"
        )


def free_bytes(path: str | Path) -> int:
    """Bytes free to this user on the file system of ``path``, which need not exist yet."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def is_full(directory: Path, size: int) -> bool:
    """Whether a file of ``size`` bytes finds no room in ``directory`` (the disk, a quota, a limit on file sizes)."""
    probe = directory / f".probe.{os.getpid()}.tmp"
    try:
        with open(probe, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, size))
    except OSError as error:
        return error.errno in DISK_FULL
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return False


def sync_tree(directory: Path) -> None:
    """Bring a directory's files to the disk, so that a rename of it cannot overtake them."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def sync(path: Path) -> None:
    """Bring a file to the disk, or a directory's own entries: without those a rename does not survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full_message(path: Path, needed: int) -> str:
    return (
        f"cannot write {path}: the disk is full ({needed:,} bytes needed, {free_bytes(path):,} free). Free some space "
        "and give the same command again: all that was finished before is intact"
    )
