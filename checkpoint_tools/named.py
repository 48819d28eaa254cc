"""Model files of a policy that never was a Hugging Face directory: a named size, trained here from random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mstar_mega.config import Config
from mstar_mega.models.families.internvl2 import PLAIN_PROMPT, InternVL2

_CONTROLS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def write_model_files(config: Config, folder: Path) -> None:
    """config.json and the tokenizer's files of the settings' named size, as InternVL2 has them.

    config.json says where the prompt is not InternVL2's: a named size may leave out its system message.
    """
    family = InternVL2(config.model.size)
    tokenizer = Path(family.size.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    _write(folder / "added_tokens.json", {piece: family.tokenizer.id(piece) for piece in _CONTROLS})
    _write(folder / "config.json", _config(config, family))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(config: Config, family: InternVL2) -> dict[str, Any]:
    v, t = family.vision, family.language
    assert t.heads * t.head_dim == t.hidden and t.rope_scaling is None, "config.json could not say it"
    return {
        "model_type": "internvl_chat", "torch_dtype": config.model.precision, "force_image_size": v.image_size,
        "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "template": "internlm2-chat",
        "min_dynamic_patch": 1, "max_dynamic_patch": family.size.max_tiles, "dynamic_image_size": True,
        "use_thumbnail": family.size.thumbnail, PLAIN_PROMPT: not family.size.system and not family.size.begin,
        "llm_config": {
            "model_type": "internlm2", "hidden_size": t.hidden, "intermediate_size": t.ffn,
            "num_hidden_layers": t.layers, "num_attention_heads": t.heads, "num_key_value_heads": t.kv_heads,
            "vocab_size": t.vocab, "rms_norm_eps": t.eps, "rope_theta": t.rope_theta, "rope_scaling": None,
            "max_position_embeddings": 32768, "hidden_act": "silu", "bias": False, "tie_word_embeddings": False,
            "bos_token_id": None, "eos_token_id": min(family.stop_tokens),
        },
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_size": v.hidden, "intermediate_size": v.ffn,
            "num_hidden_layers": v.layers, "num_attention_heads": v.heads, "image_size": v.image_size,
            "patch_size": v.patch_size, "layer_norm_eps": v.eps, "hidden_act": "gelu", "norm_type": "layer_norm",
            "qkv_bias": True, "qk_normalization": False,
        },
    }  # fmt: skip
