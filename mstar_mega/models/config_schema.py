"""What the values of a config.json may be, before anything is built from them.

The keys mean the same wherever they stand (at the top, in ``llm_config``, ``vision_config`` ...) and in every family,
so one schema serves all; which of them a family needs, and what is implemented, is the family's own. Keys that are not
named here pass; rotary settings have many spellings and are read in ``families/rotary.py``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, model_validator

from mstar_mega.platform.inputs import checked

MOST_LAYERS = 1024


_Layers = Annotated[int, Field(strict=True, ge=1, le=MOST_LAYERS)]
_Pieces = Annotated[int, Field(strict=True, ge=1, le=1 << 12)]
_Heads = Annotated[int, Field(strict=True, ge=1, le=1 << 12)]
_Side = Annotated[int, Field(strict=True, ge=1, le=1 << 14)]
_Width = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
_Rows = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
_Length = Annotated[int, Field(strict=True, ge=1, le=1 << 31)]
_Positive = Annotated[float, Field(strict=True, gt=0, lt=1e30)]


class _Slices(BaseModel):
    max_slice_nums: _Pieces = 1
    scale_resolution: _Side = 1
    patch_size: _Side = 1


class _Part(BaseModel):
    """A model, or one of its parts."""

    model_type: str | None = None
    num_hidden_layers: _Layers = 1
    num_attention_heads: _Heads = 1
    num_key_value_heads: _Heads | None = None
    resampler_num_heads: _Heads = 1
    hidden_size: _Width = 1
    intermediate_size: _Width = 1
    vocab_size: _Rows = 1
    image_size: _Side | None = None
    force_image_size: _Side | None = None
    patch_size: _Side | None = None
    image_dim_out: _Width = 1
    num_img_tokens: _Width = 1
    query_num: _Width = 1
    max_position_embeddings: _Length | None = None
    original_max_position_embeddings: _Length | None = None
    rms_norm_eps: _Positive = 1.0
    layer_norm_eps: _Positive = 1.0
    downsample_ratio: _Positive = 1.0
    max_dynamic_patch: _Pieces = 1
    min_dynamic_patch: _Pieces = 1
    num_crops: _Pieces = 1
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    slice_mode: bool = True
    torch_dtype: str | None = None
    dtype: str | None = None
    llm_config: _Part | None = None
    text_config: _Part | None = None
    vision_config: _Part | None = None
    img_processor: _Part | None = None
    embd_layer: dict[str, Any] | None = None
    slice_config: _Slices | None = None

    @model_validator(mode="after")
    def _heads_have_channels(self) -> _Part:
        for heads, key in (
            (self.num_attention_heads, "num_attention_heads"),
            (self.num_key_value_heads, "num_key_value_heads"),
        ):
            if heads is not None and {key, "hidden_size"} <= self.model_fields_set and heads > self.hidden_size:
                raise ValueError(f"without more {key} ({heads}) than hidden_size ({self.hidden_size})")
        return self


_SCHEMA = TypeAdapter(_Part)
_NEEDED = ("llm_config", "vision_config", "img_processor", "slice_config", "embd_layer")


def check_config(config: dict[str, Any]) -> None:
    """Raises ValueError naming the first key whose value no model has."""
    checked(_SCHEMA, config, "its values")
    for key in _NEEDED:
        if key in config and config[key] is None:
            raise ValueError(f"{key} is null: it should be an object")
