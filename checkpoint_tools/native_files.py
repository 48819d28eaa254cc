"""What stands beside the weights of the native layout: tokenizer, processor, chat template, generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mstar_mega.checkpoint_tools.fast_tokenizer import fast_tokenizer
from mstar_mega.data.tokenizer_schema import added_controls, config_controls
from mstar_mega.models.description import family_from_hf
from mstar_mega.models.families.internvl2 import IMAGE_MEAN, IMAGE_STD, InternVL2

_MODEL = "tokenizer.model"
_END = "<|im_end|>"
REPLACED = ("added_tokens.json", "special_tokens_map.json", "preprocessor_config.json", "chat_template.json")
"""Files of the original's layout that would contradict those of this one."""


def native_files(files: Path, source: dict[str, Any]) -> dict[str, str]:
    """Name -> content of every file; empty where no tokenizer is known. ``files``: config.json and the tokenizer of the
    original's layout, ``source``: that config.json.

    Raises ValueError where the tokenizer cannot be said in transformers' format.
    """
    if not (files / _MODEL).is_file():
        return {}
    family = family_from_hf(files)
    assert isinstance(family, InternVL2), "the native layout is InternVL2's"
    controls = _controls(files)
    contents: dict[str, Any] = {
        "tokenizer.json": fast_tokenizer(files / _MODEL, controls),
        "tokenizer_config.json": _tokenizer_config(),
        "preprocessor_config.json": _preprocessor(family),
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": family.tokens_per_tile},
        "generation_config.json": _generation(family, source),
    }
    written = {name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in contents.items()}
    return {**written, "chat_template.jinja": chat_template(family)}


def _controls(files: Path) -> dict[str, int]:
    if (files / "added_tokens.json").is_file():
        return added_controls(files / "added_tokens.json")
    return config_controls(files / "tokenizer_config.json") if (files / "tokenizer_config.json").is_file() else {}


def _tokenizer_config() -> dict[str, Any]:
    media = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "InternVLProcessor",
        "bos_token": "<s>",
        "eos_token": _END,
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        # There are no videos; the processor wants a name.
        "extra_special_tokens": {**media, "video_token": "<video>"},
        **media,
        "video_token": "<video>",
    }


def _preprocessor(family: InternVL2) -> dict[str, Any]:
    side = {"height": family.vision.image_size, "width": family.vision.image_size}
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": side,
        "crop_to_patches": family.size.max_tiles > 1,
        "min_patches": family.size.min_tiles,
        "max_patches": family.size.max_tiles,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def _generation(family: InternVL2, source: dict[str, Any]) -> dict[str, Any]:
    ids = {key: source.get("llm_config", {}).get(key) for key in ("bos_token_id", "pad_token_id")}
    stop = family.tokenizer.id(_END)
    return {"eos_token_id": stop, **{key: id for key, id in ids.items() if id is not None}, "do_sample": False}


def chat_template(family: InternVL2) -> str:
    """The family's prompt in jinja: images first, each behind a newline of its own."""
    begin = "<s>" if family.size.begin else ""
    system = f"<|im_start|>system\n{family.size.system}{_END}" if family.size.system else ""
    start = json.dumps(begin + system, ensure_ascii=False)
    return (
        f"{{{{- {start} }}}}"
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message['role'] + '\n' }}"
        "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
        "{%- for part in message['content'] if part['type'] == 'image' %}{{- '<IMG_CONTEXT>\n' }}{%- endfor %}"
        "{%- for part in message['content'] if part['type'] == 'text' %}{{- part['text'] }}{%- endfor %}"
        "{%- endif %}{{- '<|im_end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
