"""InternVL2 in transformers' own ``internvl`` layout, which loads without remote code.

InternLM2 is a Llama with query, key and value fused; InternViT, the pixel shuffle and the connector are transformers'
own. Names and config keys: transformers 5, ``InternVLForConditionalGeneration``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mstar_mega.checkpoint_tools.maps import ModelMap
from mstar_mega.data.tokenizer_schema import added_controls, config_controls
from mstar_mega.models.mapping import Interleaved, Mapping, PaddedRows, Source, Stacked
from mstar_mega.models.sizes import DynamicNTK

_CONTEXT = "<IMG_CONTEXT>"
_V, _L = "vision_tower.", "language_model.model."
_NAMES = {
    r"vision\.class_embedding": f"{_V}embeddings.cls_token",
    r"vision\.position_embedding": f"{_V}embeddings.position_embeddings",
    r"vision\.patch_embedding\.(weight|bias)": _V + r"embeddings.patch_embeddings.projection.\1",
    r"vision\.blocks\.(\d+)\.norm1\.(weight|bias)": _V + r"encoder.layer.\1.layernorm_before.\2",
    r"vision\.blocks\.(\d+)\.norm2\.(weight|bias)": _V + r"encoder.layer.\1.layernorm_after.\2",
    r"vision\.blocks\.(\d+)\.ls([12])": _V + r"encoder.layer.\1.lambda_\2",
    r"vision\.blocks\.(\d+)\.qkv\.(weight|bias)": _V + r"encoder.layer.\1.attention.{}_proj.\2",
    r"vision\.blocks\.(\d+)\.proj\.(weight|bias)": _V + r"encoder.layer.\1.attention.projection_layer.\2",
    r"vision\.blocks\.(\d+)\.mlp\.(fc[12]\.(?:weight|bias))": _V + r"encoder.layer.\1.mlp.\2",
    r"connector\.norm\.(weight|bias)": r"multi_modal_projector.layer_norm.\1",
    r"connector\.mlp\.fc([12])\.(weight|bias)": r"multi_modal_projector.linear_\1.\2",
    r"language\.embedding\.word_embeddings\.weight": f"{_L}embed_tokens.weight",
    r"language\.decoder\.final_layernorm\.weight": f"{_L}norm.weight",
    r"language\.output_layer\.weight": "language_model.lm_head.weight",
    r"language\.decoder\.layers\.(\d+)\.input_layernorm\.weight": _L + r"layers.\1.input_layernorm.weight",
    r"language\.decoder\.layers\.(\d+)\.pre_mlp_layernorm\.weight": _L + r"layers.\1.post_attention_layernorm.weight",
    r"language\.decoder\.layers\.(\d+)\.self_attention\.linear_qkv\.weight": _L + r"layers.\1.self_attn.{}_proj.weight",
    r"language\.decoder\.layers\.(\d+)\.self_attention\.linear_proj\.weight": _L + r"layers.\1.self_attn.o_proj.weight",
    r"language\.decoder\.layers\.(\d+)\.mlp\.linear_fc1\.weight": _L + r"layers.\1.mlp.{}_proj.weight",
    r"language\.decoder\.layers\.(\d+)\.mlp\.linear_fc2\.weight": _L + r"layers.\1.mlp.down_proj.weight",
}
"""Ours -> transformers'; {} stands for q, k and v, or for gate and up."""


def to_native(config: dict[str, Any], model: ModelMap, files: Path) -> tuple[dict[str, Any], ModelMap]:
    """Config and weight map of the same policy in the native layout; ``files``: where the tokenizer is.

    Raises ValueError for another family, a PRM, and variants that the native classes do not have.
    """
    if model.family != "internvl2" or model.head != "vocabulary":
        raise ValueError(
            f"--layout native exists for InternVL2 policies, not for {model.family} with {model.head} head"
        )
    text, vision = config["llm_config"], config["vision_config"]
    missing = [key for key in ("num_attention_heads", "num_key_value_heads") if key not in text]
    if missing or "num_attention_heads" not in vision:
        raise ValueError(f"--layout native: config.json has no llm_config.{(missing or ['num_attention_heads'])[0]}")
    if config.get("select_layer", -1) != -1 or vision.get("qk_normalization") or config.get("ps_version") != "v2":
        raise ValueError("--layout native: needs select_layer -1, ps_version v2 and no qk_normalization in config.json")
    groups = (text["num_key_value_heads"], vision["num_attention_heads"])
    shared = text["num_attention_heads"] // text["num_key_value_heads"]
    mappings = [_native(mapping, *groups, shared) for mapping in model.mappings]
    return _config(config, model, context_token(files)), replace(model, mappings=mappings)


