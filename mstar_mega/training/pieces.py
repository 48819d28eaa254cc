"""Pieces of a checkpoint's files: tensors as torch saves them, read without running anything, and megatron's loader
over them."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata, load_state_dict
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from mstar_mega.platform.inputs import open_input
from mstar_mega.training.index import Index

if TYPE_CHECKING:
    from typing_extensions import Buffer


def read_saved(stream: IO[bytes], where: object) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain values. Raises ValueError naming ``where``."""
    try:
        with zipfile.ZipFile(stream) as records:
            if any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist()):
                raise ValueError("it is compressed, which torch's files never are")
        stream.seek(0)
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch goes on to say how one would have it run.
        raise ValueError(
            f"{where} cannot be read: it holds more than tensors and plain values, or is damaged"
        ) from None
    except Exception as error:  # anything at all may stand in it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} cannot be read: {reason[:300]}") from None


def read_piece(file: BinaryIO, start: int, length: int, where: object) -> Any:
    """What stands in these bytes of a file. Raises ValueError naming ``where`` and the byte."""
    return read_saved(io.BufferedReader(_Part(file, start, length), 1 << 16), f"{where} at byte {start}")


class _Part(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._at))
        self._file.seek(self._start + self._at)
        content = self._file.read(wanted)
        view[: len(content)] = content
        self._at += len(content)
        return len(content)


class IndexReader(FileSystemReader):
    """torch's reader with our index instead of its pickled one, and no pickle of anything but tensors."""

    def __init__(self, directory: Path, index: Index) -> None:
        super().__init__(directory)
        self._index, self._directory = index, directory

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index, as torch's loader wants it."""
        return self._index.to_torch()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for. Raises ValueError naming file and tensor."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with open_input(self._directory / name) as file:
                for item in items:
                    self._read(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, file: BinaryIO, item: ReadItem, planner: LoadPlanner) -> None:
        place, key = self.storage_data[item.storage_index], item.storage_index.fqn
        where = f"{self._directory / place.relative_path}: {key}"
        value = read_piece(file, place.offset, place.length, where)
        if item.type == LoadItemType.BYTE_IO:
            # torch's planner would unpickle the bytes with everything that they name.
            planner.original_state_dict[item.dest_index.fqn] = value  # type: ignore[attr-defined]
            return
        if not isinstance(value, Tensor):
            raise ValueError(f"{where} is a {type(value).__name__}, not a tensor")
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            if start + length > value.size(dim):
                raise ValueError(f"{where} is {list(value.shape)}, smaller than the index says")
            value = value.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(value)
        planner.commit_tensor(item, target)


def read_shards(directory: Path, index: Index, template: dict[str, Any]) -> dict[str, Any]:
    """What a tree of megatron's sharded tensors and objects asks for, in its form. Collective.

    Raises CheckpointException as torch's loader does.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import torch as megatron_format

    grouped, places, renamed = megatron_format._replace_state_dict_keys_with_sharded_keys(template)
    wanted = megatron_format.mcore_to_pyt_state_dict(grouped, True)
    tensors = [piece for pieces in grouped.values() for piece in pieces if isinstance(piece, ShardedTensor)]
    planner = megatron_format.MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[each for each in tensors if not each.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={each.key: each for each in tensors if each.allow_shape_mismatch},
    )
    load_state_dict(wanted, IndexReader(directory, index), planner=planner)
    filled = {key: megatron_format._unwrap_pyt_sharded_tensor(value) for key, value in wanted.items()}
    state: dict[str, Any] = megatron_format._replace_sharded_keys_with_state_dict_keys(filled, places, renamed)
    megatron_format._restore_dict_types(state, template)
    return state
