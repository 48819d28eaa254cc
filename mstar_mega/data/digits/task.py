"""The built-in task: sets of questions about handwritten digits, with their pictures on disk.

Problem i of a set depends on (seed, set, i) only, so a larger set begins with the smaller one.
"""

from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mstar_mega.config import DataConfig
from mstar_mega.data.digits.questions import Problem, draw_problem, draw_reading
from mstar_mega.data.digits.render import IMAGE_SIZE, Handwriting, render
from mstar_mega.data.types import ImageRef, Query, Task, image_digest
from mstar_mega.platform.inputs import read_object

MANIFEST = "manifest.json"
PARTS: dict[str, Handwriting] = {
    "warmup": "train", "train": "train", "unlabelled": "train", "validation": "validation", "test": "test",
}  # fmt: skip
"""The handwriting that each set is drawn in."""
READING_SHARE = 0.3
"""Of the warm-up's examples."""
FORMAT = 7
"""Raised whenever problems or pictures change, so that sets made before are made again."""


@dataclass(frozen=True)
class _Set:
    name: str
    part: Handwriting
    count: int


def _sets(config: DataConfig) -> list[_Set]:
    def given(name: str) -> int:
        count = getattr(config, name)
        if count is None:
            raise ValueError(f"data.{name} is null: the digits task has no end, give it a number")
        return int(count)

    counts = {
        "warmup": given("warmup_examples"),
        "train": given("labelled_queries"),
        "unlabelled": given("unlabelled_queries"),
        "validation": config.validation_queries,
        "test": config.test_queries,
    }
    sets = [_Set(name, PARTS[name], count) for name, count in counts.items()]
    for each in sets:
        if each.count < 0:
            raise ValueError(f"the digits task was asked for {each.count} {each.name} queries; use 0 or more")
    return sets


def problem(seed: int, name: str, part: Handwriting, index: int) -> Problem:
    """Problem ``index`` of the set called ``name``."""
    rng = random.Random(f"digits {seed} {name} {index}")
    if name == "warmup" and rng.random() < READING_SHARE:
        return draw_reading(rng, part)
    made = draw_problem(rng, part)
    while name == "warmup" and not made.is_solved:  # what is kept is what has reached its answer at the first try
        made = draw_problem(rng, part)
    return made


def build(config: DataConfig, dir: Path, seed: int) -> Task:
    """Make all sets and bring the pictures under ``dir`` up to date.

    Pictures that are there and whole are kept; missing, damaged or outdated ones are written again, each atomically, so
    a second call after an interrupted one completes the set, and calls at the same time do not disturb each other.

    Raises:
        ValueError: a set's size is negative.
        OSError: ``dir`` cannot be written.
    """
    sets = _sets(config)
    problems = {each.name: [problem(seed, each.name, each.part, i) for i in range(each.count)] for each in sets}
    named = {f"digits-{name}-{i:06d}": made for name, many in problems.items() for i, made in enumerate(many)}
    images = _write_images(named, dir, seed)

    def queries(name: str, hidden: bool = False) -> list[Query]:
        ids = [f"digits-{name}-{i:06d}" for i in range(len(problems[name]))]
        return [_query(id, named[id], images[id], hidden) for id in ids]

    chains = [made.chain_of_thought for made in problems["warmup"]]
    return Task(
        warmup=list(zip(queries("warmup"), chains, strict=True)),
        labelled=queries("train"),
        unlabelled=queries("unlabelled", hidden=True),
        validation=queries("validation"),
        test=queries("test"),
        check_reasoning=CheckReasoning(seed),
    )


@dataclass(frozen=True)
class CheckReasoning:
    """Whether a response is one of its query's right chains of thought, by the program that made the query."""

    seed: int

    def __call__(self, query_id: str, text: str) -> bool:
        """Whether the reasoning of a response is right. Raises KeyError for a query of another task."""
        _, name, index = query_id.split("-")
        return text.strip() in _right_chains(self.seed, name, int(index))


@lru_cache(maxsize=8192)
def _right_chains(seed: int, name: str, index: int) -> frozenset[str]:
    return problem(seed, name, PARTS[name], index).right_chains()


def _query(id: str, made: Problem, image: ImageRef, hidden: bool) -> Query:
    return Query(
        id=id,
        question=made.question,
        images=(image,),
        answer=None if hidden else made.answer,
        choices=made.choices,
        kind=made.kind,
        hidden_answer=made.answer if hidden else None,
    )


def _write_images(problems: dict[str, Problem], dir: Path, seed: int) -> dict[str, ImageRef]:
    """Bring ``dir/images`` and the manifest up to date; returns each problem's picture."""
    folder = dir / "images"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"task": "digits", "format": FORMAT, "seed": seed, "image_size": IMAGE_SIZE}
    known = _known_digests(dir / MANIFEST, settings)
    digests: dict[str, str] = {}
    for id, made in problems.items():
        path = folder / f"{id}.png"
        whole = known.get(id)
        if whole is None or whole != _file_digest(path):
            data = render(made.scene)
            whole = image_digest(data)
            _write(path, data)
        digests[id] = whole
    if {**known, **digests} != known:
        # The pictures of larger sets made before stay listed: they are as good as when they were written.
        manifest = {"settings": settings, "images": {**known, **digests}}
        _write(dir / MANIFEST, json.dumps(manifest, indent=0).encode())
    return {id: ImageRef(str(folder / f"{id}.png"), value) for id, value in digests.items()}


def _known_digests(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Digest by id of the pictures that the manifest lists; none if it is missing, damaged or of other settings.

    Raises FileExistsError for another program's file of that name, which would be written over.
    """
    try:
        manifest = read_object(path)
        if not manifest.keys() & {"settings", "images"}:
            raise FileExistsError(errno.EEXIST, "it is another program's file: choose another data.dir", str(path))
        if manifest["settings"] != settings:
            return {}
        return {str(id): str(value) for id, value in manifest["images"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _file_digest(path: Path) -> str | None:
    try:
        return image_digest(path.read_bytes())
    except FileNotFoundError:
        return None


def _write(path: Path, data: bytes) -> None:
    """Atomic: a reader sees the old file or the whole new one. None is forced to the disk, for they are thousands: what
    a power cut spoils differs from its digest and is written again."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:  # never through a link that somebody has put there
            file.write(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
