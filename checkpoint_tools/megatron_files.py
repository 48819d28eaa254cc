"""megatron's ``torch_dist`` checkpoints written and read one tensor at a time, without building the model.

A checkpoint of this format is a few files of tensors laid end to end (each as torch saves it) and an index that says
which box of which whole tensor stands where. So a tensor can be appended as soon as it is known, cut as any tensor x
pipeline layout would cut it, and read back whole from what any layout wrote.
"""

from __future__ import annotations

import pickle
import re
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mstar_mega.models.mapping import Mapping
from mstar_mega.models.sizes import layers_of_stages
from mstar_mega.platform.inputs import open_input
from mstar_mega.training.index import DTYPES, INDEX, TORCH_INDEX, Index, Piece, Place, Whole
from mstar_mega.training.manifest import read_index
from mstar_mega.training.pieces import read_piece

_LAYER = re.compile(r"(language\.decoder\.layers\.)(\d+)\.(.+)")
_RENAMED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""megatron stores a layer's norms under the name that they have where they are fused with the next matrix."""
_STATELESS = ("word_embeddings.weight", "output_layer.weight")
_OWN_STATE = "_extra_state/shard_"
OPTIMIZER = "optimizer."


def stored_place(name: str) -> tuple[str, int | None]:
    """Key in the checkpoint of a parameter with this canonical name, and its layer where layers share one tensor."""
    found = _LAYER.fullmatch(name)
    if not found:
        return name, None
    return found[1] + _RENAMED.get(found[3], found[3]), int(found[2])


def stage_of(name: str, layers: Sequence[int]) -> int:
    """Pipeline stage that holds a parameter of a model with so many layers on each stage."""
    _, layer = stored_place(name)
    if layer is not None:
        return bisect(list(accumulate(layers)), layer)
    on_last = name.startswith(("language.decoder.", "language.output_layer.", "score_head", "likelihood_weights"))
    return len(layers) - 1 if on_last else 0


@dataclass(frozen=True)
class Stored:
    """A piece of a whole tensor in a file; without a box: an object that is not a tensor."""

    key: str
    place: Place
    size: tuple[int, ...] = ()
    """Of the whole tensor."""
    dtype: torch.dtype | None = None
    offset: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass
