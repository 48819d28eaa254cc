"""Phi-3.5-vision (CLIP, HD transform, Phi-3): everything that is particular to this policy family.

Source: microsoft/Phi-3.5-vision-instruct (remote code and processor) for the architecture, crops and template. Kept as
in the original: CLIP's last layer and final norm lie in the checkpoint and are not used; the text around each image is
encoded on its own, so ``<s>`` stands again after every image; one list of rotary factors, short or long, rules a whole
sequence (``models/rope.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
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
from mstar_mega.models.families.rotary import longrope, rotary_settings
from mstar_mega.models.mapping import Head, Mapping, Source, linear
from mstar_mega.models.packing import Prompt
from mstar_mega.models.sizes import LanguageSize, VisionSize

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
NUM_CROPS = 16
"""Most crops of an image, as the model card recommends for single images (4 for many frames); ``num_crops`` in
preprocessor_config.json, copied into the config, overrides it."""
STOP = ("<|endoftext|>", "<|end|>", "</s>")

# Hard-coded in the original, so real configs have none of these keys; a config may spell them out.
_CLIP = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 24, "patch_size": 14, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
_V = "model.vision_embed_tokens"
_C = f"{_V}.img_processor.vision_model"
_NAMES = LayerNames(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    output="lm_head.weight",
    attention_norm="model.layers.{i}.input_layernorm.weight",
    qkv=("model.layers.{i}.self_attn.qkv_proj.weight",),
    proj="model.layers.{i}.self_attn.o_proj.weight",
    mlp_norm="model.layers.{i}.post_attention_layernorm.weight",
    gate_up=("model.layers.{i}.mlp.gate_up_proj.weight",),
    down="model.layers.{i}.mlp.down_proj.weight",
)


class Phi35Vision(Family):
    """Tokenizer, chat template and image preprocessing of Phi-3.5-vision."""

    name: ClassVar[str] = "phi3_5_vision"
    model_type: ClassVar[str] = "phi3_v"
    published_context: ClassVar[int] = 131_072
    tied: ClassVar[dict[str, str]] = {f"{_V}.wte.weight": _NAMES.embedding}
    """The image embedder holds the text embedding as well; full fine-tunes store it under both names, or this one."""

    def __init__(
        self, vision: VisionSize, language: LanguageSize, tokenizer: Tokenizer | None, num_crops: int = NUM_CROPS
    ) -> None:
        super().__init__(vision, language, tokenizer)
        self.num_crops = num_crops
        if tokenizer is None:
            return
        piece = tokenizer.id
        self._begin, self._user, self._end, self._assistant = (
            piece(name) for name in ("<s>", "<|user|>", "<|end|>", "<|assistant|>")
        )
        # Image places hold this id; features replace its embedding.
        self._image = piece("<unk>")
        self._newline = tokenizer.encode("\n")
        self._set_stop([piece(name) for name in STOP])

    @classmethod
    def from_config(cls, config: dict[str, Any], tokenizer: Tokenizer | None) -> Phi35Vision:
        """See :meth:`Family.from_config`."""
        return cls(*cls.sizes(config), tokenizer, int(config.get("num_crops", NUM_CROPS)))

    @classmethod
    def sizes(cls, config: dict[str, Any]) -> tuple[VisionSize, LanguageSize]:
        """See :meth:`Family.sizes`."""
        where = "config.json of phi3_5_vision"
        image = number(config, where, "embd_layer")
        expect(image, f"{where}, embd_layer", embedding_cls="image", hd_transform_order="sub_glb")
        expect(image, f"{where}, embd_layer", projection_cls="mlp", use_hd_transform=True)
        expect(image, f"{where}, embd_layer", with_learnable_separator=True)
        expect(config, where, hidden_act="silu", tie_word_embeddings=False, attention_bias=False)
        processor = number(config, where, "img_processor")
        expect(processor, f"{where}, img_processor", name="clip_vision_model", layer_idx=-2, type_feature="patch")
        clip = {**_CLIP, **processor.get("vision_config", {})}
        expect(clip, f"{where}, img_processor.vision_config", hidden_act="quick_gelu", num_channels=3)
        vision = VisionSize(
            clip["image_size"], clip["patch_size"], clip["hidden_size"], clip["intermediate_size"],
            clip["num_hidden_layers"], clip["num_attention_heads"], float(clip["layer_norm_eps"]),
            activation="quick_gelu", patch_bias=False, layer_scale=False, pre_norm=True, post_norm="kept",
            unused_layers=1, connector="hd_transform",
        )  # fmt: skip
        if vision.grid % 2:
            raise ValueError(f"{where}: {vision.grid} patches along a crop cannot be merged two by two")
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        hidden, ffn, layers, heads = (number(config, where, key) for key in keys)
        kv_heads = config.get("num_key_value_heads") or heads
        rotary = rotary_settings(config, where, "longrope")
        language = LanguageSize(
            hidden, ffn, layers, heads, kv_heads, hidden // heads, number(config, where, "vocab_size"),
            rotary.theta, float(config.get("rms_norm_eps", 1e-5)),
            rope_scaling=longrope(rotary, config, where, hidden // heads),
            context=config.get("max_position_embeddings"),
        )  # fmt: skip
        return vision, language

    @classmethod
    def weight_map(cls, config: dict[str, Any], head: Head = "vocabulary") -> list[Mapping]:
        """See :meth:`Family.weight_map`. What CLIP has and nothing uses is mapped like everything else."""
        vision, language = cls.sizes(config)
        C, H, positions = vision.hidden, language.hidden, 1 + vision.grid**2

        def reshaped(ours: str, theirs: str, shape: tuple[int, ...], original: tuple[int, ...]) -> Mapping:
            return Mapping(ours, shape, (Source(theirs, original),))

        maps = [
            reshaped("vision.class_embedding", f"{_C}.embeddings.class_embedding", (1, 1, C), (C,)),
            reshaped(
                "vision.position_embedding", f"{_C}.embeddings.position_embedding.weight",
                (1, positions, C), (positions, C),
            ),
            *patch_map(vision, f"{_C}.embeddings.patch_embedding"),
            *norms("vision.pre_norm", f"{_C}.pre_layrnorm", C),
            *norms("vision.post_norm", f"{_C}.post_layernorm", C),
            *clip_layer_map(vision, f"{_C}.encoder.layers"),
            reshaped("connector.newline", f"{_V}.sub_GN", (4 * C,), (1, 1, 1, 4 * C)),
            reshaped("connector.separator", f"{_V}.glb_GN", (4 * C,), (1, 1, 4 * C)),
            *linear("connector.mlp.fc1", f"{_V}.img_projection.0", H, 4 * C, "column"),
            *linear("connector.mlp.fc2", f"{_V}.img_projection.2", H, H, "row"),
        ]  # fmt: skip
        return maps + language_map(language, _NAMES, head)

    @classmethod
    def load_tokenizer(cls, directory: Path) -> Tokenizer:
        """See :meth:`Family.load_tokenizer`: ``tokenizer.json``."""
        return FastTokenizer(required_file(directory, "tokenizer.json"))

    @staticmethod
    def published_image_cost(width: int, height: int) -> tuple[int, int]:
        """See :meth:`Family.published_image_cost`."""
        rows, columns = hd_grid(width, height, NUM_CROPS, 336)
        return 1 + rows * columns, features_of(rows, columns, 12)

    def prompt(self, query: Query) -> Prompt:
        """Chat template and pixels of a query. Raises OSError or ValueError naming an unreadable image."""
        crops = [self.crops(image) for image in query.images]
        grids = [(rows, columns) for _, rows, columns in crops]
        tokens, positions = self._layout(query.question, grids)
        if not crops:
            return Prompt(tokens, [], None)
        return Prompt(tokens, positions, torch.cat([x for x, _, _ in crops]), torch.tensor(grids, device="cpu"))

    def prompt_length(self, question: str, sizes: Sequence[tuple[int, int]]) -> int:
        """See :meth:`Family.prompt_length`."""
        grids = [hd_grid(width, height, self.num_crops, self.vision.image_size) for width, height in sizes]
        return len(self._layout(question, grids)[0])

    def _layout(self, question: str, grids: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """(token ids, where features go) of a question about images of so many (rows, columns) of crops each."""
        tokens, positions = [self._begin, self._user], list[int]()
        text = "\n"
        for rows, columns in grids:
            tokens += self.tokenizer.encode(text)
            count = self.image_tokens(rows, columns)
            positions += range(len(tokens), len(tokens) + count)
            tokens += [*[self._image] * count, self._begin]
        tokens += self.tokenizer.encode(text + question)
        # The assistant's mark swallows the newline behind it.
        tokens += [self._end, *self._newline, self._assistant]
        return tokens, positions

    def response_tokens(self, text: str) -> list[int]:
        """Token ids of a whole written-out response, stop token included."""
        return [*self.tokenizer.encode(text), self._end]

    def image_tokens(self, rows: int, columns: int) -> int:
        """Features of an image of so many crops: the picture with newlines, a separator, the global view."""
        return features_of(rows, columns, self.vision.grid // 2)

    def crops(self, image: ImageRef) -> tuple[Tensor, int, int]:
        """(float32 [1 + rows * columns, 3, S, S], the global view first; rows; columns) of one image."""
        with opened(image, self.pictures) as picture:
            return self.cut(hd_image(picture, self.num_crops, self.vision.image_size))

    def cut(self, padded: Image.Image) -> tuple[Tensor, int, int]:
        """See :meth:`crops`, of a picture that is scaled and padded already."""
        S = self.vision.image_size
        rows, columns = padded.height // S, padded.width // S
        whole = normalised([padded], IMAGE_MEAN, IMAGE_STD)
        # Not antialiased, and of the normalised picture: as in the original.
        view = torch.nn.functional.interpolate(whole, (S, S), mode="bicubic", align_corners=False)
        pieces = whole.view(3, rows, S, columns, S).permute(1, 3, 0, 2, 4).reshape(-1, 3, S, S)
        return torch.cat([view, pieces]), rows, columns


def features_of(rows: int, columns: int, side: int) -> int:
    """Features of an image of so many crops of ``side`` x ``side`` features: see :meth:`Phi35Vision.image_tokens`."""
    return rows * side * (columns * side + 1) + 1 + side * (side + 1)


def hd_size(width: int, height: int, num_crops: int, crop: int) -> tuple[int, int, int]:
    """(width, height, padded height) of a landscape picture in the HD transform, in pixels."""
    ratio = width / height
    scale = 1
    while scale * math.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    new_width = scale * crop
    # The original cannot scale a picture to no height at all; one of that shape is a line here.
    new_height = max(int(new_width / ratio), 1)
    return new_width, new_height, math.ceil(new_height / crop) * crop


def hd_grid(width: int, height: int, num_crops: int, crop: int) -> tuple[int, int]:
    """(rows, columns) of the crops of a picture of so many pixels."""
    long, _, short = hd_size(max(width, height), min(width, height), num_crops, crop)
    return (short // crop, long // crop) if width >= height else (long // crop, short // crop)


def hd_image(picture: Image.Image, num_crops: int, crop: int) -> Image.Image:
    """Scale a picture to as many crops as allowed and pad its short side with white to whole crops."""
    upright = picture.width < picture.height
    if upright:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    width, height, padded = hd_size(picture.width, picture.height, num_crops, crop)
    scaled = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    top = (padded - height) // 2
    whole = np.full((padded, width, 3), 255, dtype=np.uint8)
    whole[top : top + height] = scaled
    result = Image.fromarray(whole)
    return result.transpose(Image.Transpose.TRANSPOSE) if upright else result
