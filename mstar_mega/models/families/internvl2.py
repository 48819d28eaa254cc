"""InternVL2: everything that is particular to this policy family.

Source: OpenGVLab/InternVL2-2B (config and remote code) for the architecture, tiling and template.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mstar_mega.data.tokenizer import SentencePieceTokenizer
from mstar_mega.data.types import ImageRef, Query
from mstar_mega.models.lmm import LanguageSize, VisionSize
from mstar_mega.models.packing import Prompt

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Size:
    """A named size of the family."""

    vision: VisionSize
    language: LanguageSize
    tokenizer: str
    """Path of the sentencepiece model."""
    max_tiles: int = 12
    """Most tiles per image, the thumbnail not counted."""
    system: str = ""
    """System message; empty: no system turn."""


DIGITS_TOKENIZER = str(Path(__file__).parents[2] / "data" / "digits" / "tokenizer.model")

SIZES = {
    "digits": Size(
        vision=VisionSize(image_size=48, patch_size=8, hidden=64, ffn=128, layers=2, heads=4),
        language=LanguageSize(
            hidden=96, ffn=192, layers=4, heads=4, kv_heads=2, head_dim=24, vocab=0, rope_theta=10_000.0, init_std=0.08
        ),
        tokenizer=DIGITS_TOKENIZER,
        max_tiles=1,
    ),
}


class InternVL2:
    """Tokenizer, chat template and image preprocessing of one size."""

    def __init__(self, size: str) -> None:
        if size not in SIZES:
            raise ValueError(f"model.size {size!r} is not a size of internvl2; known: {', '.join(SIZES)}")
        self.size = SIZES[size]
        self.tokenizer = SentencePieceTokenizer(self.size.tokenizer)
        piece = self.tokenizer.id
        self.vision = self.size.vision
        self.language = replace(self.size.language, vocab=self.tokenizer.vocab_size)
        self.stop_tokens = frozenset({piece("<|im_end|>")})
        self.pad_token = piece("<|im_end|>")
        self._image_tokens = [piece("<img>"), piece("<IMG_CONTEXT>"), piece("</img>")]
        self._start, self._end = piece("<|im_start|>"), piece("<|im_end|>")
        self._newline = self.tokenizer.encode("\n")
        # Only the stop token may be drawn of all control symbols; a sampled media token would claim image features.
        silent = (id for id in range(self.tokenizer.vocab_size) if not self.tokenizer.decode([id]))
        self.banned_tokens = sorted({*silent} - self.stop_tokens)
        self.tokens_per_tile = (self.vision.image_size // self.vision.patch_size // 2) ** 2

    def prompt(self, query: Query) -> Prompt:
        """Chat template and pixels of a query. Raises OSError or ValueError naming an unreadable image."""
        pixels = [self.tiles(image) for image in query.images]
        tokens: list[int] = []
        if self.size.system:
            tokens += self._turn("system", self.tokenizer.encode(self.size.system)) + [self._end]
        begin, context, end = self._image_tokens
        content: list[int] = []
        image_offsets: list[int] = []
        for tiles in pixels:
            count = tiles.size(0) * self.tokens_per_tile
            image_offsets += range(len(content) + 1, len(content) + 1 + count)
            content += [begin, *[context] * count, end, *self._newline]
        content += self.tokenizer.encode(query.question)
        turn = self._turn("user", content)
        offset = len(tokens) + len(turn) - len(content)
        tokens += [*turn, self._end, *self._turn("assistant", [])]
        return Prompt(tokens, [offset + i for i in image_offsets], torch.cat(pixels) if pixels else None)

    def response_tokens(self, text: str) -> list[int]:
        """Token ids of a whole written-out response, stop token included."""
        return [*self.tokenizer.encode(text), self._end]

    def tiles(self, image: ImageRef) -> Tensor:
        """Decode, tile and normalise one image: float32 [tiles, 3, S, S], thumbnail last when there are several."""
        try:
            with Image.open(image.path) as opened:
                picture = opened.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{image.path}: not a readable image ({error})") from error
        S = self.vision.image_size
        columns, rows = tile_grid(picture.width, picture.height, self.size.max_tiles, S)
        resized = picture.resize((S * columns, S * rows), Image.Resampling.BICUBIC)
        boxes = [(S * c, S * r, S * (c + 1), S * (r + 1)) for r in range(rows) for c in range(columns)]
        tiles = [resized.crop(box) for box in boxes]
        if len(tiles) > 1:
            tiles.append(picture.resize((S, S), Image.Resampling.BICUBIC))
        x = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
        return (x - mean) / std

    def _turn(self, role: str, content: list[int]) -> list[int]:
        return [self._start, *self.tokenizer.encode(f"{role}\n"), *content]


def tile_grid(width: int, height: int, max_tiles: int, tile: int) -> tuple[int, int]:
    """(columns, rows) whose aspect ratio is nearest to the image's.

    On an exact tie the larger grid wins if the image has more than half of its pixels (``dynamic_preprocess``).
    """
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
    best, smallest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        if difference < smallest:
            best, smallest = (columns, rows), difference
        elif difference == smallest and width * height > 0.5 * tile * tile * columns * rows:
            best = (columns, rows)
    return best
