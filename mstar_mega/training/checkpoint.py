"""Sharded checkpoints that are complete or absent, checked before they are believed, and independent of the layout.

A checkpoint is a directory in megatron-core's ``torch_dist`` format, which every tensor x pipeline layout loads, with a
manifest beside the shards (``training/manifest.py``). It is written under a hidden name and renamed when every rank has
finished, so a killed or failed save leaves nothing that looks good.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, Metadata
from torch.distributed.checkpoint import save as torch_dist_save
from torch.distributed.checkpoint.storage import WriteResult

from mstar_mega.platform import watch
from mstar_mega.platform.distributed import FailedTogether, broadcast_object, on_main, together
from mstar_mega.platform.files import free_bytes, is_full, sync
from mstar_mega.platform.inputs import open_input
from mstar_mega.platform.quiet import silence_normal_warnings
from mstar_mega.training.index import INDEX, Index, from_torch
from mstar_mega.training.manifest import (
    COMMON_STATE,
    MANIFEST,
    STAMP,
    STAMPED,
    DamagedCheckpointError,
    digest_files,
    files_in,
    read_index,
    verify_checkpoint,
    write_manifest,
)
from mstar_mega.training.pieces import read_saved, read_shards

_TEMPORARY = re.compile(r"\..+\.(tmp|old)")

logger = logging.getLogger(__name__)


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are as they were. Raised on all ranks."""


def save_checkpoint(directory: Path, name: str, sharded_state: dict[str, Any], common: dict[str, Any]) -> Path:
    """Write ``directory/name`` and return its path. Collective.

    ``sharded_state`` is a tree of megatron sharded tensors (``training/optimizer_state.py``) and is consumed;
    ``common`` is JSON. Names in one directory must sort by age (numbers in them compare as numbers). An existing
    checkpoint of that name is replaced once the new one is complete.
    Raises :class:`CheckpointWriteError` on every rank when any rank fails, and then removes what was written.
    """

    size = _bytes_of(sharded_state)

    def write(temporary: Path) -> None:
        plain = _write_shards(temporary, sharded_state)
        together("write", on_main(lambda: write_plain_state(temporary, plain)))

    try:
        together("prepare", on_main(lambda: _remove_leftovers(directory)))
    except FailedTogether as error:
        raise CheckpointWriteError(f"checkpoint directory {directory} cannot be used ({error})") from error
    return write_checkpoint(directory / name, write, common, size)


def write_checkpoint(final: Path, write: Callable[[Path], None], common: dict[str, Any], size: int = 1) -> Path:
    """Let ``write`` fill a hidden directory, on every rank; checksum it and make it appear as ``final``. Collective.

    ``size``: about the bytes of this rank's largest file, to tell a full disk from other failures. ``write`` fails
    through :func:`together`. For the rest see :func:`save_checkpoint`.
    """
    directory, name = final.parent, final.name
    temporary = directory / f".{name}.tmp"

    def make_room() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    digests: dict[str, list[Any]] = {}
    try:
        together("prepare", on_main(make_room))
        with watch.computing(f"writing checkpoint {name}"):
            write(temporary)
        digests.update(digest_files(temporary, broadcast_object(files_in(temporary)), must_exist=True))
        together("finish", on_main(lambda: _finish(temporary, final, digests, common)))
    except FailedTogether as error:
        # torch's writer hides that the disk is full: a file as large as this rank's part tells.
        probes = together("probe", lambda: is_full(directory, size))
        full = ", ".join(f"rank {rank}" for rank, is_so in enumerate(probes) if is_so)
        cause = f"the disk is full for {full} ({free_bytes(directory):,} bytes are free)" if full else str(error)
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointWriteError(
            f"checkpoint {name!r} could not be written to {directory}: {cause}. "
            f"Earlier checkpoints are intact; {'free space' if full else 'correct the cause'}, then run the same "
            "command again"
        ) from error
    return final


def find_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints of a directory, newest (highest name) first; none when it does not exist."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(paths, key=lambda path: _natural(path.name), reverse=True)


