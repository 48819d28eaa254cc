"""InternVL2 (InternViT, pixel shuffle, InternLM2): everything that is particular to this policy family.

Source: OpenGVLab/InternVL2-2B (config and remote code) for the architecture, tiling and template. Its chat() writes no
newline after ``<|im_end|>``, unlike the chat template in its tokenizer_config.json; so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from mstar_mega.data.tokenizer import SentencePieceTokenizer, Tokenizer, added_tokens, required_file
from mstar_mega.data.types import ImageRef, Query
from mstar_mega.models.families.base import (
    Family,
    LayerNames,
    expect,
    language_map,
    normalised,
    norms,
    number,
    opened,
    patch_map,
)
from mstar_mega.models.families.rotary import dynamic_ntk, rotary_settings
from mstar_mega.models.mapping import Head, Mapping, Source, interleaved, linear, same
from mstar_mega.models.packing import Prompt
from mstar_mega.models.sizes import LanguageSize, VisionSize

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
"""The system message that the original's chat() always sends."""


@dataclass(frozen=True)
class Size:
    """A size of the family."""

    vision: VisionSize
    language: LanguageSize
    tokenizer: str = ""
    """Path of the sentencepiece model of a named size."""
    max_tiles: int = 12
    """Most tiles per image, the thumbnail not counted."""
    min_tiles: int = 1
    thumbnail: bool = True
    """Several tiles are followed by the whole picture as one more."""
    system: str = ""
    """System message; empty: no system turn."""
    begin: bool = False
    """The prompt begins with the tokenizer's ``<s>``."""


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
    # For pictures of one's own: four times the pixels a tile, and up to four tiles with the whole picture behind them.
    "mid": Size(
        vision=VisionSize(image_size=96, patch_size=12, hidden=128, ffn=384, layers=3, heads=4),
        language=LanguageSize(
            hidden=192, ffn=512, layers=4, heads=6, kv_heads=2, head_dim=32, vocab=0, rope_theta=10_000.0, init_std=0.05
        ),
        tokenizer=DIGITS_TOKENIZER,
        max_tiles=4,
    ),
}

_NAMES = LayerNames(
    embedding="language_model.model.tok_embeddings.weight",
    norm="language_model.model.norm.weight",
    output="language_model.output.weight",
    attention_norm="language_model.model.layers.{i}.attention_norm.weight",
    qkv=("language_model.model.layers.{i}.attention.wqkv.weight",),
    proj="language_model.model.layers.{i}.attention.wo.weight",
    mlp_norm="language_model.model.layers.{i}.ffn_norm.weight",
    gate_up=(
        "language_model.model.layers.{i}.feed_forward.w1.weight",
        "language_model.model.layers.{i}.feed_forward.w3.weight",
    ),
    down="language_model.model.layers.{i}.feed_forward.w2.weight",
    qkv_is_grouped=True,
)


