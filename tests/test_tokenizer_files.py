"""Tokenizer files as people have them: exact inverses for any text, or one line when the model is opened."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_families

from mstar_mega.checkpoint_tools.convert import hf_to_megatron
from mstar_mega.data.tokenizer import FastTokenizer
from mstar_mega.models.description import family_from_hf

PIECES = ("</s>", "<s>", "<|end|>", "<unk>", " ", "  ", "\n", "a", "one", "\u4f60", "<", "/s>", "\U0001f600", "\t")


def phi_tokenizer(folder: Path) -> FastTokenizer:
    tiny_families.make_tokenizer("phi3_5_vision", folder)
    return FastTokenizer(folder / "tokenizer.json")


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 8))) for _ in range(count)]


def test_added_tokens_that_are_not_special_come_back_as_text(tmp_path: Path) -> None:
    """The published Phi-3 file calls </s> ordinary, with rstrip: as a token it would swallow the space behind it."""
    tokenizer = phi_tokenizer(tmp_path)
    controls = set(tokenizer._controls.values())
    for text in ("a </s> b", "</s></s>", " </s>", "</s> \n a", *texts(300)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & controls


def test_many_spellings_of_a_control_symbol_are_no_recursion(tmp_path: Path) -> None:
    tokenizer = phi_tokenizer(tmp_path)
    text = "</s>" * 10_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_control_symbol_that_merges_build_is_spelt_in_bytes(tmp_path: Path) -> None:
    tiny_families.make_tokenizer("minicpm_v2_5", tmp_path)
    file = tmp_path / "tokenizer.json"
    content: dict[str, Any] = json.loads(file.read_text())
    piece, id = next((each, id) for each, id in content["model"]["vocab"].items() if each.isascii() and len(each) > 1)
    content["added_tokens"].append({**content["added_tokens"][0], "id": id, "content": piece})
    file.write_text(json.dumps(content))
    tokenizer = FastTokenizer(file)
    text = f"{piece} {piece}"
    assert tokenizer.id(piece) not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_llama_tokenizer_that_transformers_5_saved_again_is_the_same(tmp_path: Path, scheme: str) -> None:
    """It saves the space in front of a text as a pre-tokenizer: the ids must stay those of the published file."""
    original = phi_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False,
    }  # fmt: skip
    content["model"]["unk_token"] = None
    (tmp_path / "again.json").write_text(json.dumps(content))
    again = FastTokenizer(tmp_path / "again.json")
    for text in texts(300):
        assert again.encode(text) == original.encode(text)
        assert again.decode(again.encode(text)) == text


def test_transformers_own_saving_is_read(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    original = phi_tokenizer(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = FastTokenizer(tmp_path / "again" / "tokenizer.json")
    assert [again.encode(text) for text in texts(100)] == [original.encode(text) for text in texts(100)]


def test_another_normalization_is_named(tmp_path: Path) -> None:
    phi_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"another program saved it again; copy tokenizer\.json from the original"):
        FastTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.usefixtures("job_of_one")
@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_a_tokenizer_beyond_the_embedding_is_refused_when_the_model_is_opened_or_converted(
    name: str, tmp_path: Path
) -> None:
    directory = tiny_families.make_model_directory(name, tmp_path / "hf")
    vocabulary = family_from_hf(directory).tokenizer.vocab_size
    if name == "internvl2":
        file = directory / "tokenizer_config.json"
        content = json.loads(file.read_text())
        content["added_tokens_decoder"][str(vocabulary + 9)] = {"content": "<new>"}
    else:
        file = directory / "tokenizer.json"
        content = json.loads(file.read_text())
        content["added_tokens"] += [
            {**content["added_tokens"][0], "id": vocabulary + i, "content": f"<new{i}>"} for i in range(10)
        ]
    file.write_text(json.dumps(content))
    message = rf"the tokenizer has ids up to {vocabulary + 9}, but the model's embedding has \d+ rows \(vocab_size"
    with pytest.raises(ValueError, match=message):
        family_from_hf(directory)
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
