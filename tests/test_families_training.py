"""Gradients of every parameter of the three families do not depend on the layout; weight maps at the real sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
from parallel import run_parallel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mstar_mega.config import Config, OptimizerConfig, ParallelConfig
from mstar_mega.data.types import ImageRef, Query
from mstar_mega.models.build import build_model
from mstar_mega.models.description import family_class, family_from_hf, read_config
from mstar_mega.models.initialization import canonical_name
from mstar_mega.models.weights import load_originals
from mstar_mega.platform import distributed
from mstar_mega.training.batches import TrainGroup
from mstar_mega.training.trainer import Trainer


def gradients(directory: str, parallel: ParallelConfig) -> tuple[float, dict[str, tuple[int, Tensor]]]:
    """(loss, gradient by canonical name with the tensor rank that holds it) of one step on this rank."""
    distributed.initialize(parallel, 0)
    family = family_from_hf(directory)
    model = build_model(Config(parallel=parallel), family)
    source = load_file(Path(directory) / "model.safetensors")
    load_originals(model, family.weight_map(read_config(directory)), source.__getitem__)
    images = tuple(ImageRef(str(path), "") for path in sorted(Path(directory).glob("*.png")))
    generator = torch.Generator().manual_seed(0)
    answers = [torch.randint(20, 200, (n,), generator=generator).tolist() for n in (5, 9, 3)]
    groups = [
        TrainGroup(Query("a", "How many digits?", images, None), answers[:2]),
        TrainGroup(Query("b", "Which?", images[:1], None), answers[2:]),
        TrainGroup(Query("c", "No picture", (), None), answers[:1]),
    ]
    trainer = Trainer(model, OptimizerConfig(lr=1e-4, clip_grad=0.0), family.prompt, 4)
    stats = trainer.step(groups)
    rank = distributed.layout().tensor_rank
    named = dict(model.named_parameters())
    found = {canonical_name(n, model): (rank, p.main_grad.clone()) for n, p in named.items() if p.requires_grad}
    return stats.loss, found


def joined(directory: str, ranks: list[dict[str, tuple[int, Tensor]]]) -> dict[str, Tensor]:
    """The ranks' parts put together by the weight map."""
    config = read_config(directory)
    maps = {mapping.name: mapping for mapping in family_class(config).weight_map(config)}
    pieces: dict[str, dict[int, Tensor]] = {}
    for part in ranks:
        for name, (rank, piece) in part.items():
            pieces.setdefault(name, {})[rank] = piece
    for name, found in pieces.items():
        if maps[name].layout == "replicated":
            for piece in found.values():
                torch.testing.assert_close(piece, found[0], rtol=1e-4, atol=1e-6, msg=f"copies of {name} differ")
    return {name: maps[name].join([found[r] for r in sorted(found)]) for name, found in pieces.items()}


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_gradients_do_not_depend_on_the_layout(name: str, tmp_path: Path) -> None:
    directory = str(tiny_families.make_model_directory(name, tmp_path))
    for i, (width, height) in enumerate([(30, 28), (70, 40)]):
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    ((loss, alone),) = run_parallel(1, "test_families_training:gradients", directory, ParallelConfig())
    whole = joined(directory, [alone])
    config = read_config(directory)
    names = {mapping.name for mapping in family_class(config).weight_map(config)}
    unused = {n for n in names - set(whole) if n.startswith(("vision.blocks.2.", "vision.post_norm."))}
    assert names - set(whole) == unused and bool(unused) == (name == "phi3_5_vision")
    # A query's own features hang on all of the tower.
    assert all(value.abs().max() > 0 for value in whole.values())
    for tensor, pipeline, sequence in [(2, 1, True), (2, 2, False)]:
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence)
        ranks: list[Any] = run_parallel(tensor * pipeline, "test_families_training:gradients", directory, parallel)
        assert all(abs(other - loss) < 1e-5 for other, _ in ranks)
        found = joined(directory, [part for _, part in ranks])
        assert found.keys() == whole.keys()
        for parameter, value in whole.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(
                found[parameter], value, rtol=1e-3, atol=1e-4 * scale + 1e-9, msg=f"{parameter} {parallel}"
            )


REAL: dict[str, tuple[int, int, dict[str, Any]]] = {
    # family: number of tensors, number of values, config.json
    "internvl2": (
        24 * 14 + 4 + 6 + 24 * 7 + 3,
        2_205_754_368,
        {
            "model_type": "internvl_chat", "template": "internlm2-chat", "force_image_size": 448,
            "llm_config": {
                "model_type": "internlm2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 92553, "rope_theta": 1e6,
                "max_position_embeddings": 32768, "rope_scaling": {"type": "dynamic", "factor": 2.0},
            },
            "vision_config": {
                "model_type": "intern_vit_6b", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14,
                "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448, "hidden_act": "gelu",
            },
        },
    ),
    "phi3_5_vision": (
        592,
        4_146_621_440,
        {
            "model_type": "phi3_v", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "rope_theta": 10_000.0,
            "embd_layer": {"embedding_cls": "image"}, "img_processor": {"name": "clip_vision_model"},
        },
    ),
    "minicpm_v2_5": (
        741,
        8_537_092_336,
        {
            "model_type": "minicpmv", "version": "2.5", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "rope_theta": 500000.0, "query_num": 96,
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "image_size": 980, "patch_size": 14,
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_weight_maps_are_complete_at_the_real_sizes(name: str) -> None:
    count, values, config = REAL[name]
    family = family_class(json.loads(json.dumps(config)))
    assert family.name == name
    sources = [source for mapping in family.weight_map(config) for source in mapping.sources]
    assert len({source.name for source in sources}) == len(sources), "a tensor is used twice"
    assert len(sources) == count
    assert sum(int(np.prod(source.shape)) for source in sources) == values
    vision, language = family.sizes(config)
    assert language.padded_vocab % 128 == 0 and 0 <= language.padded_vocab - language.vocab < 128
    if name == "minicpm_v2_5":
        assert (vision.connector_heads, vision.grid, language.head_dim) == (32, 70, 128)
