"""From settings to a family and its model."""

from __future__ import annotations

import torch

from mstar_mega.config import Config
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.models.initialization import initialize_weights
from mstar_mega.models.lmm import LMM, Head, LanguageSize, VisionSize, transformer_config
from mstar_mega.platform.distributed import device

FAMILIES = {"internvl2": InternVL2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_family(config: Config) -> InternVL2:
    """The policy family of the settings. Raises ValueError for an unknown name or size."""
    if config.model.family not in FAMILIES:
        raise ValueError(f"model.family {config.model.family!r} is unknown; known: {', '.join(FAMILIES)}")
    return FAMILIES[config.model.family](config.model.size)


def check_divisible(config: Config, vision: VisionSize, language: LanguageSize) -> None:
    """Raise ValueError, with the numbers, where a size cannot be cut over the tensor or pipeline ranks."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    cut = {
        "attention heads": language.heads,
        "key-value heads": language.kv_heads,
        "feed-forward channels": language.ffn,
        "vision heads": vision.heads,
        "vision feed-forward channels": vision.ffn,
    }
    for what, number in cut.items():
        if number % tensor:
            raise ValueError(
                f"parallel.tensor {tensor} does not divide the model's {number} {what} "
                f"({config.model.family}, {config.model.size}); use a divisor of {number}"
            )
    if language.layers % pipeline:
        raise ValueError(
            f"parallel.pipeline {pipeline} does not divide the model's {language.layers} layers "
            f"({config.model.family}, {config.model.size}); use a divisor of {language.layers}"
        )


def build_model(config: Config, family: InternVL2, head: Head = "vocabulary") -> LMM:
    """This rank's stage of the model with seeded random weights, on this rank's device."""
    check_divisible(config, family.vision, family.language)
    dtype = DTYPES[config.model.precision]
    transformer = transformer_config(
        family.language,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        sequence=config.parallel.sequence,
        dtype=dtype,
        recompute=config.model.recompute,
    )
    model = LMM(family.vision, family.language, transformer, head)
    initialize_weights(model, config.seed)
    return model.to(device=device(), dtype=dtype)
