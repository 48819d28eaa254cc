"""What must hold before a checkpoint is believed: its manifest, the files' checksums, and an index without code in it.

``manifest.json`` stands beside the shards: size and SHA-256 of every file, the caller's small JSON state, and a
checksum over itself.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import Metadata

from mstar_mega.platform.distributed import FailedTogether, broadcast_object, together
from mstar_mega.platform.files import sha256_file

MANIFEST = "manifest.json"
FORMAT = 1

# All that torch's checkpoint index needs. It is a pickle, so anything else in it is refused rather than run.
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_INDEX_NAMES = {
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_device"),
    ("torch.serialization", "_get_layout"),
}


class DamagedCheckpointError(ValueError):
    """A checkpoint's files are not what its manifest says, or the manifest itself cannot be read."""


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every file with the manifest, the work shared by all ranks. Collective. Returns the common state.

    Raises :class:`DamagedCheckpointError` on every rank.
    """
    manifest, problem = broadcast_object(read_manifest(path) if dist.get_rank() == 0 else ({}, ""))
    if not problem:
        try:
            found = digest_files(path, sorted(manifest["files"]))
            problem = _first_difference(path, manifest["files"], found)
        except FailedTogether as error:
            problem = str(error)
    if not problem:
        problem = broadcast_object(_index_problem(path) if dist.get_rank() == 0 else "")
    if problem:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {problem}")
    common: dict[str, Any] = manifest["common"]
    return common


def write_manifest(directory: Path, files: dict[str, list[Any]], common: dict[str, Any]) -> None:
    """Write the manifest of a directory whose files :func:`digest_files` has read."""
    body = {"format": FORMAT, "common": common, "files": files}
    text = json.dumps({**body, "sha256": _canonical_digest(body)}, indent=1)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest and, where it cannot be believed, why not."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        claimed = manifest.pop("sha256")
        if _canonical_digest(manifest) != claimed:
            return {}, f"{file} was altered (its own checksum does not match)"
        if manifest["format"] != FORMAT:
            return {}, f"{file} has format {manifest['format']!r}; this program reads format {FORMAT}"
    except FileNotFoundError:
        return {}, f"{file} is missing"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return {}, f"{file} cannot be read ({type(error).__name__}: {error})"
    return manifest, ""


def files_in(directory: Path) -> list[str]:
    """Relative paths of the files at any depth, sorted."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def digest_files(directory: Path, names: list[str]) -> dict[str, list[Any]]:
    """Size and SHA-256 of each file, the files dealt out over the ranks; a missing file has size -1. Collective."""

    def mine() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            path = directory / name
            found[name] = [path.stat().st_size, sha256_file(path)] if path.is_file() else [-1, ""]
        return found

    merged: dict[str, list[Any]] = {}
    for part in together("read", mine):
        merged.update(part)
    return dict(sorted(merged.items()))


def _canonical_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _first_difference(path: Path, wanted: dict[str, list[Any]], found: dict[str, list[Any]]) -> str:
    for name, (size, digest) in wanted.items():
        found_size, found_digest = found[name]
        if found_size < 0:
            return f"{path / name} is missing"
        if found_size != size:
            return f"{path / name} has {found_size} bytes instead of {size}"
        if found_digest != digest:
            return f"{path / name} was altered (SHA-256 {found_digest[:12]} instead of {digest[:12]})"
    return ""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or module in _INDEX_MODULES or (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint index has no use for")


def read_index(path: Path) -> Metadata:
    """torch's index of a checkpoint, read without running what it names. Raises :class:`DamagedCheckpointError`."""
    file = path / ".metadata"
    try:
        with open(file, "rb") as stream:
            index: Metadata = _IndexUnpickler(stream).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise DamagedCheckpointError(f"{file} is refused: {error}") from error
    return index


def _index_problem(path: Path) -> str:
    """Why torch must not unpickle this checkpoint's index; empty when it holds plain index data only."""
    try:
        read_index(path)
    except DamagedCheckpointError as error:
        return str(error)
    return ""
