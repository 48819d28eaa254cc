"""Which box of which whole tensor stands where in a checkpoint's files.

``index.json`` is what is written and trusted: it can hold nothing but names and numbers. torch's own index,
``.metadata``, is written beside it for other programs of megatron's. It is a pickle, so it is read (of a checkpoint
that has no ``index.json``) through a gate that lets nothing but its few types through, and what comes out is copied
field by field.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import PurePosixPath
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mstar_mega.platform.inputs import checked, parse_json

INDEX = "index.json"
FORMAT = 1
TORCH_INDEX = ".metadata"
MOST_BYTES = 1 << 28
"""Of an index."""
MOST_LAYERS = 4096
_LAYERS = "language.decoder.layers."
_NOTHING_ELSE = ConfigDict(extra="forbid")

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "bool",
    )
}  # fmt: skip
"""By the name in an index."""


def _must_be_known(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"one of {', '.join(DTYPES)}")
    return name


Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 50)]
Dims = Annotated[tuple[Count, ...], Field(max_length=16)]
Key = Annotated[str, Field(min_length=1, max_length=1000)]


@dataclass(frozen=True)
class Place:
    """Bytes [start, start + length) of a file of the checkpoint."""

    __pydantic_config__ = _NOTHING_ELSE

    file: str
    start: Count
    length: Count


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor and where it is, as torch saves it."""

    __pydantic_config__ = _NOTHING_ELSE

    offset: Dims
    shape: Dims
    place: Place


@dataclass(frozen=True)
class Whole:
    """A whole tensor in pieces, which do not overlap."""

    __pydantic_config__ = _NOTHING_ELSE

    dtype: Annotated[str, AfterValidator(_must_be_known)]
    size: Dims
    pieces: list[Piece]


