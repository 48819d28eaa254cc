"""Hugging Face directories of tiny models of each family, and comparing what stands in two of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mstar_mega.checkpoint_tools import convert
from mstar_mega.checkpoint_tools.maps import map_of
from mstar_mega.models.lmm import Head

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"

CONFIGS: dict[str, dict[str, Any]] = {
    "internvl2": {
        "model_type": "internvl_chat",
        "force_image_size": 16,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "bfloat16",
        "llm_config": {
            "model_type": "internlm2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 301, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64,
            "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
            "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False,
        },
    },
    "phi3_5_vision": {
        "model_type": "phi3_v",
        "torch_dtype": "bfloat16",
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 301, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 256, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]},
        "embd_layer": {
            "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
            "use_hd_transform": True, "with_learnable_separator": True,
        },
        "img_processor": {
            "name": "clip_vision_model", "image_dim_out": 8, "num_img_tokens": 4,
            "vision_config": {
                "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
            },
        },
    },
    "minicpm_v2_5": {
        "model_type": "minicpmv",
        "version": "2.5",
        "torch_dtype": "float16",
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 301, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 64, "rope_theta": 10000.0, "query_num": 3, "resampler_num_heads": 2,
        "batch_vision_input": True, "drop_vision_last_layer": False, "patch_size": 4, "image_size": 16,
        "slice_config": {"max_slice_nums": 9, "patch_size": 4},
        "vision_config": {
            "model_type": "idefics2", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        },
    },
}  # fmt: skip
"""config.json of a model of each family that is made in a blink; grouped queries and an odd vocabulary where it can."""


def make_checkpoint(folder: Path, family: str, head: Head = "vocabulary", shards: int = 1) -> dict[str, Tensor]:
    """A Hugging Face directory with random weights; returns them."""
    folder.mkdir(parents=True)
    config = {**CONFIGS[family], **({convert.HEAD_KEY: head} if head != "vocabulary" else {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 290}))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        source.name: torch.randn(source.shape, generator=generator).to(getattr(torch, config["torch_dtype"]))
        for mapping in map_of(config, head, folder).mappings
        for source in mapping.sources
    }
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file)
        weight_map.update(dict.fromkeys(names[number::shards], file))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Of all safetensors files; each name may stand in one of them only."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(tensors)
        tensors.update(part)
    return tensors


def assert_same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def rewrite(hf: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a directory; they then stand in one file."""
    tensors = all_tensors(hf)
    for path in hf.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, hf / "model.safetensors")


def native_model(folder: Path) -> Any:
    from transformers import InternVLForConditionalGeneration

    model, told = InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()
