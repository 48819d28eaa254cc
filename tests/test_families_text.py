"""Tokenizers and chat templates: ids of the genuine InternLM2 model, round trips, and where image features go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_families
from PIL import Image

from mstar_mega.data.tokenizer import FastTokenizer, SentencePieceTokenizer
from mstar_mega.data.types import ImageRef, Query
from mstar_mega.models.description import family_from_hf
from mstar_mega.models.families.base import Family
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.models.packing import Prompt

GENUINE = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "internlm2_tokenizer.model"
TEXTS = (
    "", " ", "  two  spaces ", "\n\nStep 1: 3 + 4 = 7\n", "na\u00efve \u4f60\u597d \U0001f600", "<|end|>",
    "<|eot_id|>!", "<|im_end|> and [UNUSED_TOKEN_145]", "tail\n", "a\u2581b",
)  # fmt: skip


@pytest.fixture(scope="module", params=tiny_families.NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = tmp_path_factory.mktemp(request.param)
    return family_from_hf(tiny_families.make_model_directory(request.param, directory))


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with InternVL2's own tokenizer files."""
    if not GENUINE.is_file():
        pytest.skip("the genuine InternLM2 tokenizer does not lie beside the project")
    directory = tmp_path_factory.mktemp("genuine")
    shutil.copyfile(GENUINE, directory / "tokenizer.model")
    added = {
        92538: "<|plugin|>", 92539: "<|interpreter|>", 92540: "<|action_end|>", 92541: "<|action_start|>",
        92542: "<|im_end|>", 92543: "<|im_start|>", 92544: "<img>", 92545: "</img>", 92546: "<IMG_CONTEXT>",
        92547: "<quad>", 92548: "</quad>", 92549: "<ref>", 92550: "</ref>", 92551: "<box>", 92552: "</box>",
    }  # fmt: skip
    named = {str(id): {"content": piece, "special": True} for id, piece in added.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named}))
    return directory


def picture(directory: Path, width: int, height: int) -> ImageRef:
    path = directory / f"{width}x{height}.png"
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return ImageRef(str(path), "")


def query(question: str, *images: ImageRef) -> Query:
    return Query("q", question, images, None)


def test_the_genuine_internlm2_template(genuine: Path, tmp_path: Path) -> None:
    config = {**tiny_families.CONFIGS["internvl2"]}
    # Two features per image need a grid of 2 x 4 patches; tiles are square, so give one tile of one feature, twice.
    config["llm_config"] = {**config["llm_config"], "vocab_size": 92553}
    config["vision_config"] = {**config["vision_config"], "image_size": 14}
    config |= {"force_image_size": 14, "max_dynamic_patch": 1}
    tokenizer = InternVL2.load_tokenizer(genuine)
    assert tokenizer.vocab_size == 92553
    family = InternVL2.from_config(config, tokenizer)
    prompt = family.prompt(query("Describe the image.", picture(tmp_path, 14, 14)))
    assert prompt.tokens[:4] == [1, 92543, 9081, 364]
    end = [
        60355, 92542, 92543, 1008, 364, 92544, 92546, 92545, 364, 5054, 3280, 410, 2321, 281, 92542, 92543, 525,
        11353, 364,
    ]  # fmt: skip
    assert prompt.tokens[-len(end) :] == end
    assert [prompt.tokens[i] for i in prompt.image_positions] == [92546]
    assert "InternVL" in tokenizer.decode(prompt.tokens)
    assert family.stop_tokens == {92542}
    assert {92543, 92546, 92552, 1, 2, 0} <= set(family.banned_tokens) and 92542 not in family.banned_tokens
    assert family.response_tokens("assistant\n") == [525, 11353, 364, 92542]


def test_the_genuine_internlm2_model_gives_every_text_back(genuine: Path) -> None:
    tokenizer = InternVL2.load_tokenizer(genuine)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(range(92538, 92553)), text


def test_every_text_comes_back_and_never_becomes_a_control_symbol(family: Family) -> None:
    tokenizer = family.tokenizer
    controls = {id for id in tokenizer.silent()}
    # Llama's own files cannot tell U+2581 from a space.
    for text in TEXTS[:-1] if family.name == "phi3_5_vision" else TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & controls, text
        offsets = tokenizer.offsets(ids)
        assert (offsets[-1] if ids else 0) == len(text) and offsets == sorted(offsets)
    with pytest.raises(ValueError, match="UTF-8"):
        tokenizer.encode("\ud800")


def test_nothing_but_text_and_stop_tokens_can_be_drawn(family: Family) -> None:
    drawable = set(range(family.language.vocab)) - set(family.banned_tokens)
    assert family.stop_tokens <= drawable
    assert all(id in family.stop_tokens or id not in family.tokenizer.silent(family.language.vocab) for id in drawable)
    assert family.language.vocab - 1 in family.banned_tokens, "an id that the tokenizer does not have"
    assert family.response_tokens("yes")[-1] in family.stop_tokens


