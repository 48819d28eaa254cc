"""The same InternVL model twice: this project's, and transformers' native one with the same weights.

The benchmark compares programs, so the two must compute the same function; :func:`largest_difference` shows that they
do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mstar_mega.models.inference import inference, run_packed
from mstar_mega.models.initialization import initialize_weights
from mstar_mega.models.lmm import LMM, LanguageSize, VisionSize, transformer_config
from mstar_mega.models.packing import Prompt, pack

IMAGE_TOKEN = 5


@dataclass(frozen=True)
class Sizes:
    """Both towers."""

    vision: VisionSize
    language: LanguageSize

    @property
    def image_tokens(self) -> int:
        """Language-model tokens of one tile."""
        return (self.vision.image_size // self.vision.patch_size // 2) ** 2


def build_ours(sizes: Sizes, seed: int) -> LMM:
    """This project's model, float32, random weights. The process group must be there."""
    config = transformer_config(sizes.language, dtype=torch.float32)
    model = LMM(sizes.vision, sizes.language, config)
    initialize_weights(model, seed)
    return model.eval()


def build_theirs(sizes: Sizes, ours: LMM) -> Any:
    """``transformers.InternVLForConditionalGeneration`` (Llama language model) with the weights of ``ours``."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision, language = sizes.vision, sizes.language
    config = InternVLConfig(
        vision_config={
            "hidden_size": vision.hidden,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.ffn,
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "layer_norm_eps": vision.eps,
            "attention_bias": True,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": language.hidden,
            "intermediate_size": language.ffn,
            "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads,
            "head_dim": language.head_dim,
            "vocab_size": language.vocab,
            "rms_norm_eps": language.eps,
            "rope_theta": language.rope_theta,
            "max_position_embeddings": 4096,
        },
        image_token_id=IMAGE_TOKEN,
        image_seq_length=sizes.image_tokens,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config).eval()
    state = {name: value.detach() for name, value in ours.named_parameters()}
    model.load_state_dict({**_vision_weights(state, vision), **_language_weights(state, language)})
    return model


def _vision_weights(state: dict[str, Tensor], size: VisionSize) -> dict[str, Tensor]:
    tower, projector = "model.vision_tower.", "model.multi_modal_projector."
    found = {
        f"{tower}embeddings.cls_token": state["vision.class_embedding"],
        f"{tower}embeddings.position_embeddings": state["vision.position_embedding"],
    }
    pairs = {
        f"{tower}embeddings.patch_embeddings.projection": "vision.patch_embedding",
        f"{projector}layer_norm": "connector.norm",
        f"{projector}linear_1": "connector.mlp.fc1",
        f"{projector}linear_2": "connector.mlp.fc2",
    }
    for i in range(size.layers):
        theirs, ours = f"{tower}encoder.layer.{i}.", f"vision.blocks.{i}."
        found[f"{theirs}lambda_1"], found[f"{theirs}lambda_2"] = state[f"{ours}ls1"], state[f"{ours}ls2"]
        pairs |= {
            f"{theirs}layernorm_before": f"{ours}norm1",
            f"{theirs}layernorm_after": f"{ours}norm2",
            f"{theirs}attention.projection_layer": f"{ours}proj",
            f"{theirs}mlp.fc1": f"{ours}mlp.fc1",
            f"{theirs}mlp.fc2": f"{ours}mlp.fc2",
        }
        for part in ("weight", "bias"):
            # Ours interleaves per head: (q, k, v) of head 0, of head 1, ...
            whole = state[f"{ours}qkv.{part}"]
            split = whole.view(size.heads, 3, size.hidden // size.heads, *whole.shape[1:])
            for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
                found[f"{theirs}attention.{name}.{part}"] = split[:, j].flatten(0, 1)
    for theirs, ours in pairs.items():
        for part in ("weight", "bias"):
            found[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
    return found


def _language_weights(state: dict[str, Tensor], size: LanguageSize) -> dict[str, Tensor]:
    found = {
        "model.language_model.embed_tokens.weight": state["language.embedding.word_embeddings.weight"][: size.vocab],
        "model.language_model.norm.weight": state["language.decoder.final_layernorm.weight"],
        "lm_head.weight": state["language.output_layer.weight"][: size.vocab],
    }
    D, rep = size.head_dim, size.heads // size.kv_heads
    for i in range(size.layers):
        theirs, ours = f"model.language_model.layers.{i}.", f"language.decoder.layers.{i}."
        # megatron's rows, per key-value head: its query heads, then k, then v.
        qkv = state[f"{ours}self_attention.linear_qkv.weight"].view(size.kv_heads, rep + 2, D, size.hidden)
        gate, up = state[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        found |= {
            f"{theirs}self_attn.q_proj.weight": qkv[:, :rep].flatten(0, 2),
            f"{theirs}self_attn.k_proj.weight": qkv[:, rep].flatten(0, 1),
            f"{theirs}self_attn.v_proj.weight": qkv[:, rep + 1].flatten(0, 1),
            f"{theirs}self_attn.o_proj.weight": state[f"{ours}self_attention.linear_proj.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": state[f"{ours}mlp.linear_fc2.weight"],
            f"{theirs}input_layernorm.weight": state[f"{ours}input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": state[f"{ours}pre_mlp_layernorm.weight"],
        }
    return found


def make_prompts(sizes: Sizes, count: int, tiles: int, text_tokens: int, seed: int) -> list[Prompt]:
    """Random pixels and random text of equal length: some words, the image's tokens, the rest of the words."""
    generator = torch.Generator("cpu").manual_seed(seed)
    before = text_tokens // 2
    prompts = []
    for _ in range(count):
        side = sizes.vision.image_size
        pixels = torch.randn(tiles, 3, side, side, generator=generator, device="cpu")
        text = torch.randint(
            IMAGE_TOKEN + 1, sizes.language.vocab, (text_tokens,), generator=generator, device="cpu"
        ).tolist()
        media = range(before, before + tiles * sizes.image_tokens)
        prompts.append(Prompt(text[:before] + [IMAGE_TOKEN] * len(media) + text[before:], list(media), pixels))
    return prompts


def their_inputs(prompts: list[Prompt]) -> dict[str, Tensor]:
    """``generate`` arguments for prompts of equal length."""
    ids = torch.tensor([prompt.tokens for prompt in prompts])
    pixels = torch.cat([prompt.pixels for prompt in prompts if prompt.pixels is not None])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def largest_difference(ours: LMM, theirs: Any, prompts: list[Prompt]) -> float:
    """Largest |difference| of the two programs' next-token logits at the end of the prompts."""
    with inference(ours):
        batch = pack(prompts, [[] for _ in prompts])
        hidden = run_packed(ours, batch)
        assert hidden is not None, "the benchmark runs in one process"
        a = ours.logits(hidden[batch.last_prompt])[:, : ours.size.vocab]
        b = theirs(**their_inputs(prompts), logits_to_keep=1).logits[:, -1]
    return float((a - b).abs().max())
