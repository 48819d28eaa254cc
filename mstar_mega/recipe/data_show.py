"""``mstar data show``: one query of a training set as the policy sees it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from mstar_mega.config import Config
from mstar_mega.data.disk import DiskQueries
from mstar_mega.data.task import build
from mstar_mega.data.types import Query, Task
from mstar_mega.models.build import build_family
from mstar_mega.models.packing import Prompt
from mstar_mega.platform.terminal import one_line
from mstar_mega.recipe.data_check import open_any, usable_sets

AROUND = 6
"""Tokens shown before and after an image."""


def show(config: Config, id: str, out: str | None) -> str:
    """The text of ``mstar data show``: a query, the exact prompt, its token ids around the image.

    With ``out`` the tiles are written there. Raises ValueError where no set of the settings has such a query.
    """
    family = build_family(config)
    with tempfile.TemporaryDirectory() as work:
        task, note = _sets(config, Path(config.data.dir or work))
        split, query = find_query(task, id)
        prompt = family.prompt(query)
    decode = family.tokenizer.decode
    answer = query.answer if query.answer is not None else f"hidden ({query.hidden_answer})"
    of = f"of the {split} {'half' if note else 'set'} ({one_line(query.kind) or 'no type'})"
    lines = [
        *note,
        f"query {one_line(query.id)} {of}, gold answer {one_line(answer)}",
        *(f"image {one_line(image.path)} (digest {image.digest})" for image in query.images),
        f"prompt of {config.model.family} {config.model.size}: {len(prompt.tokens)} tokens, "
        f"{len(prompt.image_positions)} of them image features",
    ]
    for start, end in _runs(prompt):
        before, after = prompt.tokens[max(0, start - AROUND) : start], prompt.tokens[end : end + AROUND]
        lines.append(f"tokens around the image: {before} + {end - start} x {prompt.tokens[start]} + {after}")
    lines += ["text (an image feature is shown as ·, a control token by its id):", _text(prompt, decode)]
    if prompt.pixels is not None:
        where = "not written (--out TILES.png does)" if out is None else render_tiles(prompt, Path(out))
        lines.append(f"{prompt.pixels.size(0)} tiles of {tuple(prompt.pixels.shape[2:])} pixels: {where}")
    return "\n".join(lines)


def _sets(config: Config, work: Path) -> tuple[Task, list[str]]:
    """The sets to look for a query in (a file's warm-up queries are labelled ones), and a note if no job's."""
    if config.data.name != "mathv360k":
        return build(config.data, work, config.seed), []
    source, note = open_any(config.data, work)
    labelled, unlabelled, validation, test = usable_sets(source)
    return Task((), labelled, unlabelled, validation, test), note


def find_query(task: Task, id: str) -> tuple[str, Query]:
    """The set and the query of that id. Raises ValueError, with ids that there are, where no set has it."""
    sets = {name: getattr(task, name) for name in ("labelled", "unlabelled", "validation", "test")}
    for name, queries in sets.items():
        found = queries.find(id) if isinstance(queries, DiskQueries) else next((q for q in queries if q.id == id), None)
        if found is not None:
            return name, found
    for query, _ in task.warmup:
        if query.id == id:
            return "warm-up", query
    if isinstance(task.labelled, DiskQueries) and (why := task.labelled.source.why_not(id)):
        raise ValueError(f"the query {id!r} is in no set ({why})")
    some = ", ".join(queries[0].id for queries in sets.values() if len(queries))
    if not some:
        raise ValueError(f"no set has a query {id!r}: nothing is usable (`mstar data check` says why)")
    raise ValueError(f"no set has a query {id!r}; there are {some} and others")


def _runs(prompt: Prompt) -> Iterator[tuple[int, int]]:
    """[start, end) of every stretch of image features."""
    start = previous = None
    for position in prompt.image_positions:
        if start is None or previous is None or position != previous + 1:
            if start is not None and previous is not None:
                yield start, previous + 1
            start = position
        previous = position
    if start is not None and previous is not None:
        yield start, previous + 1


def _text(prompt: Prompt, decode: Callable[[list[int]], str]) -> str:
    """The prompt's text; tokens without a text of their own by their id."""
    images = set(prompt.image_positions)
    parts: list[str] = []
    run: list[int] = []
    for position, token in enumerate(prompt.tokens):
        if position in images or not decode([token]):
            parts += [decode(run), "·" if position in images else f"<{token}>"]
            run = []
        else:
            run.append(token)
    return "".join([*parts, decode(run)])


def render_tiles(prompt: Prompt, path: Path) -> Path:
    """Write the tiles side by side as one PNG, each colour channel stretched to its full range; returns ``path``."""
    assert prompt.pixels is not None
    x = prompt.pixels
    low, high = x.amin(dim=(0, 2, 3), keepdim=True), x.amax(dim=(0, 2, 3), keepdim=True)
    shown = ((x - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    count, height, width, _ = shown.shape
    sheet = Image.new("RGB", (count * (width + 2) - 2, height), (255, 255, 255))
    for i, tile in enumerate(shown):
        sheet.paste(Image.fromarray(tile), (i * (width + 2), 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path
