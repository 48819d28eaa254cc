"""A checkpoint's features, logits and greedy tokens against a recorded case of the original implementation.

    mstar verify --checkpoint DIR --golden CASE.safetensors
    torchrun --nproc-per-node 4 -m mstar_mega.cli verify --parallel.tensor 2 --parallel.pipeline 2 --checkpoint DIR ...

A case is a safetensors file with the inputs (``input_ids``, ``pixel_values``, and ``image_flags``, ``image_sizes`` or
``tgt_sizes``, ``image_bound``, ``slice_sample_index``) and the expected ``vision_features``, ``logits`` and
``greedy_tokens``. A ``meta.json`` beside it may hold ``img_context_token_id``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mstar_mega.checkpoint_tools.hf_files import HFWeights
from mstar_mega.checkpoint_tools.native import context_token
from mstar_mega.config import Config, ModelConfig, ParallelConfig
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.models import golden
from mstar_mega.models.build import build_model
from mstar_mega.models.description import MODEL_FILES, family_from_hf, read_config
from mstar_mega.models.families.base import Family
from mstar_mega.models.lmm import LMM
from mstar_mega.models.weights import load_originals
from mstar_mega.platform import distributed
from mstar_mega.platform.inputs import must_be_regular, read_object
from mstar_mega.platform.terminal import say
from mstar_mega.recipe.directory import check_shared
from mstar_mega.training.checkpoint import load_checkpoint

FEATURES, LOGITS = 1e-4, 5e-4
"""Largest differences in float32 that rounding explains."""


class _Silent:
    """No token ends a recorded sequence and none is banned."""

    stop_tokens: frozenset[int] = frozenset()
    banned_tokens: list[int] = []


@dataclass(frozen=True)
class Differences:
    """Of one case."""

    case: str
    features: float | None
    """Largest absolute difference; None where the case has no image."""
    logits: float
    tokens: int
    """Greedy tokens compared."""
    other_tokens: int
    """Greedy tokens that differ."""

    def __str__(self) -> str:
        features = "none recorded" if self.features is None else f"{self.features:.2e}"
        return (
            f"{self.case}: largest difference of features {features}, of logits {self.logits:.2e}; greedy tokens "
            f"{self.tokens - self.other_tokens} of {self.tokens} equal"
        )

    def excess(self, features: float, logits: float) -> list[str]:
        """What lies above these tolerances; every other greedy token does."""
        found = []
        if self.features is not None and not self.features <= features:
            found.append(f"features differ by {self.features:.2e} (tolerance {features:g})")
        if not self.logits <= logits:
            found.append(f"logits differ by {self.logits:.2e} (tolerance {logits:g})")
        if self.other_tokens:
            found.append(f"{self.other_tokens} of {self.tokens} greedy tokens differ")
        return found


def open_checkpoint(directory: Path, parallel: ParallelConfig, model: ModelConfig) -> tuple[LMM, Family]:
    """This rank's part of a checkpoint's policy; ``directory`` may also be one from Hugging Face. Collective."""
    is_ours = (directory / MODEL_FILES).is_dir()
    files = directory / MODEL_FILES if is_ours else directory
    family = family_from_hf(files, with_tokenizer=False)
    module = build_model(Config(parallel=parallel, model=model), family)
    if is_ours:
        state, _ = load_checkpoint(directory, {"model": module.sharded_state_dict()})
        module.load_state_dict(state["model"])
    else:
        load_originals(module, family.weight_map(read_config(files)), HFWeights(directory, family.tied).read)
    return module, family


def read_golden(file: Path) -> dict[str, Tensor]:
    """The tensors of a case. Raises ValueError naming the file and what it lacks."""
    try:
        must_be_regular(file)
        recorded = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{file} is not a safetensors file with a recorded case ({error})") from error
    lacks = [name for name in ("input_ids", "logits", "greedy_tokens") if name not in recorded]
    if lacks:
        raise ValueError(f"{file} has no {' and no '.join(lacks)}: it is not a recorded case")
    return recorded


def compare(model: LMM, family: Family, file: Path, image_token: int | None) -> Differences:
    """Run one case through the full forward and through the generation engine. Collective over the model copy."""
    recorded = read_golden(file)
    case = golden.read_case(recorded, family.vision, image_token)
    found = golden.features(model, case)
    features = None
    if found is not None and "vision_features" in recorded:
        expected = recorded["vision_features"]
        if expected.dim() == 3:
            expected = expected[case.kept].flatten(0, 1)
        features = _largest(found, expected, file, "vision_features")
    logits = _largest(golden.logits(model, case), recorded["logits"], file, "logits")
    greedy = recorded["greedy_tokens"]
    engine = Engine(model, _Silent(), golden.greedy_settings(greedy.size(1)), 0)
    results = engine.generate([Request(prompt, [SampleSpec(0)]) for prompt in case.prompts], 0.0)
    drawn = torch.tensor([samples[0].tokens for samples in results], device="cpu")
    other = int((drawn != greedy).sum())
    return Differences(file.name, features, logits, greedy.numel(), other)


def _largest(found: Tensor, expected: Tensor, file: Path, what: str) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"{file}: {what} is {list(expected.shape)}, but this model gives {list(found.shape)}")
    return float((found.cpu() - expected.float().cpu()).abs().max())


def _image_token(checkpoint: Path, case: Path) -> int | None:
    """The id under which the case holds image places, from the case's own notes or the model's tokenizer."""
    meta = case.parent / "meta.json"
    if meta.is_file() and "img_context_token_id" in (notes := read_object(meta)):
        if not isinstance(notes["img_context_token_id"], int):
            raise ValueError(f"{meta}: img_context_token_id is not a whole number")
        return int(notes["img_context_token_id"])
    files = checkpoint / MODEL_FILES
    try:
        return context_token(files if files.is_dir() else checkpoint)
    except ValueError:
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``mstar verify``."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="ours, or from Hugging Face")
    parser.add_argument("--golden", type=Path, required=True, nargs="+", metavar="CASE.safetensors", help="case files")
    parser.add_argument(
        "--parallel.tensor", "--tensor", dest="tensor", type=int, default=1, metavar="N",
        help="tensor-parallel ranks (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--parallel.pipeline", "--pipeline", dest="pipeline", type=int, default=1, metavar="N",
        help="pipeline stages (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)"
    )
    text = "largest difference allowed (default: %(default)s)"
    parser.add_argument("--features-tolerance", type=float, default=FEATURES, help=text)
    parser.add_argument("--logits-tolerance", type=float, default=LOGITS, help=text)


def run(options: argparse.Namespace) -> None:
    """``mstar verify``. Collective. Raises ValueError where a case differs by more than the tolerance."""
    parallel = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    distributed.initialize(parallel, 0)
    is_ours = (options.checkpoint / MODEL_FILES).is_dir()
    check_shared("--checkpoint", options.checkpoint, holds=f"{MODEL_FILES}/config.json" if is_ours else "config.json")
    for file in options.golden:
        check_shared("--golden", file)
        read_golden(file)
    model, family = open_checkpoint(options.checkpoint, parallel, ModelConfig(precision=options.precision))
    problems = []
    for file in options.golden:
        differences = compare(model, family, file, _image_token(options.checkpoint, file))
        if dist.get_rank() == 0:
            say(differences)
        excess = differences.excess(options.features_tolerance, options.logits_tolerance)
        problems += [f"{file.name}: {text}" for text in excess]
    distributed.shutdown()
    if problems:
        raise ValueError(f"{options.checkpoint} is not the recorded model: {'; '.join(problems)}")
