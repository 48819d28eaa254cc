"""From a config.json to the family that it belongs to, its sizes and its weight map."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mstar_mega.models.description import family_class
from mstar_mega.models.mapping import Head, Mapping
from mstar_mega.models.sizes import LanguageSize, VisionSize

HEADS: tuple[Head, ...] = ("vocabulary", "linear", "likelihood")


@dataclass(frozen=True)
class ModelMap:
    """What conversion needs to know of a model."""

    family: str
    head: Head
    vision: VisionSize
    language: LanguageSize
    mappings: list[Mapping]
    tied: dict[str, str] = field(default_factory=dict)
    """See ``Family.tied``."""

    @property
    def layers(self) -> int:
        """Layers of the language model."""
        return self.language.layers


def map_of(config: dict[str, Any], head: str, file: Path) -> ModelMap:
    """The model of a config.json (``file`` is named in errors). Raises ValueError for a family that is not known."""
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"{file}: quantization_config says that the weights are quantized ({method}); they are converted and "
            "trained as floats only: take the model as published, unquantized"
        )
    if head not in HEADS:
        raise ValueError(f"{file}: head {head!r} is unknown; known: {', '.join(HEADS)}")
    try:
        family = family_class(config)
        vision, language = family.sizes(config)
        mappings = family.weight_map(config, head)
    except KeyError as error:
        raise ValueError(f"{file}: key {error} is missing, which the family needs") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    sources = [source.name for mapping in mappings for source in mapping.sources]
    assert len(set(sources)) == len(sources), "a source stands in two mappings"
    return ModelMap(family.name, head, vision, language, mappings, family.tied)
