"""From settings to a family and its model."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from mstar_mega.config import Config, ModelConfig
from mstar_mega.data.pictures import PictureReading
from mstar_mega.models.description import MODEL_FILES, family_from_hf
from mstar_mega.models.families import FAMILIES
from mstar_mega.models.families.base import Family
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.models.initialization import initialize_weights
from mstar_mega.models.lmm import LMM, transformer_config
from mstar_mega.models.mapping import Head
from mstar_mega.models.sizes import LanguageSize, VisionSize, cut_over_tensor_ranks, layers_of_stages
from mstar_mega.platform.distributed import device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_family(config: Config) -> Family:
    """The policy family of the settings: that of ``model.checkpoint``, or a named size.

    Raises ValueError for an unknown name or size, or where the checkpoint is of another family.
    """
    family = _family(config.model)
    family.pictures = PictureReading.of(config.data)
    return family


def _family(model: ModelConfig) -> Family:
    if model.family not in FAMILIES:
        raise ValueError(f"model.family {model.family!r} is unknown; known: {', '.join(FAMILIES)}")
    if model.checkpoint is not None:
        family = family_from_hf(Path(model.checkpoint) / MODEL_FILES)
        if family.name != model.family:
            raise ValueError(f"model.checkpoint {model.checkpoint} is of family {family.name}, not {model.family}")
        return family
    if model.family != InternVL2.name:
        raise ValueError(
            f"model.family {model.family} has no named sizes: convert its weights with `mstar convert hf-to-megatron` "
            "and set model.checkpoint to the result"
        )
    return InternVL2(model.size)


def check_divisible(config: Config, vision: VisionSize, language: LanguageSize) -> None:
    """Raise ValueError, with the numbers, where a size cannot be cut over the tensor or pipeline ranks."""
    tensor = config.parallel.tensor
    cut = cut_over_tensor_ranks(vision, language)
    for what, number in cut.items():
        if number % tensor:
            raise ValueError(
                f"parallel.tensor {tensor} does not divide the model's {number} {what} "
                f"({config.model.family}, {config.model.size}); use a divisor of {math.gcd(*cut.values())}"
            )
    layers_of_stages(language.layers, config.parallel.pipeline, config.parallel.first_stage_layers)


def build_model(config: Config, family: Family, head: Head = "vocabulary", draw: bool = True) -> LMM:
    """This rank's stage of the model with seeded random weights, on this rank's device.

    ``draw`` is false where other weights are put over them: at published sizes drawing takes long. Until then they are
    NaN.
    """
    check_divisible(config, family.vision, family.language)
    dtype = DTYPES[config.model.precision]
    transformer = transformer_config(
        family.language,
        dtype=dtype,
        parallel=config.parallel,
        recompute=config.model.recompute,
        fused=device().type == "cuda" if config.model.fused_layers is None else config.model.fused_layers,
    )
    model = LMM(family.vision, family.language, transformer, head, config.model.recompute_vision)
    initialize_weights(model, config.seed, draw)
    return model.to(device=device(), dtype=dtype)
