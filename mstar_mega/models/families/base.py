"""What every policy family offers, and the parts of weight maps that families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mstar_mega.data.pictures import DEFAULT, PictureReading, open_picture
from mstar_mega.data.tokenizer import Tokenizer
from mstar_mega.data.types import ImageRef, Query
from mstar_mega.models.mapping import Head, Mapping, Source, interleaved, linear, same, score_heads, vocabulary
from mstar_mega.models.packing import Prompt
from mstar_mega.models.sizes import LanguageSize, VisionSize
from mstar_mega.platform.inputs import open_input


class Family(ABC):
    """Sizes, tokenizer, chat template, image preprocessing and weight map of one policy."""

    name: ClassVar[str]
    """As in ``model.family``."""
    model_type: ClassVar[str]
    """As in the original's config.json."""
    published_context: ClassVar[int]
    """Tokens of the longest sequence that the published model is made for: ``LanguageSize.context`` there."""
    pictures: PictureReading = DEFAULT
    """How image files are read; the settings' own after ``build_family``."""
    tied: ClassVar[dict[str, str]] = {}
    """The original's tensors that are another one's copy wherever they are stored: name -> that other's name."""
    vision: VisionSize
    language: LanguageSize
    stop_tokens: frozenset[int]
    banned_tokens: list[int]
    """Never drawn: a sampled media token would claim image features."""

    def __init__(self, vision: VisionSize, language: LanguageSize, tokenizer: Tokenizer | None) -> None:
        """Raises ValueError for a tokenizer with ids that the embedding has no rows for: no weights belong to these."""
        self.vision, self.language = vision, language
        self._tokenizer = tokenizer
        if tokenizer is not None and tokenizer.vocab_size > language.vocab:
            raise ValueError(
                f"{tokenizer.path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's embedding "
                f"has {language.vocab} rows (vocab_size in config.json): it is another model's, or tokens were added "
                "to it alone; copy the tokenizer's files from the model that the weights are of"
            )

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError for a family that was opened without one."""
        if self._tokenizer is None:
            raise ValueError(f"this {self.name} model was opened without a tokenizer, so it can read no text")
        return self._tokenizer

    @classmethod
    @abstractmethod
    def sizes(cls, config: dict[str, Any]) -> tuple[VisionSize, LanguageSize]:
        """From the content of the original's config.json. Raises ValueError for what is not supported, by key."""

    @classmethod
    @abstractmethod
    def weight_map(cls, config: dict[str, Any], head: Head = "vocabulary") -> list[Mapping]:
        """Every parameter of the model and the original's tensors, each of which stands in exactly one mapping."""

    @classmethod
    @abstractmethod
    def load_tokenizer(cls, directory: Path) -> Tokenizer:
        """From the model directory's own files. Raises FileNotFoundError or ValueError naming the file."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any], tokenizer: Tokenizer | None) -> Family:
        """The family at the sizes of a config.json; without a tokenizer it has weights and no texts."""

    @staticmethod
    @abstractmethod
    def published_image_cost(width: int, height: int) -> tuple[int, int]:
        """(tiles, features) of a picture of so many pixels at the sizes of the published model."""

    @abstractmethod
    def prompt(self, query: Query) -> Prompt:
        """Chat template and pixels of a query. Raises OSError or ValueError naming an unreadable image."""

    @abstractmethod
    def prompt_length(self, question: str, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of the prompt of a question about images of these (width, height) in pixels; no image is read."""

    @abstractmethod
    def response_tokens(self, text: str) -> list[int]:
        """Token ids of a whole written-out response, stop token included."""

    def _set_stop(self, stop: Sequence[int]) -> None:
        """The only control symbols that may be drawn."""
        self.stop_tokens = frozenset(stop)
        self.banned_tokens = sorted({*self.tokenizer.silent(self.language.vocab)} - self.stop_tokens)


