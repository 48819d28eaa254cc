"""What is in a checkpoint, told from headers and indices alone: no weights are read."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping as Dictionary
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from mstar_mega.checkpoint_tools.hf_files import INDEX, SINGLE, HFWeights, TensorInfo
from mstar_mega.checkpoint_tools.maps import map_of
from mstar_mega.checkpoint_tools.megatron_files import MegatronWeights, Parameter
from mstar_mega.checkpoint_tools.runs import run_config
from mstar_mega.models.description import MODEL_FILES, other_kind, read_config
from mstar_mega.models.mapping import head_of
from mstar_mega.platform.inputs import checked
from mstar_mega.platform.terminal import say
from mstar_mega.training.checkpoint import find_checkpoints
from mstar_mega.training.manifest import MANIFEST, DamagedCheckpointError, read_manifest

_PARTS = (
    ("vision tower", r"vision[._].*|vpm\..*|model\.vision_embed_tokens\.img_processor\..*"),
    ("connector", r"connector\..*|mlp1\..*|resampler\..*|model\.vision_embed_tokens\..*|multi_modal_projector\..*"),
    ("embedding", r".*(tok_embeddings|embed_tokens|word_embeddings)\.weight"),
    ("vocabulary head", r".*(output_layer|lm_head|language_model\.output)\.weight"),
    ("score head", r"score_head.*|likelihood_weights"),
    ("language layers", r".*"),
)
"""First match wins; names of all families and of ours."""


class _Conversion(BaseModel):
    tensor: int
    pipeline: int


class _Position(BaseModel):
    step: int
    iteration: int
    total_steps: int
    temperature: float | None = None


class _Common(BaseModel):
    """What is shown of a checkpoint's common state."""

    conversion: _Conversion | None = None
    position: _Position | None = None
    stage: str | None = None


_COMMON = TypeAdapter(_Common)


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found, in the order in which it is shown."""

    lines: list[tuple[str, str]]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self.lines)


def inspect(path: Path) -> list[Inspection]:
    """One result for a checkpoint, one for the newest checkpoint of each stage of a run directory.

    Raises ValueError where ``path`` is none of these, or its index or headers are damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such directory")
    if (path / MANIFEST).exists() or (path / ".metadata").exists():
        return [_megatron(path)]
    if (path / INDEX).exists() or (path / SINGLE).exists():
        return [_hugging_face(path)]
    stages = path / "checkpoints"
    if stages.is_dir():
        newest = [found[0] for stage in sorted(stages.iterdir()) if (found := find_checkpoints(stage))]
        if newest:
            return [_megatron(each) for each in newest]
        raise ValueError(f"{path} is a run directory without a finished checkpoint")
    if other := other_kind(path):
        raise ValueError(other)
    raise ValueError(
        f"{path} is no checkpoint: expected {INDEX}, {SINGLE}, {MANIFEST}, or a run directory with checkpoints/"
    )


def _hugging_face(path: Path) -> Inspection:
    weights = HFWeights(path)
    lines = [
        ("checkpoint", str(path)),
        ("format", f"Hugging Face, safetensors, {_files(len({t.file for t in weights.tensors.values()}))}"),
    ]
    lines += _model_lines(path, weights.tensors)
    return Inspection(lines + _parameter_lines(weights.tensors))


def _megatron(path: Path) -> Inspection:
    manifest, problem = read_manifest(path)
    if problem:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {problem}")
    weights = MegatronWeights(path)
    common = checked(_COMMON, manifest["common"], f"{path / MANIFEST}: common")
    files = sum(name.endswith(".distcp") for name in manifest["files"])
    size = sum(size for size, _ in manifest["files"].values())
    lines = [
        ("checkpoint", str(path)),
        ("format", f"megatron torch_dist, {_files(files)}, {size:,} bytes (loads at any tensor x pipeline)"),
    ]
    if (cut := common.conversion) is not None:
        lines.append(("cut for", f"tensor {cut.tensor} x pipeline {cut.pipeline}"))
    if (at := common.position) is not None:
        lines.append(("stage", str(common.stage)))
        lines.append(("step", f"{at.step} of iteration {at.iteration}; {at.total_steps} in total"))
        lines += [("temperature", str(at.temperature))] if at.temperature is not None else []
    if run := _run_model(path):
        lines.append(("run's model", run))
    lines += _model_lines(path / MODEL_FILES, weights.parameters)
    lines += _parameter_lines(weights.parameters)
    if weights.optimizer_bytes:
        lines.append(("optimizer state", f"{weights.optimizer_bytes:,} bytes"))
    return Inspection(lines)


def _run_model(path: Path) -> str:
    """Family, size and layout of the run that the checkpoint lies in."""
    config = run_config(path)
    if config is None:
        return ""
    layout = f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline}"
    return f"{config.model.family}, {config.model.checkpoint or config.model.size}, {config.model.precision}, {layout}"


def _model_lines(folder: Path, tensors: Dictionary[str, Any]) -> list[tuple[str, str]]:
    if not (folder / "config.json").is_file():
        return []
    config = read_config(folder)
    try:
        model = map_of(config, head_of(tensors), folder / "config.json")
    except ValueError as error:
        return [("family", f"not known ({error})"), ("model_type", json.dumps(config.get("model_type")))]
    v, t = model.vision, model.language
    heads = f"heads {t.heads}/{t.kv_heads} of {t.head_dim}"
    pixels = f"{v.image_size} px in patches of {v.patch_size}"
    return [
        ("family", f"{model.family}, {model.head} head"),
        ("language", f"{t.layers} layers, hidden {t.hidden}, ffn {t.ffn}, {heads}, vocabulary {t.vocab}"),
        ("rotary", f"theta {t.rope_theta:,.0f}, {t.rope_scaling or 'no scaling'}"),
        ("vision", f"{v.layers} layers, hidden {v.hidden}, ffn {v.ffn}, heads {v.heads}, {pixels}"),
    ]


def _parameter_lines(tensors: Dictionary[str, TensorInfo] | Dictionary[str, Parameter]) -> list[tuple[str, str]]:
    counts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        values = 1
        for side in tensor.shape:
            values *= side
        counts[_part(name)] += values
        dtypes[str(tensor.dtype).removeprefix("torch.")] += values
    lines = [(part, f"{counts[part]:,}") for part, _ in _PARTS if counts[part]]
    total = sum(counts.values())
    shown = ", ".join(f"{name}" if len(dtypes) == 1 else f"{name} ({n:,})" for name, n in dtypes.most_common())
    return [*lines, ("all parameters", f"{total:,} in {len(tensors)} tensors"), ("dtype", shown)]


def _files(count: int) -> str:
    return f"{count} file{'s' if count != 1 else ''}"


def _part(name: str) -> str:
    return next(part for part, pattern in _PARTS if re.fullmatch(pattern, name, re.DOTALL))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``mstar inspect``."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="a Hugging Face directory, a checkpoint or a run")


def run(options: argparse.Namespace) -> None:
    """``mstar inspect``."""
    say("\n\n".join(map(str, inspect(options.directory))))
