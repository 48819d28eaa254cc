"""What a job does before its first stage: take the run directory for itself, check its settings, find its queries."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch.distributed as dist
from pydantic import BaseModel, TypeAdapter

from mstar_mega import functions, settings
from mstar_mega.config import Config
from mstar_mega.data import disk
from mstar_mega.data.index import file_mark
from mstar_mega.data.lengths import without_too_long
from mstar_mega.data.splits import LEFT_OVER
from mstar_mega.data.task import build
from mstar_mega.data.types import Skipped, Task
from mstar_mega.models.families.base import Family
from mstar_mega.platform import watch
from mstar_mega.platform.distributed import broadcast_object
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.platform.holder import Hold, take
from mstar_mega.platform.inputs import checked, read_object, refuse_links_out
from mstar_mega.rewards.selection import CEILING, require_check

FILES_FILE = "files.json"
"""Size and SHA-256 of the files that the run is trained on, by setting."""
LOCK_FILE = ".lock"
_AFTER_REQUEUE_S = 300.0
SHOWN = 6
"""So many changed settings are named; where there are more, a forgotten --config is behind them."""
_WRITTEN = "a job would write there. A run lies in one directory, which may be a link itself; data.dir may be elsewhere"
REASONS = 3
"""So many reasons are given for a set that nothing is left of."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


def on_main(is_main: bool, action: Callable[[], T]) -> T:
    """Rank 0's result of ``action``, on every rank; its ValueError or OSError is raised on all of them. Collective."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main:
        try:
            with watch.computing("working for all ranks"):
                outcome = (action(), None)
        except (ValueError, OSError) as error:
            outcome = (None, error)
    result, problem = broadcast_object(outcome)
    if problem is not None:
        raise problem
    received: T = result
    return received


class _Mark(BaseModel):
    """What a file was when the run was started with it."""

    size: int
    sha256: str


_MARKS = TypeAdapter(dict[str, _Mark])


@contextmanager
def run_directory(config: Config, is_main: bool, trains: bool = True) -> Iterator[Path]:
    """The run directory, made or checked, and held against other jobs while the context lasts. Collective.

    ``trains``: the job goes on with the run, so its settings must be the run's, and are noted; a job that only looks at
    the policy may have others, and where the directory may not be written to it works in a folder beside it, for the
    time being, that shows its checkpoints. Raises ValueError, on every rank, when the directory cannot be used, is in
    use, or was made with other settings.
    """
    directory = Path(config.run.dir)
    hold: Hold | None = None

    view: Path | None = None

    def take() -> Path | None:
        nonlocal hold, view
        if directory.is_dir():
            refuse_links_out(directory, _WRITTEN)
        try:
            hold = _take(config, directory, trains)
        except PermissionError as error:
            if trains:
                raise ValueError(_unusable(directory, error)) from error
            view = _view_of(directory)
        return view

    try:
        directory = on_main(is_main, take) or directory
        check_shared("run.dir", directory, writes=True)
        yield directory
    finally:
        if hold is not None:
            hold.release()
        if view is not None:
            shutil.rmtree(view, ignore_errors=True)


def _unusable(directory: Path, error: OSError) -> str:
    why = "it is a file, not a folder" if isinstance(error, FileExistsError) else error.strerror
    return f"run.dir {directory} cannot be used: {why}. Choose another --run.dir"


def _view_of(directory: Path) -> Path:
    """A folder that can be written to, with a run's settings and links to what is only read."""
    view = Path(tempfile.mkdtemp(prefix="mstar-look-"))
    shutil.copyfile(directory / settings.CONFIG_FILE, view / settings.CONFIG_FILE)
    (view / "checkpoints").symlink_to((directory / "checkpoints").resolve())
    logger.warning("%s cannot be written to: it is looked at, and what is sampled is not kept", directory)
    return view


def check_shared(name: str, path: Path, writes: bool = False, holds: str = "") -> None:
    """Raise ValueError, on every rank, where a rank does not see what rank 0 has at the path of a setting. Collective.

    A file is known by its size; a folder by the file in it that ``holds`` names, or by a mark inside it, which rank 0
    leaves for the moment where it may write (``writes``), and otherwise by being there.
    """
    if dist.get_world_size() == 1:
        return
    mark = f".seen.{uuid4().hex}.tmp"

    def show() -> tuple[str, int | None] | None:
        if (path / holds).is_file():
            return holds, (path / holds).stat().st_size
        if writes and path.is_dir():
            with contextlib.suppress(PermissionError):
                (path / mark).touch()
                return mark, None
        return ("", None) if path.exists() else None

    is_main = dist.get_rank() == 0
    shown = on_main(is_main, show)
    seen: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(seen, (shown is None or _sees(path / shown[0], shown[1]), socket.gethostname()))
    finally:
        if is_main and shown is not None and shown[0] == mark:
            (path / mark).unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}" for rank, (found, host) in enumerate(seen) if not found]
    if blind:
        more = f" and {len(blind) - SHOWN} more" if len(blind) > SHOWN else ""
        raise ValueError(
            f"{name} {path} is not the same for every rank: {', '.join(blind[:SHOWN])}{more} cannot see what rank 0 on "
            f"{seen[0][1]} has there. Give a path on a file system that all nodes share"
        )


def _sees(path: Path, size: int | None) -> bool:
    """Whether a path is there, of that size if it is a file; network file systems may take a moment."""
    for wait in (0.0, 0.1, 0.4, 1.0):
        time.sleep(wait)
        with contextlib.suppress(OSError):
            if path.exists() and (size is None or path.stat().st_size == size):
                return True
    return False


