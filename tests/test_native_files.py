"""The native layout in transformers' own classes: the same ids, the same prompt, the same greedy answer."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from mstar_mega import settings
from mstar_mega.checkpoint_tools import convert
from mstar_mega.checkpoint_tools.convert import megatron_to_hf
from mstar_mega.checkpoint_tools.fast_tokenizer import AWKWARD, fast_tokenizer
from mstar_mega.config import Config, GenerationConfig, ModelConfig, OptimizerConfig
from mstar_mega.data.tokenizer import SentencePieceTokenizer
from mstar_mega.data.types import ImageRef, Query, image_digest
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.models.build import build_model
from mstar_mega.models.description import family_from_hf
from mstar_mega.models.families.internvl2 import DIGITS_TOKENIZER, InternVL2
from mstar_mega.training.checkpoint import save_checkpoint
from mstar_mega.training.trainer import Trainer

INTERNLM2 = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "internlm2_tokenizer.model"
MEDIA = {"<img>": 92544, "</img>": 92545, "<IMG_CONTEXT>": 92546}

pytestmark = pytest.mark.usefixtures("job_of_one")


@pytest.mark.parametrize("model", [Path(DIGITS_TOKENIZER), INTERNLM2], ids=["unigram", "bpe"])
def test_a_sentencepiece_model_has_the_same_ids_as_tokenizer_json(model: Path) -> None:
    if not model.is_file():
        pytest.skip(f"the tokenizer {model} is not here")
    import tokenizers

    controls = MEDIA if model is INTERNLM2 else {}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(fast_tokenizer(model, controls)))
    ours = SentencePieceTokenizer(model, controls)
    plain = [text for text in AWKWARD if "<s>" not in text]
    for text in plain:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text) and theirs.decode(ids) == text, text
    for name, id in controls.items():
        assert theirs.encode(f"a{name}b", add_special_tokens=False).ids[1] == id


def processor_class_loads() -> bool:
    """Whether torchvision is here, which transformers' processor class needs for the videos that nobody asks about."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # missing, or made for another build of torch
        return False
    return True


def whole_processor(folder: Path, picture: Path, question: str) -> Any:
    from transformers import AutoProcessor

    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}]
    return AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip


@pytest.mark.parametrize("size", ["digits", "mid"])
def test_the_exported_policy_answers_in_transformers_as_it_does_here(size: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    config = Config(model=ModelConfig(size=size))
    family = InternVL2(size)
    model = tiny.randomize(build_model(config, family))
    run = tmp_path / "run"
    state = Trainer(model, OptimizerConfig(), family.prompt, 10).sharded_state()
    save_checkpoint(run / "checkpoints" / "warmup", "iteration_0000_step_000001", state, {"stage": "warmup"})
    (run / "config.yaml").write_text(settings.dump(config))
    out = tmp_path / "native"
    megatron_to_hf(run, out, export=convert.to_native)

    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "mstar evolve" in card and "not measured" in card
    assert str(tmp_path) not in card, "folders are nobody else's business"
    tokenizer = AutoTokenizer.from_pretrained(out)
    for text in ("What is the sum of the digits?", " two  spaces\n\nand lines"):
        assert tokenizer.encode(text, add_special_tokens=False) == family.tokenizer.encode(text)
    Image.effect_noise((200, 100), 90).convert("RGB").save(tmp_path / "a.png")
    ref = ImageRef(str(tmp_path / "a.png"), image_digest((tmp_path / "a.png").read_bytes()))
    question = "What is the sum of the digits?"
    prompt = family.prompt(Query("q", question, (ref,), None))
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.pixels is not None and len(prompt.pixels) == {"digits": 1, "mid": 3}[size]
    features = "<img>" + "<IMG_CONTEXT>" * len(prompt.image_positions) + "</img>"
    ids = tokenizer(text.replace("<IMG_CONTEXT>", features), add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0].tolist() == prompt.tokens, "the template writes our prompt"
    processor = AutoImageProcessor.from_pretrained(out)
    pixels = processor([Image.open(tmp_path / "a.png")], return_tensors="pt").pixel_values
    assert pixels.shape == prompt.pixels.shape
    torch.testing.assert_close(pixels, prompt.pixels, rtol=0, atol=0.02)
    policy = AutoModelForImageTextToText.from_pretrained(out, dtype="float32")
    assert policy.generation_config.eos_token_id == family.tokenizer.id("<|im_end|>")
    theirs = policy.generate(input_ids=ids, pixel_values=prompt.pixels, max_new_tokens=6, do_sample=False)
    engine = Engine(model, family, GenerationConfig(max_new_tokens=6), 0)
    ((ours,),) = engine.generate([Request(prompt, [SampleSpec(0)])], 0.0)
    drawn = [token for token in theirs[0, ids.size(1) :].tolist()][: len(ours.tokens)]
    assert drawn == ours.tokens and not policy.generation_config.do_sample
    if processor_class_loads():
        inputs = whole_processor(out, tmp_path / "a.png", question)
        assert inputs.input_ids.tolist() == ids.tolist()
        torch.testing.assert_close(inputs.pixel_values, prompt.pixels, rtol=0, atol=0.02)

    megatron_to_hf(run, tmp_path / "back")
    again = family_from_hf(tmp_path / "back")
    assert again.prompt(Query("q", question, (ref,), None)).tokens == prompt.tokens, "the prompt it was trained with"