@contextmanager
def opened(image: ImageRef, reading: PictureReading = DEFAULT) -> Iterator[Image.Image]:
    """The RGB picture of a reference as the settings read it. Raises ValueError naming the file."""
    try:
        with open_input(image.path) as raw, open_picture(raw) as file:
            picture = reading.read(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{image.path}: not a readable image ({error})") from error
    yield picture


def normalised(pictures: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures of one size -> float32 [n, 3, H, W]: (value / 255 - mean) / std."""
    x = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 255
    mean_, std_ = (torch.tensor(values, device=x.device)[:, None, None] for values in (mean, std))
    return (x - mean_) / std_


def expect(config: dict[str, Any], where: str, **expected: Any) -> None:
    """Raise ValueError where a key of the config has another value than the one that is implemented.

    A missing key is taken as the expected value; a tuple lists alternatives.
    """
    for key, values in expected.items():
        allowed = values if isinstance(values, tuple) else (values,)
        if key in config and config[key] not in allowed:
            shown = " or ".join(repr(value) for value in allowed)
            raise ValueError(f"{where}: {key} is {config[key]!r}, but only {shown} is supported")


def number(config: dict[str, Any], where: str, key: str) -> Any:
    """A required value of the config. Raises ValueError naming it."""
    if key not in config:
        raise ValueError(f"{where}: {key} is missing")
    return config[key]


@dataclass(frozen=True)
class LayerNames:
    """The original's names of a language model's tensors; ``{i}`` is the layer."""

    embedding: str
    norm: str
    output: str
    attention_norm: str
    qkv: tuple[str, ...]
    """One fused tensor or three."""
    proj: str
    mlp_norm: str
    gate_up: tuple[str, ...]
    """One fused tensor or two."""
    down: str
    qkv_is_grouped: bool = False
    """The fused tensor is in megatron's order already."""


def language_map(size: LanguageSize, names: LayerNames, head: Head) -> list[Mapping]:
    """The language model's part of a weight map."""
    ours = "language.decoder.layers"
    hidden, ffn, D = size.hidden, size.ffn, size.head_dim
    q_rows, kv_rows = size.heads * D, size.kv_heads * D
    qkv_rows = (q_rows, kv_rows, kv_rows) if len(names.qkv) == 3 else (q_rows + 2 * kv_rows,)
    ffn_rows = (ffn, ffn) if len(names.gate_up) == 2 else (2 * ffn,)
    embedding, rows = "language.embedding.word_embeddings.weight", (size.vocab, size.padded_vocab, hidden)
    maps = [vocabulary(embedding, names.embedding, *rows)]
    for i in range(size.layers):

        def sources(parts: tuple[str, ...], counts: tuple[int, ...], i: int = i) -> tuple[Source, ...]:
            return tuple(Source(part.format(i=i), (n, hidden)) for part, n in zip(parts, counts, strict=True))

        qkv, gate_up = sources(names.qkv, qkv_rows), sources(names.gate_up, ffn_rows)
        qkv_name = f"{ours}.{i}.self_attention.linear_qkv.weight"
        maps += [
            same(f"{ours}.{i}.input_layernorm.weight", names.attention_norm.format(i=i), hidden),
            same(qkv_name, qkv[0].name, sum(qkv_rows), hidden, layout="column")
            if names.qkv_is_grouped
            else interleaved(qkv_name, qkv, size.kv_heads, size.heads // size.kv_heads),
            same(f"{ours}.{i}.self_attention.linear_proj.weight", names.proj.format(i=i), hidden, q_rows, layout="row"),
            same(f"{ours}.{i}.pre_mlp_layernorm.weight", names.mlp_norm.format(i=i), hidden),
            Mapping(f"{ours}.{i}.mlp.linear_fc1.weight", (2 * ffn, hidden), gate_up, "gated"),
            same(f"{ours}.{i}.mlp.linear_fc2.weight", names.down.format(i=i), hidden, ffn, layout="row"),
        ]
    maps.append(same("language.decoder.final_layernorm.weight", names.norm, hidden))
    if head != "linear":
        maps.append(vocabulary("language.output_layer.weight", names.output, *rows))
    return maps + score_heads(hidden, head)


def clip_layer_map(size: VisionSize, prefix: str) -> list[Mapping]:
    """Transformer layers of a tower whose original has CLIP's names (CLIP and SigLIP)."""
    maps: list[Mapping] = []
    hidden, heads = size.hidden, size.heads
    for i in range(size.layers):
        ours, theirs = f"vision.blocks.{i}", f"{prefix}.{i}"
        for part, shape in (("weight", (hidden, hidden)), ("bias", (hidden,))):
            sources = [Source(f"{theirs}.self_attn.{x}_proj.{part}", shape) for x in "qkv"]
            maps.append(interleaved(f"{ours}.qkv.{part}", sources, heads, 1))
        maps += [
            *norms(f"{ours}.norm1", f"{theirs}.layer_norm1", hidden),
            *norms(f"{ours}.norm2", f"{theirs}.layer_norm2", hidden),
            *linear(f"{ours}.proj", f"{theirs}.self_attn.out_proj", hidden, hidden, "row"),
            *linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", size.ffn, hidden, "column"),
            *linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", hidden, size.ffn, "row"),
        ]
    return maps


def norms(ours: str, theirs: str, channels: int) -> list[Mapping]:
    """Weight and bias of a LayerNorm."""
    return [same(f"{ours}.{part}", f"{theirs}.{part}", channels) for part in ("weight", "bias")]


def patch_map(size: VisionSize, theirs: str) -> list[Mapping]:
    """The patch convolution."""
    side = size.patch_size
    weight = same("vision.patch_embedding.weight", f"{theirs}.weight", size.hidden, 3, side, side)
    return [weight, *([same("vision.patch_embedding.bias", f"{theirs}.bias", size.hidden)] if size.patch_bias else [])]
