"""The training sets by name: the one place that lists them. Everything else sees a :class:`Task`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mstar_mega.config import DataConfig
from mstar_mega.data import disk, easy_vqa
from mstar_mega.data.digits import task as digits
from mstar_mega.data.prompts import template_of
from mstar_mega.data.screen import screen_task
from mstar_mega.data.types import Task
from mstar_mega.data.written_out import bare_answer, with_written_out
from mstar_mega.functions import is_path, load

Builder = Callable[[DataConfig, Path, int], Task]


def build(config: DataConfig, dir: Path, seed: int) -> Task:
    """The queries of the settings' training set. ``dir`` is where it may write pictures and indices.

    Raises ValueError where the set cannot be used as the settings say, OSError where ``dir`` cannot be written.
    """
    if not is_path(config.name):
        return BUILDERS[config.name](config, dir, seed)
    task = load("data.name", config.name)(config, dir, seed)
    if not isinstance(task, Task):
        raise ValueError(f"data.name {config.name} returned {type(task).__name__}: it must return a Task")
    return _in_memory(config, task)


def _digits(config: DataConfig, dir: Path, seed: int) -> Task:
    return _in_memory(config, digits.build(config, dir, seed))


def _easy_vqa(config: DataConfig, dir: Path, seed: int) -> Task:
    return _in_memory(config, easy_vqa.build(config, dir, seed))


def _in_memory(config: DataConfig, task: Task) -> Task:
    task = screen_task(task)
    if config.warmup_answers:
        labelled = task.labelled[: config.warmup_examples]
        return replace(task, warmup=[(query, bare_answer(query.answer or "")) for query in labelled])
    if not config.warmup_file:
        return task
    path = disk.existing(config.warmup_file, "data.warmup_file")
    # A task of the user's own brings its questions ready: all that is asked of a response is the marker.
    name = config.template or (config.name if config.name in BUILDERS else "mathv360k")
    return with_written_out(task, path, template_of(name), config.warmup_examples)


BUILDERS: dict[str, Builder] = {"digits": _digits, "mathv360k": disk.build, "easy_vqa": _easy_vqa}
"""``data.name`` -> what makes its task."""
