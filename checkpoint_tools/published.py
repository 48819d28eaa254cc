"""The sizes of the three published policies, in the keys of their own config.json: for planning before any download."""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, dict[str, Any]] = {
    "internvl2": {
        "model_type": "internvl_chat", "force_image_size": 448, "downsample_ratio": 0.5, "ps_version": "v2",
        "select_layer": -1, "template": "internlm2-chat", "torch_dtype": "bfloat16", "min_dynamic_patch": 1,
        "max_dynamic_patch": 12, "use_thumbnail": True, "dynamic_image_size": True,
        "llm_config": {
            "model_type": "internlm2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 92553, "rms_norm_eps": 1e-5,
            "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "bias": False,
            "max_position_embeddings": 32768, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6,
            "hidden_act": "gelu", "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False,
        },
    },
    "phi3_5_vision": {
        "model_type": "phi3_v", "torch_dtype": "bfloat16", "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
        # The 48 divisors of each list change no size.
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
        "embd_layer": {
            "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
            "use_hd_transform": True, "with_learnable_separator": True,
        },
        "img_processor": {"name": "clip_vision_model", "image_dim_out": 1024, "num_img_tokens": 144},
    },
    "minicpm_v2_5": {
        "model_type": "minicpmv", "version": "2.5", "torch_dtype": "float16", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 8192,
        "rope_theta": 500000.0, "query_num": 96, "batch_vision_input": True, "drop_vision_last_layer": False,
        "patch_size": 14, "image_size": 448, "slice_config": {"max_slice_nums": 9, "patch_size": 14},
        "vision_config": {
            "model_type": "idefics2", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 980, "patch_size": 14,
        },
    },
}  # fmt: skip
"""By ``model.family``."""
