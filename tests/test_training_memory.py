"""Whole optimizer steps never allocate anything of the size of tokens times vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_families
import torch
from parallel import run_parallel
from PIL import Image
from test_linear_memory import peak_bytes

from mstar_mega import kernels
from mstar_mega.config import Config, KernelsConfig, OptimizerConfig, ParallelConfig
from mstar_mega.data.types import ImageRef, Query
from mstar_mega.models.build import build_model
from mstar_mega.models.description import family_from_hf
from mstar_mega.models.mapping import Head
from mstar_mega.platform import distributed
from mstar_mega.training.batches import TrainGroup, microbatches
from mstar_mega.training.trainer import Trainer

VOCABULARY = 32_768
"""So wide that a quarter of the rows is more than what the kernels call small, also on each of two ranks."""


def allocations(directory: str, parallel: ParallelConfig, head: Head) -> list[tuple[int, int]]:
    """Of a training step, with the fused kernels and without: (largest allocation in bytes, tokens x vocabulary).

    Every allocation counts, also those inside operations, in the backward and in the optimizer.
    """
    distributed.initialize(parallel, 0)
    family = family_from_hf(directory)
    model = build_model(Config(parallel=parallel), family, head)
    query = Query("a", "How many digits?", (ImageRef(f"{directory}/0.png", ""),), None)
    generator = torch.Generator().manual_seed(0)
    responses = [torch.randint(20, 200, (n,), generator=generator).tolist() for n in (110, 97, 130, 120, 101, 90)]
    group = TrainGroup(query, responses)
    if head != "vocabulary":
        group.step_ends, group.step_labels = [[50, len(r)] for r in responses], [[1.0, 0.0]] * len(responses)
    trainer = Trainer(model, OptimizerConfig(lr=1e-4), family.prompt, 4)
    (batch,) = microbatches([group], family.prompt, trainer.config, model.stream_multiple)
    whole = batch.packed.tokens.numel() * family.language.padded_vocab // parallel.tensor
    found = []
    for settings in (KernelsConfig(), KernelsConfig(linear_cross_entropy=False, linear_logprob=False)):
        kernels.configure(settings)
        found.append((peak_bytes(lambda: trainer.step([group]))[1], whole))
    kernels.configure(KernelsConfig())
    return found


@pytest.mark.parametrize(
    ("name", "head"), [*((name, "vocabulary") for name in tiny_families.NAMES), ("internvl2", "likelihood")]
)
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_training_step_allocates_nothing_of_tokens_times_vocabulary(
    name: str, head: Head, tensor: int, tmp_path: Path
) -> None:
    config = json.loads(json.dumps(tiny_families.CONFIGS[name]))
    tiny_families.make_tokenizer(name, tmp_path)
    (config["llm_config"] if name == "internvl2" else config)["vocab_size"] = VOCABULARY
    (tmp_path / "config.json").write_text(json.dumps(config))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    parallel = ParallelConfig(tensor=tensor, sequence=tensor > 1)
    for fused, plain in run_parallel(tensor, "test_training_memory:allocations", str(tmp_path), parallel, head):
        largest, whole = fused
        assert largest < whole, "as many bytes as there would be logits: too many in every dtype"
        assert plain[0] > 2 * whole, "whole logits are seen where they exist, or this test measures nothing"
