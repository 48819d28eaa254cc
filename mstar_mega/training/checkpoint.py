"""Sharded checkpoints that are complete or absent, checked before they are believed, and independent of the layout.

A checkpoint is a directory in megatron-core's ``torch_dist`` format, which every tensor x pipeline layout loads, with a
``manifest.json`` beside the shards: size and SHA-256 of every file, and the caller's small JSON state. It is written
under a hidden name and renamed when every rank has finished, so a killed or failed save leaves nothing that looks good.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
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

from mstar_mega.platform.distributed import broadcast_object
from mstar_mega.platform.files import free_bytes, is_full, sha256_file
from mstar_mega.platform.quiet import silence_normal_warnings

MANIFEST = "manifest.json"
FORMAT = 1
_TEMPORARY = re.compile(r"\..+\.(tmp|old)")

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

logger = logging.getLogger(__name__)


class DamagedCheckpointError(ValueError):
    """A checkpoint's files are not what its manifest says, or the manifest itself cannot be read."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are as they were. Raised on all ranks."""


def sharded_training_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """The sharded state of a megatron model and its plain (not distributed) optimizer, to save or as load template."""
    has_step = ensure_adam_state(optimizer)
    weights = model.sharded_state_dict()
    states = optimizer.sharded_state_dict(weights)
    if has_step:
        # megatron leaves out a step of zero, without which torch's Adam cannot be loaded.
        states.get("optimizer", states)["state"].setdefault("common_step", torch.tensor(0.0, device="cpu"))
    return {"model": weights, "optimizer": states}


def restore_training_state(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Take over what :func:`load_checkpoint` returned for a :func:`sharded_training_state` template."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def ensure_adam_state(optimizer: Any) -> bool:
    """Give every parameter its Adam moments now, as the first step would: an empty state cannot be resharded.

    True when the optimizer counts steps per parameter (torch's own Adam; fused ones count per group).
    """
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    adam = part.optimizer
    has_step = isinstance(adam, torch.optim.Adam)
    for parameter in [p for group in adam.param_groups for p in group["params"]]:
        state = adam.state[parameter]
        if not state:
            if has_step:
                state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"] = torch.zeros_like(parameter.data)
            state["exp_avg_sq"] = torch.zeros_like(parameter.data)
    return has_step


def save_checkpoint(directory: Path, name: str, sharded_state: dict[str, Any], common: dict[str, Any]) -> Path:
    """Write ``directory/name`` and return its path. Collective.

    ``sharded_state`` is a tree of megatron sharded tensors (see :func:`sharded_training_state`) and is consumed;
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
        write(temporary)
        digests.update(_digest_files(temporary, broadcast_object(_files_in(temporary))))
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
    from megatron.core import dist_checkpointing

    try:
        with warnings.catch_warnings():
            # megatron-core 0.16 reads through names that torch 2.13 calls deprecated.
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
            # The access check raises on rank 0 alone; shapes and keys are checked by every rank's reader together.
            state = dist_checkpointing.load(template, str(path), validate_access_integrity=False)
    except CheckpointException as error:
        # megatron appends every key of the checkpoint.
        reasons = sorted({str(failure[0]).partition(": [")[0] for failure in error.failures.values()})
        raise ValueError(f"checkpoint {path} does not fit this model: {'; '.join(reasons)}") from error
    return state, common


def load_latest(
    directory: Path, template_fn: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any], Path] | None:
    """The newest undamaged checkpoint as (state, common, path), or None. Collective.

    Each damaged one on the way is named in a warning. Leftovers of killed saves are removed.
    """
    if dist.get_rank() == 0:
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


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every file with the manifest, the work shared by all ranks. Collective. Returns the common state.

    Raises :class:`DamagedCheckpointError` on every rank.
    """
    manifest, problem = broadcast_object(read_manifest(path) if dist.get_rank() == 0 else ({}, ""))
    if not problem:
        try:
            found = _digest_files(path, sorted(manifest["files"]))
            problem = _first_difference(path, manifest["files"], found)
        except FailedTogether as error:
            problem = str(error)
    if not problem:
        problem = broadcast_object(_index_problem(path) if dist.get_rank() == 0 else "")
    if problem:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {problem}")
    common: dict[str, Any] = manifest["common"]
    return common


class FailedTogether(Exception):
    """Some rank failed; all ranks raise this with the same text."""


def together(what: str, action: Callable[[], Any]) -> list[Any]:
    """Run ``action`` on every rank and gather the results; when any rank raised, all raise. Collective."""
    result, failure, cause = None, "", None
    try:
        result = action()
    except Exception as error:
        failure, cause = f"{what}: {type(error).__name__}: {error}", error
    outcomes: list[Any] = [(result, failure)]
    if dist.get_world_size() > 1:
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (result, failure))
    failures = [f"rank {rank}, {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if failures:
        raise FailedTogether("; ".join(failures)) from cause
    return [result for result, _ in outcomes]


def on_main(action: Callable[[], None]) -> Callable[[], None]:
    """``action`` on global rank 0, nothing elsewhere."""
    return action if dist.get_rank() == 0 else lambda: None


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
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        # The ranks agree on success inside.
        torch_dist_save(shards, storage_writer=writer, planner=planner)
    except CheckpointException as error:
        reasons = [f"rank {rank}, write: {failure[0]}" for rank, failure in sorted(error.failures.items())]
        raise FailedTogether("; ".join(reasons)) from error
    return plain


def write_plain_state(directory: Path, plain: dict[str, Any]) -> None:
    """The files that megatron keeps beside the shards: the unsharded rest of the state, and the format's name."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

    torch.save(plain, directory / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def _finish(temporary: Path, final: Path, files: dict[str, list[Any]], common: dict[str, Any]) -> None:
    """Write the manifest and make the checkpoint appear under its name, all of it on disk first."""
    body = {"format": FORMAT, "common": common, "files": files}
    text = json.dumps({**body, "sha256": _canonical_digest(body)}, indent=1)
    (temporary / MANIFEST).write_text(text, encoding="utf-8")
    for name in _files_in(temporary):
        _fsync(temporary / name)
    _fsync(temporary)
    if final.exists():
        replaced = final.with_name(f".{final.name}.old")
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    _fsync(final.parent)


def _bytes_of(state: Any) -> int:
    """Bytes of the tensors in a tree of sharded tensors: about this rank's part of a checkpoint."""
    if isinstance(state, dict | list | tuple):
        return sum(map(_bytes_of, state.values() if isinstance(state, dict) else state))
    data = getattr(state, "data", None)
    return data.numel() * data.element_size() if isinstance(data, torch.Tensor) else 0


def _files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _digest_files(directory: Path, names: list[str]) -> dict[str, list[Any]]:
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(directory: Path) -> None:
    if not directory.is_dir():
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
