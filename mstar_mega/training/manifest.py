"""What must hold before a checkpoint is believed: its manifest, the files' checksums, and an index that
fits the files.

``manifest.json`` stands beside the shards: size and SHA-256 of every file, the caller's small JSON state, and a
checksum over itself.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch.distributed as dist
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter

from mstar_mega.platform.distributed import FailedTogether, broadcast_object, together
from mstar_mega.platform.files import sha256_file
from mstar_mega.platform.inputs import checked, must_be_inside, read_input, read_json, read_object
from mstar_mega.training import index
from mstar_mega.training.index import INDEX, TORCH_INDEX, Index

MANIFEST = "manifest.json"
FORMAT = 1
COMMON_STATE = "common.pt"
"""megatron's own: what is not cut over ranks."""

STAMP = "metadata.json"
"""megatron's own: the name of the format. Written by us: which fields it has differs between releases."""
STAMPED = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
    "common_backend_version": 1,
}  # fmt: skip
MOST_BYTES = 1 << 26
"""Of a manifest."""


def _must_be_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError("the path of a file inside the checkpoint")
    return name


_Name = Annotated[str, Field(max_length=1000), AfterValidator(_must_be_inside)]
_Bytes = Annotated[int, Field(strict=True, ge=0, lt=1 << 60)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    format: int
    common: dict[str, Any]
    files: Annotated[dict[_Name, tuple[_Bytes, _Digest]], Field(min_length=1)]


_SCHEMA = TypeAdapter(_Manifest)


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
        problem = broadcast_object(_unreadable(path, manifest["files"]) if dist.get_rank() == 0 else "")
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
        manifest = read_object(file, MOST_BYTES)
        claimed = manifest.pop("sha256", None)
        if _canonical_digest(manifest) != claimed:
            return {}, f"{file} was altered (its own checksum does not match)"
        if manifest.get("format") != FORMAT:
            return {}, f"{file} has format {manifest.get('format')!r}; this program reads format {FORMAT}"
        checked(_SCHEMA, manifest, file)
        for name in manifest["files"]:
            must_be_inside(path, path / name, "a checkpoint's files lie in it")
    except FileNotFoundError:
        return {}, f"{file} is missing"
    except (OSError, ValueError) as error:
        text = str(error)
        return {}, text if str(file) in text else f"{file} cannot be read ({text})"
    return manifest, ""


def files_in(directory: Path) -> list[str]:
    """Relative paths of the files at any depth, sorted."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def digest_files(directory: Path, names: list[str], must_exist: bool = False) -> dict[str, list[Any]]:
    """Size and SHA-256 of each file, the files dealt out over the ranks; a missing file has size -1. Collective.

    ``must_exist``: raises FailedTogether where a rank does not see a file.
    """

    def mine() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            path = directory / name
            if must_exist and not path.is_file():
                raise FileNotFoundError(
                    f"{path} is not seen on {socket.gethostname()}: do all nodes share the directory?"
                )
            found[name] = [path.stat().st_size, sha256_file(path)] if path.is_file() else [-1, ""]
        return found

    merged: dict[str, list[Any]] = {}
    for part in together("read", mine):
        merged.update(part)
    return dict(sorted(merged.items()))


def _canonical_digest(body: dict[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


def read_index(path: Path) -> Index:
    """Which tensor stands where in a checkpoint; what the manifest does not vouch for is not looked at.

    Raises :class:`DamagedCheckpointError`. The files that it names are not read.
    """
    manifest, problem = read_manifest(path)
    if problem:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {problem}")
    files = manifest["files"]
    name = INDEX if INDEX in files else TORCH_INDEX
    file = path / name
    try:
        if name not in files:
            raise ValueError(f"the manifest lists no {INDEX}")
        content = read_input(file, most=index.MOST_BYTES)
        size, digest = files[name]
        if len(content) != size or sha256(content).hexdigest() != digest:
            raise ValueError("it was altered: its size or SHA-256 is not the manifest's")
        found = index.from_json(content, INDEX) if name == INDEX else index.from_pickle(content)
        if problem := found.problem({each: size for each, (size, _) in files.items()}):
            raise ValueError(problem)
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {file} is refused: {error}") from None
    return found


def _unreadable(path: Path, files: Mapping[str, Any]) -> str:
    """Why the loader must not be let at this checkpoint, whose checksums hold; empty where it may."""
    for name in (COMMON_STATE, STAMP):
        if name not in files:
            return f"the manifest lists no {name}"
    try:
        stamp = read_json(path / STAMP, most=1 << 12)
        if stamp != STAMPED:
            return f"{path / STAMP} names another format than this program's"
        read_index(path)
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f"checkpoint {path} is damaged: ")
    return ""
