"""Which family a model directory holds: from its own files, without running any code that lies in it.

A model directory is one from Hugging Face, or the folder :data:`MODEL_FILES` inside a converted checkpoint, which holds
the same files without the weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mstar_mega.models.config_schema import check_config
from mstar_mega.models.families import FAMILIES
from mstar_mega.models.families.base import Family
from mstar_mega.platform.files import refuse_lfs_pointer
from mstar_mega.platform.inputs import read_object

ADAPTER = "adapter_config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_FILES = "model"
"""Folder inside a converted checkpoint."""
MOST_BYTES = 1 << 24
"""Of a config.json."""


def read_config(directory: str | Path) -> dict[str, Any]:
    """The content of config.json. Raises FileNotFoundError or ValueError naming the file."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        if other := other_kind(directory):
            raise ValueError(other)
        name = str(directory)
        hub = (
            f". Is it a hub name? `hf download {name} --local-dir DIR`, then give DIR"
            if _HUB_NAME.fullmatch(name)
            else ""
        )
        raise FileNotFoundError(f"{path} is missing: {directory} is not a model directory{hub}")
    refuse_lfs_pointer(path)
    return read_object(path, MOST_BYTES)


def other_kind(directory: str | Path) -> str:
    """What a directory without the weights of a whole model as safetensors holds instead, and what to do with it; empty
    where nothing is recognised."""
    directory = Path(directory)
    if (directory / ADAPTER).is_file():
        base = read_object(directory / ADAPTER, MOST_BYTES).get("base_model_name_or_path") or "its base model"
        return (
            f"{directory} holds an adapter (PEFT, LoRA), not a whole model: merge it into {base} (peft's "
            "merge_and_unload), save the merged model with save_pretrained and convert that"
        )
    for pattern, what in (("*.gguf", "GGUF weights"), ("*.bin", "PyTorch weights"), ("*.pth", "PyTorch weights")):
        found = sorted(path.name for path in directory.glob(pattern))
        if found:
            return f"{directory} holds {what} ({found[0]}); only safetensors are read: download or save those"
    return ""


def family_class(config: dict[str, Any]) -> type[Family]:
    """The family of a config.json. Raises ValueError for another model type, and for values that no model has."""
    for family in FAMILIES.values():
        if family.model_type == config.get("model_type"):
            check_config(config)
            return family
    known = ", ".join(f"{family.model_type} ({name})" for name, family in FAMILIES.items())
    raise ValueError(f"config.json has model_type {config.get('model_type')!r}; supported are {known}")


def family_from_hf(directory: str | Path, with_tokenizer: bool = True) -> Family:
    """The family that a model directory holds, at its sizes and with its own tokenizer.

    Raises:
        FileNotFoundError: config.json or a tokenizer file is missing; it is named.
        ValueError: another model type or version, or a file that is not what it should be; it is named.
    """
    directory = Path(directory)
    config = read_config(directory)
    if "num_crops" not in config and (directory / "preprocessor_config.json").is_file():
        processor = read_object(directory / "preprocessor_config.json", MOST_BYTES)
        config |= {key: processor[key] for key in ("num_crops",) if key in processor}
    try:
        family = family_class(config)
        family.sizes(config)
    except KeyError as error:
        raise ValueError(f"{directory / 'config.json'}: key {error} is missing, which the family needs") from None
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None
    return family.from_config(config, family.load_tokenizer(directory) if with_tokenizer else None)
