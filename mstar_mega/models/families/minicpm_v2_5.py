"""MiniCPM-Llama3-V 2.5 (SigLIP on strips, resampler, Llama-3): everything that is particular to this policy family.

Source: openbmb/MiniCPM-Llama3-V-2_5 (config, remote code) for the architecture, slices and template. Kept as in the
original: a patch's position is its place along the strip, and the empty patches behind a short slice take part in
attention (``models/vision.py``). There the longest slice of a whole batch rules; here that of a query, so that no
query depends on what it is batched with: what the original gives for this query alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from mstar_mega.data.tokenizer import FastTokenizer, Tokenizer, required_file
from mstar_mega.data.types import ImageRef, Query
from mstar_mega.models.families.base import (
    Family,
    LayerNames,
    clip_layer_map,
    expect,
    language_map,
    normalised,
    norms,
    number,
    opened,
    patch_map,
)
from mstar_mega.models.families.rotary import rotary_settings
from mstar_mega.models.mapping import Head, Mapping, Source, Transposed, interleaved, linear, same
from mstar_mega.models.packing import Prompt
from mstar_mega.models.sizes import LanguageSize, VisionSize

SCALE_RESOLUTION = 448
"""Side of a square with as many pixels as a slice should have; ``scale_resolution`` in slice_config overrides it."""

# The tower's values where config.json leaves them to the original's defaults.
_SIGLIP = {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
_NAMES = LayerNames(
    embedding="llm.model.embed_tokens.weight",
    norm="llm.model.norm.weight",
    output="llm.lm_head.weight",
    attention_norm="llm.model.layers.{i}.input_layernorm.weight",
    qkv=(
        "llm.model.layers.{i}.self_attn.q_proj.weight",
        "llm.model.layers.{i}.self_attn.k_proj.weight",
        "llm.model.layers.{i}.self_attn.v_proj.weight",
    ),
    proj="llm.model.layers.{i}.self_attn.o_proj.weight",
    mlp_norm="llm.model.layers.{i}.post_attention_layernorm.weight",
    gate_up=("llm.model.layers.{i}.mlp.gate_proj.weight", "llm.model.layers.{i}.mlp.up_proj.weight"),
    down="llm.model.layers.{i}.mlp.down_proj.weight",
)


@dataclass(frozen=True)
class Slicing:
    """How pictures are cut."""

    resolution: int = SCALE_RESOLUTION
    patch: int = 14
    most: int = 9
    """Most slices besides the whole picture."""


class MiniCPMV25(Family):
    """Tokenizer, chat template and image preprocessing of MiniCPM-Llama3-V 2.5."""

    name: ClassVar[str] = "minicpm_v2_5"
    model_type: ClassVar[str] = "minicpmv"
    published_context: ClassVar[int] = 8192

    def __init__(
        self, vision: VisionSize, language: LanguageSize, tokenizer: Tokenizer | None, slicing: Slicing | None = None
    ) -> None:
        super().__init__(vision, language, tokenizer)
        self.slicing = slicing or Slicing(patch=vision.patch_size)
        if tokenizer is None:
            return
        piece = tokenizer.id
        self._begin, self._start_header, self._end_header, self._end = (
            piece(f"<|{name}|>") for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
        )
        self._unknown = piece("<unk>")
        self._image, self._image_end = piece("<image>"), piece("</image>")
        self._slice, self._slice_end = piece("<slice>"), piece("</slice>")
        self._newline = tokenizer.encode("\n")
        self._set_stop([self._end, piece("<|end_of_text|>")])

    @classmethod
    def from_config(cls, config: dict[str, Any], tokenizer: Tokenizer | None) -> MiniCPMV25:
        """See :meth:`Family.from_config`."""
        vision, language = cls.sizes(config)
        settings = config.get("slice_config", {})
        slicing = Slicing(
            int(settings.get("scale_resolution", SCALE_RESOLUTION)),
            vision.patch_size,
            int(settings.get("max_slice_nums", 9)) if config.get("slice_mode", True) else 1,
        )
        return cls(vision, language, tokenizer, slicing)

    @classmethod
    def sizes(cls, config: dict[str, Any]) -> tuple[VisionSize, LanguageSize]:
        """See :meth:`Family.sizes`."""
        where = "config.json of minicpm_v2_5"
        expect(config, where, hidden_act="silu", tie_word_embeddings=False, attention_bias=False)
        _check_version(config, where)
        expect(config, where, drop_vision_last_layer=False, batch_vision_input=True)
        siglip = {**_SIGLIP, **number(config, where, "vision_config")}
        expect(siglip, f"{where}, vision_config", hidden_act="gelu_pytorch_tanh", num_channels=3)
        image, patch, width, mlp, depth, vision_heads = (
            int(number(siglip, f"{where}, vision_config", key))
            for key in (
                "image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads",
            )
        )  # fmt: skip
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        hidden, ffn, layers, heads = (int(number(config, where, key)) for key in keys)
        vision = VisionSize(
            image, patch, width, mlp, depth, vision_heads, float(siglip["layer_norm_eps"]), tower="strips",
            activation="gelu_tanh", layer_scale=False, post_norm="applied", connector="resampler",
            queries=number(config, where, "query_num"),
            # The original's rule; its configs do not have the key.
            connector_heads=int(config.get("resampler_num_heads", hidden // 128)),
        )  # fmt: skip
        language = LanguageSize(
            hidden, ffn, layers, heads, config.get("num_key_value_heads") or heads, hidden // heads,
            number(config, where, "vocab_size"), rotary_settings(config, where).theta,
            float(config.get("rms_norm_eps", 1e-6)), context=config.get("max_position_embeddings"),
        )  # fmt: skip
        return vision, language

    @classmethod
    def weight_map(cls, config: dict[str, Any], head: Head = "vocabulary") -> list[Mapping]:
        """See :meth:`Family.weight_map`. ``resampler.proj`` is stored transposed there."""
        vision, language = cls.sizes(config)
        C, H = vision.hidden, language.hidden
        ours, theirs = "connector", "resampler"
        maps = [
            same("vision.position_embedding", "vpm.embeddings.position_embedding.weight", vision.grid**2, C),
            *patch_map(vision, "vpm.embeddings.patch_embedding"),
            *clip_layer_map(vision, "vpm.encoder.layers"),
            *norms("vision.post_norm", "vpm.post_layernorm", C),
            same(f"{ours}.query", f"{theirs}.query", vision.queries, H),
            *linear(f"{ours}.kv_proj", f"{theirs}.kv_proj", H, C, "column", bias=False),
            *norms(f"{ours}.norm_q", f"{theirs}.ln_q", H),
            *norms(f"{ours}.norm_kv", f"{theirs}.ln_kv", H),
            *norms(f"{ours}.norm_post", f"{theirs}.ln_post", H),
            *linear(f"{ours}.out_proj", f"{theirs}.attn.out_proj", H, H, "row"),
            Mapping(f"{ours}.proj.weight", (H, H), (Source(f"{theirs}.proj", (H, H)),), "row", Transposed()),
        ]
        for part, shape in (("weight", (3 * H, H)), ("bias", (3 * H,))):
            source = Source(f"{theirs}.attn.in_proj_{part}", shape)
            maps.append(interleaved(f"{ours}.in_proj.{part}", [source], vision.connector_heads, 1))
        return maps + language_map(language, _NAMES, head)

    @classmethod
    def load_tokenizer(cls, directory: Path) -> Tokenizer:
        """See :meth:`Family.load_tokenizer`: ``tokenizer.json``."""
        return FastTokenizer(required_file(directory, "tokenizer.json"))

    @staticmethod
    def published_image_cost(width: int, height: int) -> tuple[int, int]:
        """See :meth:`Family.published_image_cost`."""
        columns, rows = slice_grid(width, height, Slicing()) or (0, 0)
        pieces = 1 + columns * rows
        return pieces, pieces * 96

    def prompt(self, query: Query) -> Prompt:
        """Chat template and pixels of a query. Raises OSError or ValueError naming an unreadable image."""
        pictures = [self.slices(image) for image in query.images]
        grids = [(len(rows[0]), len(rows)) if rows else None for _, rows in pictures]
        tokens, positions = self._layout(query.question, grids)
        if not pictures:
            return Prompt(tokens, [], None)
        pieces = [piece for source, rows in pictures for piece in (source, *chain(*rows))]
        patches = [to_patches(piece, self.slicing.patch) for piece in pieces]
        sizes = [(piece.height // self.slicing.patch, piece.width // self.slicing.patch) for piece in pieces]
        longest = max(rows * columns for rows, columns in sizes)
        counts = torch.tensor([(rows, columns, longest) for rows, columns in sizes], device="cpu")
        return Prompt(tokens, positions, torch.cat(patches), counts)

    def prompt_length(self, question: str, sizes: Sequence[tuple[int, int]]) -> int:
        """See :meth:`Family.prompt_length`."""
        return len(self._layout(question, [slice_grid(width, height, self.slicing) for width, height in sizes])[0])

    def response_tokens(self, text: str) -> list[int]:
        """Token ids of a whole written-out response, stop token included."""
        return [*self.tokenizer.encode(text), self._end]

    def slices(self, image: ImageRef) -> tuple[Image.Image, list[list[Image.Image]]]:
        """(the whole picture scaled, its slices row by row) of one image; no slices where it is small enough."""
        with opened(image, self.pictures) as picture:
            return cut(picture, self.slicing)

    def _layout(self, question: str, grids: Sequence[tuple[int, int] | None]) -> tuple[list[int], list[int]]:
        """(token ids, where features go) of a question about images of so many (columns, rows) of slices each."""
        tokens = [self._begin, *self._header("user")]
        positions: list[int] = []

        def place() -> None:
            tokens.append(self._image)
            positions.extend(range(len(tokens), len(tokens) + self.vision.queries))
            tokens.extend([*[self._unknown] * self.vision.queries, self._image_end])

        for place_in_turn, grid in enumerate(grids, start=1):
            place()
            if grid is not None:
                columns, rows = grid
                tokens.append(self._slice)
                for r in range(rows):
                    if r:
                        tokens.extend(self._newline)
                    for _ in range(columns):
                        place()
                tokens.append(self._slice_end)
            if place_in_turn < len(grids):
                tokens.extend(self._newline)
        # The original trims the whole content, of which an image is the beginning.
        tokens += self.tokenizer.encode(f"\n{question}".rstrip() if grids else question.strip())
        return [*tokens, self._end, *self._header("assistant")], positions

    def _header(self, role: str) -> list[int]:
        encode = self.tokenizer.encode
        return [self._start_header, *encode(role), self._end_header, *encode("\n\n")]


def _check_version(config: dict[str, Any], where: str) -> None:
    """Raise ValueError for another MiniCPM-V. The 2.5 published first (May to July 2024) has no version in its config;
    neither have 1 and 2, whose language model is MiniCPM with a hidden size of 2304 and 64 queries."""
    version = config.get("version")
    if version is not None and str(version) != "2.5":
        raise ValueError(f"{where}: version is {version!r}, but only '2.5' is supported")
    older = config.get("hidden_size") == 2304 or config.get("query_num") == 64 or "scale_emb" in config
    if version is None and older:
        raise ValueError(
            f"{where}: it has no version, and hidden_size {config.get('hidden_size')} and query_num "
            f"{config.get('query_num')} are those of MiniCPM-V 1 or 2; only MiniCPM-Llama3-V 2.5 is supported"
        )


def cut(picture: Image.Image, slicing: Slicing) -> tuple[Image.Image, list[list[Image.Image]]]:
    """(the whole picture scaled, its slices row by row)."""
    grid = slice_grid(picture.width, picture.height, slicing)
    source = picture.resize(source_size(picture.width, picture.height, slicing), Image.Resampling.BICUBIC)
    if grid is None:
        return source, []
    columns, rows = grid
    width, height = refined_size(picture.width, picture.height, grid, slicing)
    refined = picture.resize((width * columns, height * rows), Image.Resampling.BICUBIC)
    return source, [
        [refined.crop((c * width, r * height, (c + 1) * width, (r + 1) * height)) for c in range(columns)]
        for r in range(rows)
    ]


def to_patches(piece: Image.Image, patch: int) -> Tensor:
    """float32 [rows * columns, 3, P, P] of a picture of whole patches, in [-1, 1], row by row."""
    x = normalised([piece], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))[0]
    x = x.unflatten(1, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous()


def best_size(width: float, height: float, slicing: Slicing, upscale: bool) -> tuple[int, int]:
    """(width, height) of about the target's area and the same shape, in whole patches."""
    if width * height > slicing.resolution**2 or upscale:
        ratio = width / height
        height = int(slicing.resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _whole(width, slicing.patch), _whole(height, slicing.patch)


def slice_grid(width: int, height: int, slicing: Slicing) -> tuple[int, int] | None:
    """(columns, rows) of the slices, or None for a picture that needs none."""
    wanted = min(math.ceil(width * height / slicing.resolution**2), slicing.most)
    if wanted <= 1:
        return None
    best, smallest = (1, 1), float("inf")
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > slicing.most:
            continue
        for columns in range(1, count + 1):
            if count % columns:
                continue
            difference = abs(math.log(width / height) - math.log(columns / (count // columns)))
            if difference < smallest:
                best, smallest = (columns, count // columns), difference
    return best


def source_size(width: int, height: int, slicing: Slicing) -> tuple[int, int]:
    """(width, height) of the whole picture; only one that is not sliced is scaled up."""
    return best_size(width, height, slicing, upscale=slice_grid(width, height, slicing) is None)


def refined_size(width: int, height: int, grid: tuple[int, int], slicing: Slicing) -> tuple[int, int]:
    """(width, height) of one slice."""
    columns, rows = grid
    return best_size(_whole(width, columns) / columns, _whole(height, rows) / rows, slicing, upscale=True)


def _whole(side: float, unit: int) -> int:
    """The nearest multiple (halves to the even one), at least one unit."""
    return max(round(side / unit) * unit, unit)
