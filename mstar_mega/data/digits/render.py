"""Scenes of handwritten digits and their pictures.

The handwriting is scikit-learn's copy of the UCI optical-recognition set: 1,797 pictures of 8 x 8 pixels. It is split
by picture into training, validation and test handwriting, once and for all: the split depends on no run seed, so that
the test handwriting of one run is never the training handwriting of another.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

Layout = Literal["row", "column", "grid", "scattered"]
Handwriting = Literal["train", "validation", "test"]

LAYOUTS: tuple[Layout, ...] = ("row", "column", "grid", "scattered")
IMAGE_SIZE = 48
"""Height and width of every picture, in pixels."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 80, 70),
    "green": (70, 220, 90),
    "blue": (95, 140, 255),
    "yellow": (250, 225, 70),
    "white": (245, 245, 245),
}
HANDWRITING_SHARES: tuple[tuple[Handwriting, float], ...] = (("train", 0.7), ("validation", 0.1), ("test", 0.2))
VALUES = range(6)
"""The digits that occur: a model of half a million parameters learns to read and to add them in minutes."""
CELLS = 3
"""Each digit lies in one cell of a ``CELLS`` x ``CELLS`` grid, as large as what one image token covers: digits at any
place, across the tokens' borders, take a small model many times as many steps to read."""
CELL = IMAGE_SIZE // CELLS
JITTER = 1


@dataclass(frozen=True)
class Digit:
    """One handwritten digit in a picture."""

    value: int
    colour: str
    source: int
    """Index of the picture in scikit-learn's set."""
    x: int
    y: int
    """Upper left corner, in pixels."""
    size: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``digits`` are in reading order: row by row, left to right."""

    layout: Layout
    background: tuple[int, int, int]
    digits: tuple[Digit, ...]

    @property
    def values(self) -> list[int]:
        return [digit.value for digit in self.digits]


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, tuple[int, ...]]:
    """Pictures (1797, 8, 8) uint8 with values 0..255, and their labels. Imports scikit-learn on first use."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = np.rint(data.images * (255.0 / 16.0)).astype(np.uint8)
    return pictures, tuple(int(label) for label in data.target)


@lru_cache(maxsize=1)
def handwriting_split() -> dict[Handwriting, tuple[int, ...]]:
    """Indices into scikit-learn's set by part; no picture is in two."""
    labels = _handwriting()[1]
    count = len(labels)
    order = list(range(count))
    random.Random("mstar-mega handwriting").shuffle(order)
    parts: dict[Handwriting, tuple[int, ...]] = {}
    start, share_so_far = 0, 0.0
    for name, share in HANDWRITING_SHARES:
        share_so_far += share
        end = round(count * share_so_far)
        parts[name] = tuple(i for i in order[start:end] if labels[i] in VALUES)
        start = end
    return parts


def draw_scene(rng: random.Random, part: Handwriting, layout: Layout, count: int) -> Scene:
    """A random scene of ``count`` digits in the handwriting of ``part``: 4 in a grid, up to 3 in a line, else 9."""
    assert count in {"row": (1, 2, 3), "column": (1, 2, 3), "grid": (4,), "scattered": range(1, 10)}[layout]
    labels = _handwriting()[1]
    pool = handwriting_split()[part]
    names = list(COLOURS)
    colours = [rng.choice(names)] * count if rng.random() < 0.5 else [rng.choice(names) for _ in range(count)]
    places = _place(rng, layout, count)
    digits = []
    for (x, y, size), colour in zip(places, colours, strict=True):
        source = rng.choice(pool)
        digits.append(Digit(labels[source], colour, source, x, y, size))
    background = (rng.randrange(50), rng.randrange(50), rng.randrange(60))
    return Scene(layout, background, tuple(digits))


def _place(rng: random.Random, layout: Layout, count: int) -> list[tuple[int, int, int]]:
    """Corners and sizes of ``count`` digits in reading order: each near the middle of a cell of its own."""
    size = rng.randint(12, 16)
    places = []
    for row, column in _cells(rng, layout, count):
        own = size if layout != "scattered" else rng.randint(12, 16)
        slack = CELL - own
        x, y = (cell * CELL + slack // 2 + rng.randint(-JITTER, JITTER) for cell in (column, row))
        places.append((min(max(x, 0), IMAGE_SIZE - own), min(max(y, 0), IMAGE_SIZE - own), own))
    return places


def _cells(rng: random.Random, layout: Layout, count: int) -> list[tuple[int, int]]:
    """Rows and columns of the digits' cells in reading order."""

    def some(wanted: int) -> list[int]:
        return sorted(rng.sample(range(CELLS), wanted))

    if layout == "row":
        row = rng.randrange(CELLS)
        return [(row, column) for column in some(count)]
    if layout == "column":
        column = rng.randrange(CELLS)
        return [(row, column) for row in some(count)]
    if layout == "grid":
        rows, columns = some(2), some(2)
        return [(row, column) for row in rows for column in columns]
    return [divmod(cell, CELLS) for cell in sorted(rng.sample(range(CELLS * CELLS), count))]


def render(scene: Scene) -> bytes:
    """PNG bytes of the scene: RGB, ``IMAGE_SIZE`` squared."""
    pictures = _handwriting()[0]
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), scene.background)
    for digit in scene.digits:
        ink = Image.fromarray(pictures[digit.source]).resize((digit.size, digit.size), Image.Resampling.BICUBIC)
        canvas.paste(COLOURS[digit.colour], (digit.x, digit.y), ink)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