def load_checkpoint(path: Path, template: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verify a checkpoint, then read what ``template`` asks for. Collective. Returns (state, common).

    ``template`` is a sharded state like the one saved, under any layout; parts of the checkpoint that it does not name
    are left alone, and its tensors are filled in place. Raises
    :class:`DamagedCheckpointError`, before any tensor is touched, when a file is missing, short or altered, and
    ValueError when the template does not fit the checkpoint.
    """
    common = verify_checkpoint(path)
    silence_normal_warnings()
    from megatron.core.dist_checkpointing.dict_utils import merge
    from megatron.core.dist_checkpointing.mapping import apply_factory_merges
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    def open_it() -> tuple[Index, dict[str, Any]]:
        return read_index(path), _read_plain_state(path)

    try:
        (index, plain), *_ = together("open", open_it)
    except FailedTogether as error:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {error}") from None
    try:
        with warnings.catch_warnings():
            # megatron-core 0.16 reads through names that torch 2.13 calls deprecated.
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
            # Not megatron's own entry: it would unpickle the index, and the layers' own states with all that they name.
            # Shapes and keys are checked by every rank's reader together.
            sharded, kept, factories = load_preprocess(template)
            merge(plain, kept)
            sharded, _ = extract_sharded_base(sharded)
            merge(plain, read_shards(path, index, sharded))
            state: dict[str, Any] = apply_factory_merges(plain, factories)
    except CheckpointException as error:
        # megatron appends every key of the checkpoint.
        reasons = sorted({str(failure[0]).partition(": [")[0] for failure in error.failures.values()})
        raise ValueError(f"checkpoint {path} does not fit this model: {'; '.join(reasons)}") from error
    return state, common


def _read_plain_state(path: Path) -> dict[str, Any]:
    with open_input(path / COMMON_STATE) as file:
        plain = read_saved(file, path / COMMON_STATE)
    if not isinstance(plain, dict):
        raise ValueError(f"{path / COMMON_STATE} holds a {type(plain).__name__}, not the state of a checkpoint")
    return plain


def load_latest(
    directory: Path, template_fn: Callable[[], dict[str, Any]], tidy: bool = True
) -> tuple[dict[str, Any], dict[str, Any], Path] | None:
    """The newest undamaged checkpoint as (state, common, path), or None. Collective.

    Each damaged one on the way is named in a warning. ``tidy``: leftovers of killed saves are removed; not where
    another job may be writing there.
    """
    if tidy and dist.get_rank() == 0:
        _remove_leftovers(directory)
    for path in broadcast_object(find_checkpoints(directory)):
        try:
            return *load_checkpoint(path, template_fn()), path
        except DamagedCheckpointError as error:
            if dist.get_rank() == 0:
                logger.warning("SKIPPED A DAMAGED CHECKPOINT: %s. Using the one before it", error)
    return None


def prune(directory: Path, keep: int, needed: Collection[str] = ()) -> None:
    """Delete all but the ``keep`` newest checkpoints and those named in ``needed``. Acts on global rank 0 only."""
    if keep < 1:
        raise ValueError(f"run.keep_checkpoints is {keep}; at least one checkpoint must be kept")
    if dist.get_rank() == 0:
        for path in [path for path in find_checkpoints(directory)[keep:] if path.name not in needed]:
            # Out of sight first: a deletion killed half-way must not look like a damaged checkpoint.
            doomed = path.with_name(f".{path.name}.old")
            path.rename(doomed)
            shutil.rmtree(doomed)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is never read, counted or deleted as one; returns where it is. Global rank 0 only.

    A damaged one that kept its name would, as the newest, make :func:`prune` delete good ones.
    """
    aside = path.with_name(f".{path.name}.set-aside")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def _write_shards(directory: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Write this rank's shards; returns the plain (unsharded) rest of the state.

    The format is megatron's own. Its writer is not: that one starts a manager process and forks for each file, which
    costs seconds and demands a ``__main__`` guard; torch's writes in this process.
    """
    silence_normal_warnings()
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import torch as megatron_format

    shards: dict[str, Any] = {}
    plain: dict[str, Any] = {}

    def translate() -> None:
        sharded, rest = save_preprocess(sharded_state, validate_access_integrity=False)
        by_key, _, _ = megatron_format._replace_state_dict_keys_with_sharded_keys(sharded, True)
        shards.update(megatron_format.mcore_to_pyt_state_dict(by_key))
        plain.update(rest)

    together("prepare", translate)
    planner = megatron_format.MCoreSavePlanner(flatten_state_dict=False)
    writer = _Writer(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        # The ranks agree on success inside.
        torch_dist_save(shards, storage_writer=writer, planner=planner)
    except CheckpointException as error:
        reasons = [f"rank {rank}, write: {failure[0]}" for rank, failure in sorted(error.failures.items())]
        raise FailedTogether("; ".join(reasons)) from error
    return plain


class _Writer(FileSystemWriter):
    """torch's, which also leaves our index."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        (Path(self.path) / INDEX).write_bytes(from_torch(metadata).to_json())


def write_plain_state(directory: Path, plain: dict[str, Any]) -> None:
    """The files that megatron keeps beside the shards: the unsharded rest of the state, and the format's name."""
    torch.save(plain, directory / COMMON_STATE)
    (directory / STAMP).write_text(json.dumps(STAMPED))


def _finish(temporary: Path, final: Path, files: dict[str, list[Any]], common: dict[str, Any]) -> None:
    """Write the manifest and make the checkpoint appear under its name, all of it on disk first."""
    write_manifest(temporary, files, common)
    for name in files_in(temporary):
        sync(temporary / name)
    sync(temporary)
    if final.exists():
        replaced = final.with_name(f".{final.name}.old")
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    sync(final.parent)


def _bytes_of(state: Any) -> int:
    """Bytes of the tensors in a tree of sharded tensors: about this rank's part of a checkpoint."""
    if isinstance(state, dict | list | tuple):
        return sum(map(_bytes_of, state.values() if isinstance(state, dict) else state))
    data = getattr(state, "data", None)
    return data.numel() * data.element_size() if isinstance(data, torch.Tensor) else 0


def _remove_leftovers(directory: Path) -> None:
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        return
    for old in [path for path in directory.iterdir() if path.is_dir() and path.name.endswith(".old")]:
        name = old.name[1:].removesuffix(".old")
        # Killed while a checkpoint was being replaced: its new form is whole, for the old one moves away after that.
        new = directory / f".{name}.tmp"
        if not (directory / name).exists() and (new / MANIFEST).exists():
            new.rename(directory / name)
    for path in directory.iterdir():
        if path.is_dir() and _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name) if part]