def _take(config: Config, directory: Path, trains: bool) -> Hold:
    patience = config.run.wait_seconds
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":  # the start before may still be on its way out
        patience = max(patience, _AFTER_REQUEUE_S)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        hold = take(directory / LOCK_FILE, config.run.stale_seconds, patience, logger.warning)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise PermissionError(error.errno, error.strerror) from error
        raise ValueError(_unusable(directory, error)) from error
    try:
        if trains:
            _check_settings(config, directory)
        _remove_leftovers(directory)
    except BaseException:
        hold.release()
        raise
    return hold


def _check_settings(config: Config, directory: Path) -> None:
    path = directory / settings.CONFIG_FILE
    if path.exists():
        changed = settings.differences(settings.load(path), config)
        if not changed:
            return
        if not config.run.allow_changed_settings:
            others = f"; and {len(changed) - SHOWN} others" if len(changed) > SHOWN else ""
            raise ValueError(
                f"{directory} was made with other settings: {'; '.join(changed[:SHOWN])}{others}. Go on with its own "
                f"by --config {path}, use another --run.dir, or continue with the new ones by "
                "--run.allow_changed_settings true (finished work stays as it is)"
            )
        logger.warning(
            "%s goes on with other settings: %s. What is finished stays as it is: a finished stage trains nothing "
            "more, whatever the settings ask for; use another --run.dir to have it anew",
            directory,
            "; ".join(changed),
        )
    write_text_atomic(path, settings.dump(config))


def _remove_leftovers(directory: Path) -> None:
    """Half-written files of killed processes: nothing reads them, and nobody else is writing now."""
    for path in directory.rglob(".*.tmp"):
        if path.is_file() and not path.name.startswith(f".{LOCK_FILE}"):
            path.unlink()


@contextmanager
def same_files(config: Config, directory: Path) -> Iterator[None]:
    """The run is trained on the files that it was started with, and by the same functions of the user's; noted at the
    end, if the context ends well.

    Names and times do not matter. Raises ValueError, at once, naming a file whose bytes are others.
    """
    now = disk.file_marks(config.data, data_directory(config, directory))
    now |= {name: file_mark(path) for name, path in functions.source_files(config).items()}
    path = directory / FILES_FILE
    try:
        found = checked(_MARKS, read_object(path), path) if path.exists() else {}
    except ValueError:
        raise ValueError(f"{path} is damaged: delete it if the training files are those of the run's start") from None
    before = {name: mark.model_dump() for name, mark in found.items()}
    changed = [name for name, mark in now.items() if name in before and before[name] != mark]
    if changed and not config.run.allow_changed_settings:
        name, was, is_ = changed[0], before[changed[0]], now[changed[0]]
        group, _, field = name.partition(".")
        difference = (
            f"{was['size']} bytes then, {is_['size']} now"
            if was["size"] != is_["size"]
            else f"the same size, but SHA-256 {was['sha256'][:12]}... then, {is_['sha256'][:12]}... now"
        )
        raise ValueError(
            f"{name} {getattr(getattr(config, group), field)} is not the file that {directory} was started with "
            f"({difference}): restore it, or use another --run.dir"
        )
    yield
    if {**before, **now} != before:
        write_text_atomic(path, json.dumps({**before, **now}, indent=1) + "\n")


def shared_data(config: Config) -> dict[str, Path]:
    """What every rank reads besides the run directory, by setting."""
    data = config.data
    files = {"data.path": data.path, "data.images": data.images} if data.name == "mathv360k" else {}
    files |= {"data.dir": data.dir, "data.warmup_file": data.warmup_file, "prm.checkpoint": config.prm.checkpoint}
    return {name: Path(path) for name, path in files.items() if path}


def data_directory(config: Config, directory: Path) -> Path:
    """Where pictures that are made and indices lie."""
    return Path(config.data.dir) if config.data.dir else directory / "data"


def build_task(config: Config, directory: Path, family: Family, warms_up: bool = True) -> Task:
    """The queries of all sets that the policy can read. Raises ValueError where a needed set has none of them."""
    task = build(config.data, data_directory(config, directory), config.seed)
    task = without_too_long(task, family, config, family.language.context)
    if config.selection.rule == CEILING:
        require_check(task.check_reasoning)
    needed: dict[str, Sequence[object]] = {"labelled": task.labelled, "validation": task.validation, "test": task.test}
    if warms_up:
        needed = {"warm-up": task.warmup, **needed}
    if config.prompts.unlabelled != "none":
        needed["unlabelled"] = task.unlabelled
    for name, queries in needed.items():
        if not queries:
            reasons = _reasons(task.skipped, name, config.data.warmup_file) or "it is empty"
            raise ValueError(f"no query of the {name} set can be used ({reasons})")
    return task


def _reasons(skipped: Sequence[Skipped], name: str, warmup_file: str | None) -> str:
    """Why a set's queries are left out, the first reasons in full; of a set without its own, those of its file."""
    unusable = [each for each in skipped if not each.reason.startswith(f"{LEFT_OVER}:")]
    if name == "warm-up" and warmup_file:
        ours = [each for each in unusable if each.where == warmup_file]
    else:
        of_others = [each for each in unusable if each.where != warmup_file]
        ours = [each for each in of_others if each.what.endswith(f" {name} set")] or of_others
    reasons = list(dict.fromkeys(f"{each.where}: {each.reason}" for each in ours))
    more = f"; and {len(reasons) - REASONS} more reasons" if len(reasons) > REASONS else ""
    return "; ".join(reasons[:REASONS]) + more
