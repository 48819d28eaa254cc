"""Sizes of a model's parts: all that its modules need to know of a policy family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
"""Exact (erf) GELU, its tanh approximation, or x * sigmoid(1.702 x)."""


@dataclass(frozen=True)
class VisionSize:
    """Sizes and variants of the vision tower and of the connector behind it."""

    image_size: int
    """Side of a tile in pixels; for strips, of the picture that the position table was made for."""
    patch_size: int
    hidden: int
    ffn: int
    layers: int
    """Layers in the checkpoint, the unused ones included."""
    heads: int
    eps: float = 1e-6
    tower: Literal["tiles", "strips"] = "tiles"
    """tiles: square pictures with a class token; strips: any number of patches, in one row (NaViT)."""
    activation: Activation = "gelu"
    patch_bias: bool = True
    layer_scale: bool = True
    pre_norm: bool = False
    """LayerNorm behind the embeddings."""
    post_norm: Literal["none", "applied", "kept"] = "none"
    """LayerNorm behind the last layer; kept: it is in the checkpoint and survives, but nothing uses it."""
    unused_layers: int = 0
    """Last layers that are in the checkpoint and survive, but that nothing uses."""
    connector: Literal["pixel_shuffle", "hd_transform", "resampler"] = "pixel_shuffle"
    queries: int = 0
    """Features per slice (resampler)."""
    connector_heads: int = 0
    """Attention heads of the resampler."""

    @property
    def grid(self) -> int:
        """Patches along a side of ``image_size``."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class LongRope:
    """Two lists of frequency divisors, short up to ``original`` tokens and long beyond (Phi-3)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention_scale: float
    """Factor on cos and sin, for both lists."""

    def __str__(self) -> str:
        return (
            f"longrope: {len(self.short)} divisors up to {self.original} tokens, others beyond, scale "
            f"{self.attention_scale:.4f}"
        )


@dataclass(frozen=True)
class DynamicNTK:
    """A base that grows with the sequence beyond ``limit`` tokens (InternLM2)."""

    factor: float
    limit: int

    def __str__(self) -> str:
        return f"dynamic NTK with factor {self.factor:g} beyond {self.limit} tokens"


@dataclass(frozen=True)
class LanguageSize:
    """Sizes of the language model."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    eps: float = 1e-5
    init_std: float = 0.02
    rope_scaling: LongRope | DynamicNTK | None = None
    context: int | None = None
    """Tokens of the longest sequence that the weights are made for; None: nobody says."""

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: a multiple of 128, so that the layout does not change a checkpoint's shapes."""
        return -(-self.vocab // 128) * 128


def layers_of_stages(layers: int, pipeline: int, first: int | None = None) -> list[int]:
    """Layers on each pipeline stage; ``first``: so many on the first of several, an equal share on each of the others.

    Raises ValueError, with the settings' names, where they cannot be shared out so.
    """
    if pipeline == 1 or first is None:
        if layers % pipeline:
            raise ValueError(f"parallel.pipeline {pipeline} does not divide the model's {layers} layers")
        return [layers // pipeline] * pipeline
    if not 0 < first < layers or (layers - first) % (pipeline - 1):
        raise ValueError(
            f"parallel.first_stage_layers {first} leaves {max(layers - first, 0)} of the model's {layers} layers to "
            f"the other {pipeline - 1} of {pipeline} stages (parallel.pipeline): not a multiple of {pipeline - 1}"
        )
    return [first] + [(layers - first) // (pipeline - 1)] * (pipeline - 1)


def cut_over_tensor_ranks(vision: VisionSize, language: LanguageSize) -> dict[str, int]:
    """What tensor-parallel ranks share among them, by its name: their number must divide each."""
    shared = {
        "attention heads": language.heads,
        "key-value heads": language.kv_heads,
        "feed-forward channels": language.ffn,
        "vision heads": vision.heads,
        "vision feed-forward channels": vision.ffn,
    }
    return shared | ({"resampler heads": vision.connector_heads} if vision.connector_heads else {})