@dataclass(frozen=True)
class Index:
    """Of a checkpoint, by key."""

    __pydantic_config__ = _NOTHING_ELSE

    tensors: Annotated[dict[Key, Whole], Field(min_length=1)]
    objects: dict[Key, Place]
    """What is no tensor: the states that megatron's layers have of their own, which are empty here."""
    format: Annotated[int, Field(strict=True, ge=FORMAT, le=FORMAT)] = FORMAT

    def to_json(self) -> bytes:
        """The content of ``index.json``."""
        return _SCHEMA.dump_json(self) + b"\n"

    def to_torch(self) -> Metadata:
        """The same for torch's loader."""
        entries: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for key, whole in self.tensors.items():
            chunks = []
            for number, piece in enumerate(whole.pieces):
                chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
                chunks.append(chunk)
                places[MetadataIndex(key, chunk.offsets, number)] = _info(piece.place)
            properties = TensorProperties(dtype=DTYPES[whole.dtype])
            entries[key] = TensorStorageMetadata(properties, torch.Size(whole.size), chunks)
        for key, place in self.objects.items():
            entries[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _info(place)
        return Metadata(entries, storage_data=places)

    def problem(self, files: Mapping[str, int]) -> str:
        """Why the index cannot be that of ``files`` (name -> bytes); empty where it can.

        Nothing that it announces is larger than what stands in the files for it.
        """
        used: dict[str, int] = {}
        for key, place in self._places():
            if place.file not in files or len(PurePosixPath(place.file).parts) != 1:
                return f"{key!r} is in {place.file!r}, which the manifest does not list"
            if place.start + place.length > files[place.file]:
                return f"{key!r} ends at byte {place.start + place.length} of {place.file}, which has fewer"
            used[place.file] = used.get(place.file, 0) + place.length
        for file, length in used.items():
            if length > files[file]:
                return f"pieces of {file} have {length} bytes together, which is more than it has"
        for key, whole in self.tensors.items():
            if problem := _tensor_problem(whole, is_stacked=key.startswith(_LAYERS)):
                return f"{key!r} {problem}"
        return ""

    def _places(self) -> Iterator[tuple[str, Place]]:
        for key, whole in self.tensors.items():
            yield from ((key, piece.place) for piece in whole.pieces)
        yield from self.objects.items()


_SCHEMA = TypeAdapter(Index)


def from_json(content: bytes, where: object) -> Index:
    """The index in ``index.json``. Raises ValueError naming ``where`` and what is wrong."""
    return checked(_SCHEMA, parse_json(content, where), where)


def from_torch(metadata: Metadata) -> Index:
    """The index that torch made. Raises ValueError, TypeError, AttributeError or KeyError for another."""
    if type(metadata) is not Metadata:
        raise TypeError(f"it holds a {type(metadata).__name__}")
    found = {}
    for where, place in (metadata.storage_data or {}).items():
        offset = None if where.offset is None else tuple(where.offset)
        found[where.fqn, offset] = _place(place)
    tensors: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if type(entry) is BytesStorageMetadata:
            objects[key] = found[key, None]
            continue
        if type(entry) is not TensorStorageMetadata:
            raise TypeError(f"an entry is a {type(entry).__name__}")
        pieces = [
            {"offset": tuple(chunk.offsets), "shape": tuple(chunk.sizes), "place": found[key, tuple(chunk.offsets)]}
            for chunk in entry.chunks
        ]
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[key] = {"dtype": dtype, "size": tuple(entry.size), "pieces": pieces}
    return checked(_SCHEMA, {"tensors": tensors, "objects": objects, "format": 1}, "it")


def from_pickle(content: bytes) -> Index:
    """The index in ``.metadata``, read without running what it names. Raises ValueError with what is wrong."""
    try:
        _look_through(content)
        return from_torch(_Gate(io.BytesIO(content)).load())
    except Exception as error:  # anything at all may stand in it
        raise ValueError(str(error) or type(error).__name__) from None


_TORCH = "torch.distributed.checkpoint.metadata"
_NAMES = {
    *((_TORCH, each) for each in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata")),
    *((_TORCH, each) for each in ("ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "Path"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in DTYPES),
}
"""All that torch's index needs. Each is a plain type, or looks a word up in a table."""
_MOST_OPERATIONS = 50_000_000
_REFUSED = ("INST", "OBJ", "EXT", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER", "NEWOBJ_EX", "DUP")
"""Of pickle's operations: they make objects in ways that the index does not use."""


class _Gate(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # The pair as a whole: pickle resolves a name with dots through whatever the module has imported.
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint index has no use for")
        return super().find_class(module, name)


def _look_through(content: bytes) -> None:
    """Raises ValueError for a pickle that would need more memory than it weighs, or operations of no use to an index.

    The unpickler itself makes room for a text or a numbered note before it looks whether there is one.
    """
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if operation.name.startswith(_REFUSED):
            raise ValueError(f"it has the operation {operation.name}, which a checkpoint index has no use for")
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
            raise ValueError("it numbers more notes than it makes")
        if count > _MOST_OPERATIONS:
            raise ValueError("it is too long")


def _place(info: _StorageInfo) -> dict[str, Any]:
    if info.transform_descriptors:
        raise ValueError("pieces are transformed (compressed), which this program does not read")
    return {"file": info.relative_path, "start": info.offset, "length": info.length}


def _info(place: Place) -> _StorageInfo:
    return _StorageInfo(place.file, place.start, place.length)


def _tensor_problem(whole: Whole, is_stacked: bool) -> str:
    sides = len(whole.size)
    if is_stacked and (not sides or not 1 <= whole.size[0] <= MOST_LAYERS):
        return f"has size {list(whole.size)}: its first number is that of layers, from 1 to {MOST_LAYERS}"
    width = DTYPES[whole.dtype].itemsize
    values = 0
    for piece in whole.pieces:
        if len(piece.offset) != sides or len(piece.shape) != sides:
            return f"has a piece of {len(piece.shape)} dimensions instead of {sides}"
        ends = zip(piece.offset, piece.shape, whole.size, strict=True)
        if any(start + length > size for start, length, size in ends):
            return f"has a piece outside its size {list(whole.size)}"
        if prod(piece.shape) * width > piece.place.length:
            return f"has a piece of {prod(piece.shape)} values in {piece.place.length} bytes"
        values += prod(piece.shape)
    if values != prod(whole.size):
        return f"has {values} of its {prod(whole.size)} values"
    return ""
