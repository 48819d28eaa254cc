"""Model directories of the three originals, made on the spot: tiny random weights, and tokenizers of the real kinds.

The tokenizers know the built-in task's words, so that a tiny model can be trained on it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mstar_mega.data.digits.make_tokenizer import CHARACTERS, PIECES
from mstar_mega.data.tokenizer import SPACE_MARK, SentencePieceTokenizer
from mstar_mega.models.description import family_class
from mstar_mega.models.families.internvl2 import DIGITS_TOKENIZER

NAMES = ("internvl2", "phi3_5_vision", "minicpm_v2_5")
_LLM = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}  # fmt: skip
_VIT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "patch_size": 7,
    "image_size": 28,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "internvl2": {
        "model_type": "internvl_chat", "template": "internlm2-chat", "downsample_ratio": 0.5, "ps_version": "v2",
        "select_layer": -1, "force_image_size": 28, "max_dynamic_patch": 4, "use_thumbnail": True,
        "llm_config": {
            **_LLM, "model_type": "internlm2", "bias": False, "rope_theta": 1e6,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        "vision_config": {**_VIT, "model_type": "intern_vit_6b", "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    },
    "phi3_5_vision": {
        **_LLM, "model_type": "phi3_v", "original_max_position_embeddings": 256, "rope_theta": 10_000.0, "num_crops": 4,
        "rope_scaling": {
            "type": "su", "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + i for i in range(8)],
        },
        "embd_layer": {
            "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
            "use_hd_transform": True, "with_learnable_separator": True,
        },
        "img_processor": {"name": "clip_vision_model", "vision_config": {**_VIT, "hidden_act": "quick_gelu"}},
    },
    "minicpm_v2_5": {
        **_LLM, "model_type": "minicpmv", "version": "2.5", "rope_theta": 500_000.0, "query_num": 6,
        "resampler_num_heads": 4, "batch_vision_input": True, "drop_vision_last_layer": False,
        "slice_config": {"max_slice_nums": 4, "scale_resolution": 28}, "vision_config": {**_VIT, "image_size": 140},
    },
}  # fmt: skip
PHI_SPECIALS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
LLAMA_SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<unk>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<image>", "</image>", "<slice>", "</slice>",
)  # fmt: skip


def make_model_directory(name: str, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A directory as the original's, with random weights drawn small enough to train from."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(CONFIGS[name]))
    vocabulary = make_tokenizer(name, directory)
    # Odd, and larger than the tokenizer: real ones are both.
    (config["llm_config"] if name == "internvl2" else config)["vocab_size"] = vocabulary + 1 + vocabulary % 2
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for mapping in family_class(config).weight_map(config):
        for source in mapping.sources:
            drawn = 0.08 * torch.randn(source.shape, generator=generator)
            norm = "norm" in mapping.name and source.name.endswith("weight") or source.name.endswith((".ls1", ".ls2"))
            weights[source.name] = ((1.0 + drawn) if norm else drawn).to(dtype)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_tokenizer(name: str, directory: Path) -> int:
    """Write the tokenizer files of a family; returns the number of ids."""
    if name == "internvl2":
        shutil.copyfile(DIGITS_TOKENIZER, directory / "tokenizer.model")
        symbols = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
        own = SentencePieceTokenizer(DIGITS_TOKENIZER)
        added = {str(own.id(piece)): {"content": piece} for piece in symbols}
        # One more id than the model file has, as in the original.
        added[str(own.vocab_size)] = {"content": "<box>"}
        (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        return own.vocab_size + 1
    tokenizer = _llama_tokenizer() if name == "phi3_5_vision" else _byte_level_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def _llama_tokenizer() -> Tokenizer:
    """Characters, the task's words, and byte pieces; a space in front of every text."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE_MARK)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=[SPACE_MARK, *CHARACTERS], show_progress=False)
    learner.train_from_iterator([piece.replace("\n", "") for piece in PIECES for _ in range(3)], trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocab: dict[str, int] = {}
    for piece in ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]):
        vocab.setdefault(piece, len(vocab))
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # In the published file </s> is an ordinary added token that takes the white space behind it.
    tokenizer.add_tokens([AddedToken("</s>", special=False, normalized=False, rstrip=True)])
    others = [piece for piece in PHI_SPECIALS if piece != "</s>"]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in others])
    return tokenizer


def _byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([piece for piece in PIECES for _ in range(3)], trainer)
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in LLAMA_SPECIALS])
    return tokenizer