class MegatronWriter:
    """Appends parameters to one file per rank of a layout; several processes write side by side, each its own files."""

    directory: Path
    tensor: int
    pipeline: int
    layers: int
    process: int = 0
    stored: list[Stored] = field(default_factory=list)
    """What has been written, for :func:`write_index`."""
    _files: dict[int, BinaryIO] = field(default_factory=dict)

    def add(self, mapping: Mapping, whole: Tensor) -> None:
        """Write one parameter of the model."""
        key, layer = stored_place(mapping.name)
        for rank, start, box in _boxes(mapping, whole, self.tensor):
            self._append_tensor(self._file_of(mapping.name, rank), key, layer, tuple(whole.shape), start, box)
        if mapping.layout != "replicated" and key.endswith(".weight") and not key.endswith(_STATELESS):
            # megatron's linear layers expect a state of their own, which is empty outside TransformerEngine.
            place = "0_1" if layer is None else f"{layer}_{self.layers}"
            own = key.removesuffix("weight") + _OWN_STATE + place
            self._append(self._file_of(mapping.name, 0), lambda info: Stored(own, info), [None])

    def close(self) -> None:
        """Finish the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _file_of(self, name: str, tensor_rank: int) -> int:
        return stage_of(name, layers_of_stages(self.layers, self.pipeline)) * self.tensor + tensor_rank

    def _append_tensor(
        self, file: int, key: str, layer: int | None, whole: tuple[int, ...], start: tuple[int, ...], box: Tensor
    ) -> None:
        if layer is not None:
            whole, start, box = (self.layers, *whole), (layer, *start), box[None]
        shape, dtype = tuple(box.shape), box.dtype
        # A view would take its whole storage with it.
        values = box.clone(memory_format=torch.contiguous_format)
        self._append(file, lambda info: Stored(key, info, whole, dtype, start, shape), values)

    def _append(self, file: int, entry: Any, value: Any) -> None:
        name = f"__{file}_{self.process}.distcp"
        if file not in self._files:
            self._files[file] = open(self.directory / name, "wb")  # closed by close
        stream = self._files[file]
        offset = stream.tell()
        torch.save(value, stream)
        self.stored.append(entry(Place(name, offset, stream.tell() - offset)))


def _boxes(mapping: Mapping, whole: Tensor, tensor: int) -> Iterable[tuple[int, tuple[int, ...], Tensor]]:
    """(tensor rank, offset, piece) of a whole parameter as the ranks of a layout hold it."""
    dim = {"column": 0, "row": 1, "gated": 0}.get(mapping.layout)
    if dim is None:
        yield 0, (0,) * whole.dim(), whole
        return
    halves = 2 if mapping.layout == "gated" else 1
    rows = whole.size(dim)
    if rows % (halves * tensor):
        raise ValueError(f"--tensor {tensor} does not divide the {rows // halves} rows or columns of {mapping.name}")
    step = rows // (halves * tensor)
    for number in range(halves * tensor):
        start = [0] * whole.dim()
        start[dim] = number * step
        yield number % tensor, tuple(start), whole.narrow(dim, number * step, step)


def write_index(directory: Path, stored: Iterable[Stored]) -> None:
    """The index over all processes' files, ours and torch's. Raises ValueError for a piece that was written twice."""
    tensors: dict[str, Whole] = {}
    objects: dict[str, Place] = {}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for piece in stored:
        if (piece.key, piece.offset) in seen:
            raise ValueError(f"{piece.key} was written twice")
        seen.add((piece.key, piece.offset))
        if piece.dtype is None:
            objects[piece.key] = piece.place
            continue
        whole = Whole(str(piece.dtype).removeprefix("torch."), piece.size, [])
        known = tensors.setdefault(piece.key, whole)
        if (known.size, known.dtype) != (whole.size, whole.dtype):
            raise ValueError(f"{piece.key}: layers of different shape or dtype cannot be stored in one tensor")
        known.pieces.append(Piece(piece.offset, piece.shape, piece.place))
    index = Index(tensors, objects)
    (directory / INDEX).write_bytes(index.to_json())
    with open(directory / TORCH_INDEX, "wb") as file:
        pickle.dump(index.to_torch(), file)


@dataclass(frozen=True)
class Parameter:
    """What the index says of one parameter."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class MegatronWeights:
    """The parameters of a checkpoint by canonical name, also of one that holds optimizer state beside them.

    Reads the index only; values are read on demand. Raises DamagedCheckpointError for an index that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = read_index(directory)
        self.parameters: dict[str, Parameter] = {}
        names = {stored: ours for ours, stored in _RENAMED.items()}
        prefix = "language.decoder.layers."
        for key, whole in self.index.tensors.items():
            if key.startswith(OPTIMIZER):
                continue
            size, dtype = whole.size, DTYPES[whole.dtype]
            rest = key.removeprefix(prefix)
            if rest == key:
                self.parameters[key] = Parameter(key, None, size, dtype)
                continue
            for layer in range(size[0]):
                self.parameters[f"{prefix}{layer}.{names.get(rest, rest)}"] = Parameter(key, layer, size[1:], dtype)

    @property
    def optimizer_bytes(self) -> int:
        """Size of the optimizer's tensors."""
        return sum(
            torch.Size(whole.size).numel() * DTYPES[whole.dtype].itemsize
            for key, whole in self.index.tensors.items()
            if key.startswith(OPTIMIZER)
        )

    def read(self, name: str) -> Tensor:
        """One whole parameter. Raises ValueError, naming file and tensor, when its pieces do not fill it."""
        parameter = self.parameters[name]
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        filled = 0
        for stored in self.index.tensors[parameter.key].pieces:
            offset, sizes = stored.offset, stored.shape
            inside: tuple[int, ...] = ()
            if parameter.layer is not None:
                if not offset[0] <= parameter.layer < offset[0] + sizes[0]:
                    continue
                inside = (parameter.layer - offset[0],)
                offset, sizes = offset[1:], sizes[1:]
            piece = self._load(stored, name)
            box = tuple(slice(start, start + length) for start, length in zip(offset, sizes, strict=True))
            whole[box] = piece[inside] if inside else piece
            filled += torch.Size(sizes).numel()
        if filled != whole.numel():
            raise ValueError(f"{self.directory}: {name} has {filled} of its {whole.numel()} values")
        return whole

    def _load(self, stored: Piece, name: str) -> Tensor:
        file, place = self.directory / stored.place.file, stored.place
        with open_input(file) as stream:
            piece = read_piece(stream, place.start, place.length, f"{file}: {name}")
        if not isinstance(piece, Tensor) or tuple(piece.shape) != stored.shape:
            found = list(piece.shape) if isinstance(piece, Tensor) else type(piece).__name__
            raise ValueError(f"{file}: {name} is {found} where the index announces {list(stored.shape)}")
        return piece