def counts(prompt: Prompt) -> int:
    assert prompt.pixels is not None
    assert prompt.image_positions == sorted(set(prompt.image_positions))
    assert prompt.image_positions[-1] < len(prompt.tokens)
    return len(prompt.image_positions)


@pytest.mark.parametrize("sizes", [[(28, 28)], [(64, 28)], [(28, 90), (64, 64)]])
def test_image_places_are_as_many_as_features(family: Family, tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    images = [picture(tmp_path, *size) for size in sizes]
    prompt = family.prompt(query("How many?", *images))
    assert prompt.pixels is not None
    if family.name == "internvl2":
        assert counts(prompt) == prompt.pixels.size(0) * 4
    elif family.name == "phi3_5_vision":
        assert prompt.grids is not None
        assert counts(prompt) == sum((h * w + 1) * 4 + 1 + (h + 1) * 2 for h, w in prompt.grids.tolist())
        assert prompt.pixels.size(0) == sum(1 + h * w for h, w in prompt.grids.tolist())
    else:
        assert prompt.grids is not None
        assert counts(prompt) == 6 * prompt.grids.size(0)
        assert prompt.pixels.size(0) == sum(h * w for h, w, _ in prompt.grids.tolist())
        assert {int(n) for n in prompt.grids[:, 2]} == {int((prompt.grids[:, 0] * prompt.grids[:, 1]).max())}
    plain = family.prompt(query("How many?"))
    assert plain.pixels is None and plain.image_positions == [] and plain.grids is None


@pytest.mark.parametrize("family", ["phi3_5_vision"], indirect=True)
def test_phi3_template(family: Family, tmp_path: Path) -> None:
    """Two pictures: the beginning mark again behind each, no newline behind the assistant's mark."""
    piece, encode = family.tokenizer.id, family.tokenizer.encode
    prompt = family.prompt(query("Why?", *[picture(tmp_path, 28, 28)] * 2))
    features = counts(prompt) // 2
    image = [piece("<unk>")] * features
    newline = encode("\n")
    assert prompt.tokens == [
        piece("<s>"), piece("<|user|>"), *newline, *image, piece("<s>"), *newline, *image, piece("<s>"),
        *encode("\nWhy?"), piece("<|end|>"), *newline, piece("<|assistant|>"),
    ]  # fmt: skip
    assert isinstance(family.tokenizer, FastTokenizer)
    assert newline == [family.tokenizer._model.token_to_id(piece) for piece in ("\u2581", "<0x0A>")]
    assert family.stop_tokens == {piece("<|end|>"), piece("<|endoftext|>"), piece("</s>")}


@pytest.mark.parametrize("family", ["minicpm_v2_5"], indirect=True)
def test_minicpm_template(family: Family, tmp_path: Path) -> None:
    """A sliced picture: the whole one, then rows of slices between marks, joined by newlines."""
    piece, encode = family.tokenizer.id, family.tokenizer.encode
    prompt = family.prompt(query(" Why? ", picture(tmp_path, 56, 56)))
    place = [piece("<image>"), *[piece("<unk>")] * 6, piece("</image>")]
    slices = [piece("<slice>"), *place, *place, *encode("\n"), *place, *place, piece("</slice>")]

    def header(role: str) -> list[int]:
        return [piece("<|start_header_id|>"), *encode(role), piece("<|end_header_id|>"), *encode("\n\n")]

    assert prompt.tokens == [
        piece("<|begin_of_text|>"), *header("user"), *place, *slices, *encode("\n Why?"), piece("<|eot_id|>"),
        *header("assistant"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_damaged_and_missing_files_are_named(name: str, tmp_path: Path) -> None:
    directory = tiny_families.make_model_directory(name, tmp_path / name)
    file = directory / ("tokenizer.model" if name == "internvl2" else "tokenizer.json")
    good = file.read_bytes()
    file.write_bytes(b"{}")
    with pytest.raises(ValueError, match=file.name):
        family_from_hf(directory)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name} is missing"):
        family_from_hf(directory)
    file.write_bytes(good)
    config = json.loads((directory / "config.json").read_text())
    for wrong, match in (
        ({"model_type": "llava"}, "model_type 'llava'"),
        ({"version": "2.6", "hidden_act": "gelu", "select_layer": -4}, "supported"),
    ):
        (directory / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(ValueError, match=match):
            family_from_hf(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        family_from_hf(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        family_from_hf(directory)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_families._llama_tokenizer()
    content = json.loads(tokenizer.to_str())
    content["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="neither a byte-level BPE"):
        FastTokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_text("nothing")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")
