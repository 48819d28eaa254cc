"""What a conversion refuses before it writes anything: weights that are not exactly the model of their config.json."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from mstar_mega.checkpoint_tools.hf_files import HFWeights
from mstar_mega.checkpoint_tools.maps import ModelMap
from mstar_mega.checkpoint_tools.megatron_files import MegatronWeights
from mstar_mega.models.description import family_from_hf
from mstar_mega.platform.distributed import broadcast_object

_LISTED = 30
_QUANTIZED = (".absmax", ".quant_map", ".SCB", ".qweight", ".qzeros", ".g_idx", ".weight_scale", ".weight_scale_inv")
"""Ends of the names that bitsandbytes, GPTQ, AWQ and float8 formats store beside their weights."""


Shape = tuple[int, ...]


def check_sources(hf: Path, model: ModelMap, weights: HFWeights) -> None:
    """Raises ValueError where the weights on disk are not exactly those that the model is made of."""
    wanted = {source.name: source.shape for mapping in model.mappings for source in mapping.sources}
    _refuse_other_weights(hf, weights, wanted)
    found = {name: (tensor.shape, f"{tensor.file.name}: {name}") for name, tensor in weights.tensors.items()}
    _check_shapes(hf, model.family, wanted, found)


def _refuse_other_weights(hf: Path, weights: HFWeights, wanted: Collection[str]) -> None:
    """Raises ValueError for quantized weights and adapters, whose names alone would tell a user nothing."""
    for name, tensor in weights.tensors.items():
        is_float = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        if name.endswith(_QUANTIZED) or (name in wanted and not is_float):
            raise ValueError(
                f"{tensor.file}: {name} ({str(tensor.dtype).removeprefix('torch.')}) belongs to quantized weights, and "
                f"{hf} can be converted as floats only: take the model as published, unquantized"
            )
        if ".lora_" in name:
            raise ValueError(
                f"{tensor.file}: {name} belongs to an adapter (LoRA): merge it into its base model (peft's "
                "merge_and_unload), save the merged model and convert that"
            )


def check_tokenizer(hf: Path) -> None:
    """Raises ValueError for a tokenizer that no job could use. A directory may have none: weights alone convert."""
    with suppress(FileNotFoundError):
        family_from_hf(hf)


def check_parameters(checkpoint: Path, model: ModelMap, weights: MegatronWeights) -> None:
    """Raises ValueError where a checkpoint has not exactly the parameters of the model."""
    wanted = {mapping.name: mapping.shape for mapping in model.mappings}
    found = {name: (parameter.shape, name) for name, parameter in weights.parameters.items()}
    _check_shapes(checkpoint, model.family, wanted, found)


def _check_shapes(place: Path, family: str, wanted: dict[str, Shape], found: dict[str, tuple[Shape, str]]) -> None:
    """Raises ValueError when names or shapes differ; beside each found shape stands what a message calls its tensor."""
    problems = [
        *_listed("missing", [f"{name} {list(wanted[name])}" for name in wanted if name not in found]),
        *_listed(f"not known to {family}", [name for name in found if name not in wanted]),
    ]
    for name, (shape, shown) in found.items():
        if name in wanted and shape != wanted[name]:
            problems.append(f"{shown} is {list(shape)}, expected {list(wanted[name])}")
    if problems:
        raise ValueError(f"{place} does not hold the model of its config.json: {'; '.join(problems[:_LISTED])}")


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{len(names)} {what}: {', '.join(names[:_LISTED])}{more}"]


def check_layout(model: ModelMap, tensor: int, pipeline: int) -> None:
    """Raises ValueError where the model cannot be cut over so many ranks."""
    if tensor < 1 or pipeline < 1:
        raise ValueError(f"--tensor {tensor} --pipeline {pipeline}: both must be at least 1")
    if model.layers % pipeline:
        raise ValueError(f"--pipeline {pipeline} does not divide the model's {model.layers} layers")
    for mapping in model.mappings:
        cuts = {"column": mapping.shape[0], "gated": mapping.shape[0] // 2, "row": mapping.shape[-1]}
        if cuts.get(mapping.layout, tensor) % tensor:
            raise ValueError(f"--tensor {tensor} does not divide the {cuts[mapping.layout]} channels of {mapping.name}")


def must_be_free(out: Path) -> None:
    """Raises ValueError where something is already there. Collective."""
    if broadcast_object(out.is_symlink()):
        raise ValueError(f"--out {out} is a link: name the directory itself that the result goes to")
    taken = broadcast_object(out.exists() and (not out.is_dir() or any(out.iterdir())))
    if taken:
        raise ValueError(f"--out {out} exists and is not empty; choose another or remove it")