def _native(mapping: Mapping, language_groups: int, vision_groups: int, shared: int) -> Mapping:
    pattern, name = next((p, n) for p, n in _NAMES.items() if re.fullmatch(p, mapping.name))
    theirs = re.sub(pattern, name, mapping.name)
    rows, rest = mapping.shape[0], mapping.shape[1:]

    def with_sources(parts: str, sizes: list[int]) -> tuple[Source, ...]:
        return tuple(Source(theirs.format(p), (n, *rest)) for p, n in zip(parts.split(), sizes, strict=True))

    if "qkv" in mapping.name:
        is_language = mapping.name.startswith("language")
        each, per_group = (language_groups, shared) if is_language else (vision_groups, 1)
        unit = rows // (per_group + 2)
        sources = with_sources("q k v", [per_group * unit, unit, unit])
        return replace(mapping, sources=sources, transform=Interleaved(each, per_group))
    if "linear_fc1" in mapping.name:
        return replace(mapping, sources=with_sources("gate up", [rows // 2, rows // 2]), transform=Stacked())
    shape = mapping.sources[0].shape if isinstance(mapping.transform, PaddedRows) else mapping.shape
    return replace(mapping, sources=(Source(theirs, shape),))


def _config(config: dict[str, Any], model: ModelMap, context_token: int) -> dict[str, Any]:
    """Sizes are those that the family read, so that every spelling of the original's config gives the same."""
    text, v, t = config["llm_config"], model.vision, model.language
    rope: dict[str, Any] = {"rope_theta": t.rope_theta, "rope_type": "default"}
    if isinstance(t.rope_scaling, DynamicNTK):
        rope |= {"rope_type": "dynamic", "factor": t.rope_scaling.factor}
    side, patch = v.image_size, v.patch_size
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        "downsample_ratio": 0.5,
        "image_seq_length": (v.grid // 2) ** 2,
        "image_token_id": context_token,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "rope_parameters": rope,
            "hidden_act": "silu",
            "hidden_size": t.hidden,
            "intermediate_size": t.ffn,
            "num_attention_heads": t.heads,
            "num_hidden_layers": t.layers,
            "num_key_value_heads": t.kv_heads,
            "rms_norm_eps": t.eps,
            "vocab_size": t.vocab,
            **{
                key: text[key]
                for key in ("bos_token_id", "eos_token_id", "max_position_embeddings")
                if text.get(key) is not None
            },
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": True,
            "image_size": [side, side],
            "patch_size": [patch, patch],
            "norm_type": "layer_norm",
            "use_mean_pooling": True,  # no norm behind the last layer
            "hidden_act": "gelu",
            "hidden_size": v.hidden,
            "intermediate_size": v.ffn,
            "layer_norm_eps": v.eps,
            "num_attention_heads": v.heads,
            "num_hidden_layers": v.layers,
        },
    }


def context_token(files: Path) -> int:
    """Id of the token under which image features are written. Raises ValueError where no tokenizer file has it."""
    added: dict[str, int] = {}
    if (files / "added_tokens.json").is_file():
        added = added_controls(files / "added_tokens.json")
    elif (files / "tokenizer_config.json").is_file():
        added = config_controls(files / "tokenizer_config.json")
    if _CONTEXT not in added:
        raise ValueError(
            f"{files}: no added_tokens.json or tokenizer_config.json with {_CONTEXT}, which the layout needs"
        )
    return added[_CONTEXT]
