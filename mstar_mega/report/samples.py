"""The sample queries of the report's browser: a fixed few per iteration, with their images and all their responses."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mstar_mega.config import ReportConfig
from mstar_mega.data.pictures import PictureReading
from mstar_mega.data.records import SELECTED, DamagedFileError, read_groups, read_selected
from mstar_mega.data.types import Group, ImageRef, Response
from mstar_mega.report.images import Shown, shown_picture
from mstar_mega.report.run import Run

MOST_SAMPLES = 1000
"""Queries of an iteration, whatever the settings say."""
_LOST_NAMED = 3
"""Images that cannot be shown are named, so many of them; the rest is counted."""
MOST_BYTES = 2_200_000
"""Characters of all samples together, images included; what does not fit is left out and counted."""


@dataclass
class Samples:
    """What the browser shows, ready for JSON."""

    iterations: list[dict[str, Any]] = field(default_factory=list)
    """{"iteration": n, "queries": [query]} in order; see :func:`query_data`."""
    images: dict[str, str] = field(default_factory=dict)
    """Image digest -> data URL."""
    notes: dict[str, str] = field(default_factory=dict)
    """Image digest -> how the policy's picture is not the file as it lies."""
    left_out: int = 0
    problems: list[str] = field(default_factory=list)


def collect_samples(run: Run) -> Samples:
    """Sample ``report.samples_per_iteration`` queries of each iteration that has rollouts on disk.

    The choice depends on the files alone. Damaged blocks and images are named in ``problems``.
    """
    wanted = run.setting("report", "samples_per_iteration")
    if not isinstance(wanted, int) or not 0 <= wanted <= MOST_SAMPLES:
        wanted = ReportConfig().samples_per_iteration
    samples = Samples()
    reading = PictureReading.of_settings(run.setting("data"))
    chosen: dict[int, list[Group]] = {}
    selected = {event.get("iteration") for event in run.events if event.get("event") == "selection"}
    for directory in sorted((run.directory / "rollouts").glob("iteration_*")):
        match = re.fullmatch(r"iteration_(\d+)", directory.name)
        if match is not None:
            iteration = int(match[1])
            chosen[iteration] = choose_groups(directory, iteration, wanted, samples.problems)
            if iteration in selected and not (directory / SELECTED).exists():
                missing = "is missing: which responses were selected cannot be shown"
                samples.problems.append(f"{directory / SELECTED} {missing}")
    queries: dict[int, list[dict[str, Any]]] = {iteration: [] for iteration in sorted(chosen)}
    lost: dict[str, str] = {}
    size = 0
    # One query of each iteration after the other, so that a full page still has every iteration.
    for row in zip_longest(*(chosen[iteration] for iteration in queries)):
        for iteration, group in zip(queries, row, strict=True):
            if group is None:
                continue
            new = _load_images(group, run, samples, lost, reading)
            data = query_data(group)
            pictures = sum(len(shown.url) + len(shown.note) for shown in new.values())
            needed = len(json.dumps(data, ensure_ascii=False)) + pictures
            if size + needed > MOST_BYTES:
                samples.left_out += 1
                continue
            size += needed
            samples.images |= {digest: shown.url for digest, shown in new.items()}
            samples.notes |= {digest: shown.note for digest, shown in new.items() if shown.note}
            queries[iteration].append(data)
    more = len(lost) - _LOST_NAMED
    samples.problems += [
        *list(lost.values())[:_LOST_NAMED],
        *([f"{more} further images are not shown"] if more > 0 else []),
    ]
    samples.iterations = [{"iteration": i, "queries": those} for i, those in queries.items() if those]
    return samples


def choose_groups(directory: Path, iteration: int, wanted: int, problems: list[str]) -> list[Group]:
    """A fixed choice of an iteration's groups. Of many blocks only ``wanted``, evenly spread, are read."""
    blocks = sorted(directory.glob("block_*.jsonl"))
    if len(blocks) > wanted:
        blocks = [blocks[i * len(blocks) // wanted] for i in range(wanted)]
    groups: list[Group] = []
    for block in blocks:
        try:
            groups += read_groups(block)
        except (ValueError, OSError) as error:
            problems.append(str(error) if str(block) in str(error) else f"{block}: {error}")
    _mark_selected(groups, directory, problems)
    groups.sort(key=lambda group: hashlib.sha256(f"{iteration}:{group.query.id}".encode()).digest())
    return groups[:wanted]


def _mark_selected(groups: list[Group], directory: Path, problems: list[str]) -> None:
    try:
        selected = read_selected(directory, {group.query.id for group in groups})
    except DamagedFileError as error:
        problems.append(str(error))
        return
    for group in groups:
        for response in group.responses:
            response.selected = response.index in selected.get(group.query.id, ())


def query_data(group: Group) -> dict[str, Any]:
    """A group as the browser reads it: the query's fields, and its responses, the best process score first."""
    query = group.query
    order = sorted(group.responses, key=lambda r: (-(-1.0 if r.score is None else r.score), r.index))
    return {
        "id": query.id,
        "kind": query.kind,
        "question": query.question,
        "answer": query.answer,
        "hidden": query.hidden_answer,
        "images": [image.digest for image in query.images],
        "responses": [_response_data(response) for response in order],
    }


def _response_data(response: Response) -> dict[str, Any]:
    return {
        "index": response.index,
        "answer": response.answer,
        "correct": response.correct,
        "score": _finite(response.score),
        "selected": response.selected,
        "truncated": response.truncated,
        "tokens": len(response.tokens),
        "steps": len(response.steps),
        "pieces": pieces(response),
    }


def pieces(response: Response) -> list[list[Any]]:
    """The whole text in order as [text, is a step, score, label]; what no step covers comes as pieces of its own."""
    found: list[list[Any]] = []
    position = 0
    for step in response.steps:
        text = step.text.strip()
        at = response.text.find(text, position)
        if at >= 0:
            found.append([response.text[position:at].strip(), False, None, None])
            position = at + len(text)
        found.append([text, True, _finite(step.score), _finite(step.label)])
    found.append([response.text[position:].strip(), False, None, None])
    return [piece for piece in found if piece[0] or piece[1]]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _load_images(
    group: Group, run: Run, samples: Samples, lost: dict[str, str], reading: PictureReading
) -> dict[str, Shown]:
    """Those of a group's images that the page does not have yet; why one cannot be shown is added to ``lost``."""
    shown = {}
    for image in group.query.images:
        if image.digest in samples.images:
            continue
        try:
            shown[image.digest] = shown_picture(replace(image, path=str(place_of(image, run))), reading)
        except (OSError, ValueError) as error:
            lost[image.digest] = f"image {image.path} of query {group.query.id} is not shown: {error}"
    return shown


def place_of(image: ImageRef, run: Run) -> Path:
    """Where an image lies now: the run may have been moved since, or begun in another working directory."""
    path, recorded = Path(image.path), run.setting("run", "dir")
    if isinstance(recorded, str) and recorded and path.is_relative_to(recorded):
        return run.directory / path.relative_to(recorded)
    return path if path.exists() else run.directory / path
