"""Checkpoints as somebody with bad intentions would hand them over: altered, with every checksum right again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from mstar_mega.platform.files import sha256_file

MANIFEST, INDEX, TORCH_INDEX = "manifest.json", "index.json", ".metadata"


class Marker:
    """A pickle that leaves a file behind when something runs it."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.file,)


def seal(checkpoint: Path, names: list[str] | None = None, **body: Any) -> None:
    """Write the manifest anew over what lies there (or over ``names`` only); ``body`` replaces parts of it."""
    known = json.loads((checkpoint / MANIFEST).read_text())
    known.pop("sha256", None)
    if names is None:
        files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
        names = [str(path.relative_to(checkpoint)) for path in files]
    known["files"] = {name: [(checkpoint / name).stat().st_size, sha256_file(checkpoint / name)] for name in names}
    write_manifest(checkpoint, {**known, **body})


def write_manifest(checkpoint: Path, body: Any) -> None:
    """Any content with the checksum that belongs to it."""
    if isinstance(body, dict):
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        body = {**body, "sha256": hashlib.sha256(canonical).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(body))


def only_torch_index(checkpoint: Path) -> None:
    """As an earlier version of this program, or megatron itself, left it."""
    (checkpoint / INDEX).unlink(missing_ok=True)
    seal(checkpoint)


def put_torch_index(checkpoint: Path, content: bytes) -> None:
    """The pickled index alone, whatever is in it."""
    (checkpoint / INDEX).unlink(missing_ok=True)
    (checkpoint / TORCH_INDEX).write_bytes(content)
    seal(checkpoint)


def named(module: str, name: str, argument: bytes, rest: bytes = b".") -> bytes:
    """A pickle of protocol 4 that calls ``module.name(argument)``, whatever find_class makes of a name with dots."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + argument + b"\x85R" + rest


def hide_in_own_state(checkpoint: Path, value: Any) -> None:
    """Let every ``_extra_state`` of the index lead to a pickle of ``value`` at the end of a shard."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getvalue()
    shard = sorted(checkpoint.glob("*.distcp"))[0]
    own = json.loads((checkpoint / INDEX).read_text())
    index = pickle.loads((checkpoint / TORCH_INDEX).read_bytes())
    with open(shard, "ab") as file:
        for where, place in index.storage_data.items():
            if "_extra_state" in where.fqn:
                place.relative_path, place.offset, place.length = shard.name, file.tell(), len(content)
                own["objects"][where.fqn] = {"file": shard.name, "start": file.tell(), "length": len(content)}
                file.write(content)
    (checkpoint / TORCH_INDEX).write_bytes(pickle.dumps(index))
    (checkpoint / INDEX).write_text(json.dumps(own))
    seal(checkpoint)
