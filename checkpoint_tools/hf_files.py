"""Hugging Face checkpoint directories: sharded safetensors, read tensor by tensor and written shard by shard."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mstar_mega.models.description import other_kind
from mstar_mega.platform.files import refuse_lfs_pointer
from mstar_mega.platform.inputs import checked, must_be_inside, open_input, read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class _Index(BaseModel):
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


_WEIGHT_MAP = TypeAdapter(_Index)


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    file: Path
    name: str
    """In the shard."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HFWeights:
    """The tensors of a Hugging Face directory. Headers are read and compared with the index at once, values on demand.

    Raises ValueError, naming file and tensor and what was expected, for a missing, truncated or unreadable shard, an
    index that is not the shards' content, and a name that stands in two shards.

    ``tied``: tensors that are a copy of another one (name -> that one's name). They are left out where the values are
    equal (ValueError where they are not), and stand for the other one where that is not stored.
    """

    def __init__(self, directory: str | Path, tied: Mapping[str, str] | None = None) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(f"{directory}: there is no such directory; expected one with config.json and safetensors")
        wanted = _read_index(self.directory)
        self.tensors: dict[str, TensorInfo] = {}
        for file in sorted(set(wanted.values())) if wanted else [SINGLE]:
            self._add_shard(self.directory / file)
        for name, file in (wanted or {}).items():
            found = self.tensors.get(name)
            if found is None or found.file.name != file:
                place = f"it is in {found.file.name}" if found else "it is in no shard"
                raise ValueError(f"{self.directory / file}: tensor {name!r} is expected here by {INDEX}, but {place}")
        surplus = sorted(set(self.tensors) - set(wanted or self.tensors))
        if surplus:
            raise ValueError(f"{self.tensors[surplus[0]].file}: tensor {surplus[0]!r} is not named in {INDEX}")

        self.copies = [name for name in tied or {} if name in self.tensors]
        """Tied tensors that were stored."""
        for name in self.copies:
            self._untie(name, (tied or {})[name])

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. The shard is mapped only as long as the tensor lives."""
        info = self.tensors[name]
        with safe_open(info.file, "pt", device="cpu") as shard:
            tensor: Tensor = shard.get_tensor(info.name)
            return tensor

    def _untie(self, copy: str, original: str) -> None:
        if original in self.tensors:
            one, other = self.read(copy), self.read(original)
            if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(one, other):
                raise ValueError(
                    f"{self.directory}: {copy} and {original} are one tied embedding, but the two that are stored "
                    "differ: remove the one that training did not use"
                )
            del self.tensors[copy]
        else:
            self.tensors[original] = self.tensors.pop(copy)

    def _add_shard(self, file: Path) -> None:
        if not file.is_file():
            beside = ", ".join(sorted(path.name for path in self.directory.glob("*.safetensors"))) or "none"
            raise ValueError(f"{file} is missing (safetensors files present: {beside})")
        must_be_inside(self.directory, file, "what it leads to would be read, and published with the model")
        try:
            # Opening compares the file's length with what its header announces.
            with safe_open(file, "pt", device="cpu") as shard:
                for name in shard.keys():  # not a dictionary
                    if name in self.tensors:
                        raise ValueError(f"{file}: tensor {name!r} is also in {self.tensors[name].file.name}")
                    part = shard.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise ValueError(f"{file}: tensor {name!r} has dtype {part.get_dtype()}, which is not known")
                    self.tensors[name] = TensorInfo(file, name, tuple(part.get_shape()), _DTYPES[part.get_dtype()])
            _refuse_doubles(file)
        except (SafetensorError, OSError) as error:
            refuse_lfs_pointer(file)
            size = file.stat().st_size
            raise ValueError(f"{file} ({size:,} bytes) is truncated or not a safetensors file: {error}") from error


def _refuse_doubles(file: Path) -> None:
    """Raise ValueError where a readable shard's header has a tensor's name twice: readers differ in which they take."""
    with open_input(file) as shard:
        header = shard.read(int.from_bytes(shard.read(8), "little"))  # safetensors has bounded it
    doubles: list[str] = []

    def look(pairs: list[tuple[str, object]]) -> None:
        doubles.extend(name for name, many in Counter(name for name, _ in pairs).items() if many > 1)

    json.loads(header, object_pairs_hook=look)
    if doubles:
        raise ValueError(f"{file}: the header names {doubles[0]!r} twice; save it with one of each name")


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> shard, or None where a single file stands without an index."""
    path = directory / INDEX
    if not path.exists():
        if not (directory / SINGLE).exists():
            if other := other_kind(directory):
                raise ValueError(other)
            raise ValueError(f"{directory}: neither {INDEX} nor {SINGLE} is there; expected the model's weights")
        return None
    refuse_lfs_pointer(path)
    try:
        weight_map = checked(_WEIGHT_MAP, read_object(path), "it").weight_map
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors index with a weight_map ({error})") from error
    outside = [file for file in weight_map.values() if Path(file).name != file]
    if outside:
        raise ValueError(f"{path}: {outside[0]!r} is not a file name in this directory")
    return dict(weight_map)


class HFWriter:
    """Fills a directory with shards of at most ``shard_bytes`` (a larger tensor has one of its own).

    Several processes write side by side, each its own shards; :func:`finish_shards` then names them and writes the
    index.
    """

    def __init__(self, directory: Path, shard_bytes: int, process: int = 0) -> None:
        self.directory, self.shard_bytes, self.process = directory, shard_bytes, process
        self.shards: list[tuple[str, dict[str, int]]] = []
        """Name of each finished shard, and the bytes of its tensors."""
        self._open: dict[str, Tensor] = {}
        self._open_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take over one tensor; writes a shard when this one would make it too large."""
        if self._open and self._open_bytes + tensor.nbytes > self.shard_bytes:
            self.flush()
        self._open[name] = tensor.contiguous()
        self._open_bytes += tensor.nbytes

    def flush(self) -> None:
        """Write what has been added since the last shard."""
        if not self._open:
            return
        file = f"part-{self.process:05d}-{len(self.shards):05d}.safetensors"
        save_file(self._open, self.directory / file, metadata={"format": "pt"})
        (self.directory / file).chmod(0o644)  # safetensors makes its files for the owner alone
        self.shards.append((file, {name: tensor.nbytes for name, tensor in self._open.items()}))
        self._open, self._open_bytes = {}, 0


def finish_shards(directory: Path, shards: Iterable[tuple[str, dict[str, int]]]) -> None:
    """Give all processes' shards their final names and write the index (none for a single shard)."""
    shards = list(shards)
    if len(shards) == 1:
        os.rename(directory / shards[0][0], directory / SINGLE)
        return
    weight_map, total = {}, 0
    for number, (part, sizes) in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.rename(directory / part, directory / file)
        weight_map.update(dict.fromkeys(sizes, file))
        total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
