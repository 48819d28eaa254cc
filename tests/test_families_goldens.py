"""Every recorded case of the three originals, in every layout: features, logits, and greedy tokens with both caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel import run_parallel
from safetensors.torch import load_file
from torch import Tensor

from mstar_mega.config import Config, ParallelConfig
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.models import golden
from mstar_mega.models.build import build_model
from mstar_mega.models.description import family_from_hf, read_config
from mstar_mega.models.families.base import Family
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import Prompt
from mstar_mega.models.vision import strip_positions
from mstar_mega.models.weights import load_originals
from mstar_mega.platform import distributed

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"
MODELS = ("internvl2", "phi3_5_vision", "minicpm_llama3_v2_5")
FEATURES, LOGITS = 1e-4, 5e-4
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the originals' outputs do not lie beside the project")


class Silent:
    """No token ends a recorded sequence and none is banned."""

    stop_tokens: frozenset[int] = frozenset()
    banned_tokens: list[int] = []


def open_model(directory: Path, parallel: ParallelConfig) -> tuple[LMM, Family]:
    """The tiny original in our modules."""
    distributed.initialize(parallel, 0)
    family = family_from_hf(directory, with_tokenizer=False)
    model = build_model(Config(parallel=parallel), family)
    source = load_file(directory / "model.safetensors")
    load_originals(model, family.weight_map(read_config(directory)), source.__getitem__)
    return model, family


def greedy_without_cache(model: LMM, case: golden.Case, count: int) -> Tensor:
    """Greedy tokens, int64 [rows, count], the whole sequence computed anew for each. Collective."""
    prompts = [Prompt(list(p.tokens), p.image_positions, p.pixels, p.grids) for p in case.prompts]
    for _ in range(count):
        values = golden.logits(model, golden.Case(prompts, case.pixels, case.grids, case.kept))
        for row, prompt in enumerate(prompts):
            prompt.tokens.append(int(values[row, len(prompt.tokens) - 1].argmax()))
    return torch.tensor([prompt.tokens[-count:] for prompt in prompts])


def run_cases(name: str, parallel: ParallelConfig) -> dict[str, dict[str, Any]]:
    """What differs from the recorded outputs, per case, on this rank."""
    directory = GOLDENS / name
    model, family = open_model(directory, parallel)
    image_token = json.loads((directory / "meta.json").read_text()).get("img_context_token_id")
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("case_*.safetensors")):
        recorded = load_file(path)
        case = golden.read_case(recorded, family.vision, image_token)
        result: dict[str, Any] = {}
        features = golden.features(model, case)
        if features is not None:
            expected = recorded["vision_features"]
            if expected.dim() == 3:
                expected = expected[case.kept].flatten(0, 1)
            result["features"] = float((features - expected).abs().max())
        result["logits"] = float((golden.logits(model, case) - recorded["logits"]).abs().max())
        count = recorded["greedy_tokens"].size(1)
        result["expected"] = recorded["greedy_tokens"].tolist()
        if parallel.tensor == 1 == parallel.pipeline:
            result["no cache"] = greedy_without_cache(model, case, count).tolist()
        engine = Engine(model, Silent(), golden.greedy_settings(count), 0)
        requests = [Request(prompt, [SampleSpec(0)]) for prompt in case.prompts]
        result["engine"] = [samples[0].tokens for samples in engine.generate(requests, 0.0)]
        found[path.stem] = result
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "sequence"), [(1, 1, False), (2, 1, True), (1, 2, False), (2, 2, False)]
)
def test_recorded_cases(name: str, tensor: int, pipeline: int, sequence: bool) -> None:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence)
    ranks = run_parallel(tensor * pipeline, "test_families_goldens:run_cases", name, parallel)
    assert len(ranks[0]) == len(list((GOLDENS / name).glob("case_*.safetensors")))
    for rank, found in enumerate(ranks):
        assert any("features" in result for result in found.values()) or rank >= tensor
        for case, result in found.items():
            assert result.get("features", 0.0) <= FEATURES, (case, rank, result)
            assert result["logits"] <= LOGITS, (case, rank, result)
            for way in ("no cache", "engine"):
                assert result.get(way, result["expected"]) == result["expected"], (case, rank, way, result)


def test_strip_positions_of_every_recorded_length() -> None:
    recorded = load_file(GOLDENS / "minicpm_llama3_v2_5" / "strip_position_ids_70.safetensors")
    assert len(recorded) > 5
    for name, places in recorded.items():
        assert torch.equal(strip_positions(int(name[1:]), 70), places.long()), name