class InternVL2(Family):
    """Tokenizer, chat template and image preprocessing of one size."""

    name: ClassVar[str] = "internvl2"
    model_type: ClassVar[str] = "internvl_chat"
    published_context: ClassVar[int] = 65_536

    def __init__(self, size: str | Size, tokenizer: Tokenizer | None = None) -> None:
        if isinstance(size, str):
            if size not in SIZES:
                raise ValueError(f"model.size {size!r} is not a size of internvl2; known: {', '.join(SIZES)}")
            named = SIZES[size]
            tokenizer = SentencePieceTokenizer(named.tokenizer)
            size = replace(named, language=replace(named.language, vocab=tokenizer.vocab_size))
        super().__init__(size.vision, size.language, tokenizer)
        self.size = size
        self.tokens_per_tile = (self.vision.grid // 2) ** 2
        if tokenizer is None:
            return
        piece = tokenizer.id
        self._image_tokens = [piece("<img>"), piece("<IMG_CONTEXT>"), piece("</img>")]
        self._start, self._end = piece("<|im_start|>"), piece("<|im_end|>")
        self._begin = [piece("<s>")] if size.begin else []
        self._set_stop([self._end])

    @classmethod
    def from_config(cls, config: dict[str, Any], tokenizer: Tokenizer | None) -> InternVL2:
        """See :meth:`Family.from_config`."""
        vision, language = cls.sizes(config)
        tiles = int(config.get("max_dynamic_patch", 12)) if config.get("dynamic_image_size", True) else 1
        size = Size(
            vision, language, max_tiles=tiles, min_tiles=int(config.get("min_dynamic_patch", 1)),
            thumbnail=bool(config.get("use_thumbnail", True)), **_prompt_of(config),
        )  # fmt: skip
        return cls(size, tokenizer)

    @classmethod
    def sizes(cls, config: dict[str, Any]) -> tuple[VisionSize, LanguageSize]:
        """See :meth:`Family.sizes`."""
        where = "config.json of internvl2"
        llm, vit = number(config, where, "llm_config"), number(config, where, "vision_config")
        expect(config, where, downsample_ratio=0.5, ps_version="v2", select_layer=-1, template="internlm2-chat")
        expect(config, where, use_backbone_lora=0, use_llm_lora=0, force_image_size=(vit.get("image_size"), None))
        expect(llm, f"{where}, llm_config", model_type="internlm2", bias=False, hidden_act="silu")
        expect(llm, f"{where}, llm_config", tie_word_embeddings=False)
        expect(vit, f"{where}, vision_config", model_type="intern_vit_6b", hidden_act="gelu", norm_type="layer_norm")
        expect(vit, f"{where}, vision_config", qk_normalization=False, qkv_bias=True, num_channels=3)
        image, patch, width, mlp, depth, vision_heads = (
            int(number(vit, f"{where}, vision_config", key))
            for key in (
                "image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads",
            )
        )  # fmt: skip
        vision = VisionSize(image, patch, width, mlp, depth, vision_heads, eps=float(vit.get("layer_norm_eps", 1e-6)))
        if vision.grid % 2:
            raise ValueError(f"{where}: {vision.grid} patches along a tile cannot be merged two by two")
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        hidden, ffn, layers, heads, kv_heads = (number(llm, f"{where}, llm_config", key) for key in keys)
        rotary = rotary_settings(llm, f"{where}, llm_config", "dynamic")
        context = llm.get("max_position_embeddings")
        rope = dynamic_ntk(rotary, context)
        if rope is not None:
            context = int(rope.factor * rope.limit)
        language = LanguageSize(
            hidden, ffn, layers, heads, kv_heads, hidden // heads, number(llm, f"{where}, llm_config", "vocab_size"),
            rotary.theta, float(llm.get("rms_norm_eps", 1e-6)), rope_scaling=rope, context=context,
        )  # fmt: skip
        return vision, language

    @classmethod
    def weight_map(cls, config: dict[str, Any], head: Head = "vocabulary") -> list[Mapping]:
        """See :meth:`Family.weight_map`. ``wqkv`` is in megatron's order; InternViT's qkv is not."""
        vision, language = cls.sizes(config)
        C, ffn, H = vision.hidden, vision.ffn, language.hidden
        maps = [
            same("vision.class_embedding", "vision_model.embeddings.class_embedding", 1, 1, C),
            same("vision.position_embedding", "vision_model.embeddings.position_embedding", 1, 1 + vision.grid**2, C),
            *patch_map(vision, "vision_model.embeddings.patch_embedding"),
        ]
        for i in range(vision.layers):
            ours, theirs = f"vision.blocks.{i}", f"vision_model.encoder.layers.{i}"
            for part, shape in (("weight", (3 * C, C)), ("bias", (3 * C,))):
                maps.append(
                    interleaved(f"{ours}.qkv.{part}", [Source(f"{theirs}.attn.qkv.{part}", shape)], vision.heads, 1)
                )
            maps += [
                *norms(f"{ours}.norm1", f"{theirs}.norm1", C),
                *norms(f"{ours}.norm2", f"{theirs}.norm2", C),
                *linear(f"{ours}.proj", f"{theirs}.attn.proj", C, C, "row"),
                *linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", ffn, C, "column"),
                *linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", C, ffn, "row"),
                same(f"{ours}.ls1", f"{theirs}.ls1", C),
                same(f"{ours}.ls2", f"{theirs}.ls2", C),
            ]
        maps += [
            *norms("connector.norm", "mlp1.0", 4 * C),
            *linear("connector.mlp.fc1", "mlp1.1", H, 4 * C, "column"),
            *linear("connector.mlp.fc2", "mlp1.3", H, H, "row"),
        ]
        return maps + language_map(language, _NAMES, head)

    @classmethod
    def load_tokenizer(cls, directory: Path) -> Tokenizer:
        """See :meth:`Family.load_tokenizer`: ``tokenizer.model`` and the added tokens beside it."""
        return SentencePieceTokenizer(required_file(directory, "tokenizer.model"), added_tokens(directory))

    @staticmethod
    def published_image_cost(width: int, height: int) -> tuple[int, int]:
        """See :meth:`Family.published_image_cost`."""
        columns, rows = tile_grid(width, height, 12, 448)
        tiles = columns * rows + (columns * rows > 1)
        return tiles, tiles * 16**2

    def prompt(self, query: Query) -> Prompt:
        """Chat template and pixels of a query. Raises OSError or ValueError naming an unreadable image."""
        pixels = [self.tiles(image) for image in query.images]
        tokens, positions = self._layout(query.question, [tiles.size(0) for tiles in pixels])
        return Prompt(tokens, positions, torch.cat(pixels) if pixels else None)

    def prompt_length(self, question: str, sizes: Sequence[tuple[int, int]]) -> int:
        """See :meth:`Family.prompt_length`."""
        return len(self._layout(question, [self.tile_count(*size) for size in sizes])[0])

    def _layout(self, question: str, tiles: Sequence[int]) -> tuple[list[int], list[int]]:
        """(token ids, where features go) of a question about images of so many tiles each."""
        encode = self.tokenizer.encode
        tokens = list(self._begin)
        if self.size.system:
            tokens += [self._start, *encode(f"system\n{self.size.system}"), self._end]
        begin, context, end = self._image_tokens
        positions: list[int] = []
        tokens.append(self._start)
        text = "user\n"
        for of_image in tiles:
            count = of_image * self.tokens_per_tile
            tokens += [*encode(text), begin]
            positions += range(len(tokens), len(tokens) + count)
            tokens += [*[context] * count, end]
            text = "\n"
        tokens += [*encode(text + question), self._end, self._start, *encode("assistant\n")]
        return tokens, positions

    def response_tokens(self, text: str) -> list[int]:
        """Token ids of a whole written-out response, stop token included."""
        return [*self.tokenizer.encode(text), self._end]

    def tiles(self, image: ImageRef) -> Tensor:
        """Decode, tile and normalise one image: float32 [tiles, 3, S, S], thumbnail last when there are several."""
        with opened(image, self.pictures) as picture:
            return normalised(self.cut(picture), IMAGE_MEAN, IMAGE_STD)

    def tile_count(self, width: int, height: int) -> int:
        """Tiles of a picture of so many pixels, the thumbnail included."""
        columns, rows = tile_grid(width, height, self.size.max_tiles, self.vision.image_size, self.size.min_tiles)
        return columns * rows + (columns * rows > 1 and self.size.thumbnail)

    def cut(self, picture: Image.Image) -> list[Image.Image]:
        """The tiles of a picture, row by row, each S x S; the thumbnail last when there are several."""
        S = self.vision.image_size
        columns, rows = tile_grid(picture.width, picture.height, self.size.max_tiles, S, self.size.min_tiles)
        resized = picture.resize((S * columns, S * rows), Image.Resampling.BICUBIC)
        boxes = [(S * c, S * r, S * (c + 1), S * (r + 1)) for r in range(rows) for c in range(columns)]
        tiles = [resized.crop(box) for box in boxes]
        if len(tiles) > 1 and self.size.thumbnail:
            tiles.append(picture.resize((S, S), Image.Resampling.BICUBIC))
        return tiles


PLAIN_PROMPT = "mstar_plain_prompt"
"""In config.json of a policy that was trained without the original's system message and begin mark."""


def _prompt_of(config: dict[str, Any]) -> dict[str, Any]:
    return {"system": "", "begin": False} if config.get(PLAIN_PROMPT) is True else {"system": SYSTEM, "begin": True}


def tile_grid(width: int, height: int, max_tiles: int, tile: int, min_tiles: int = 1) -> tuple[int, int]:
    """(columns, rows) whose aspect ratio is nearest to the image's.

    On an exact tie the larger grid wins if the image has more than half of its pixels (``dynamic_preprocess``).
    """
    sides = range(1, max_tiles + 1)
    grids = [(c, r) for c in sides for r in sides if min_tiles <= c * r <= max_tiles]
    best, smallest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        if difference < smallest:
            best, smallest = (columns, rows), difference
        elif difference == smallest and width * height > 0.5 * tile * tile * columns * rows:
            best = (columns, rows)
    return best
