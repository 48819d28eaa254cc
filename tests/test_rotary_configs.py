"""Rotary settings in every form that transformers has saved: read as transformers reads them, or refused by name."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_directories import CONFIGS, make_checkpoint
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mstar_mega.checkpoint_tools.convert import hf_to_megatron
from mstar_mega.checkpoint_tools.inspection import inspect
from mstar_mega.checkpoint_tools.maps import map_of
from mstar_mega.checkpoint_tools.native import to_native
from mstar_mega.models.description import family_class
from mstar_mega.models.rope import Rope

FAMILIES = tuple(CONFIGS)
KINDS = {"internvl2": ("default", "dynamic"), "phi3_5_vision": ("default", "longrope"), "minicpm_v2_5": ("default",)}
OTHERS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "longrope": {"short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0], "original_max_position_embeddings": 64},
}  # fmt: skip


def language_part(family: str, config: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = config["llm_config"] if family == "internvl2" else config
    return part


def without_rotary(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, its language model's part) that says nothing of rotary positions."""
    config = deepcopy(CONFIGS[family])
    part = language_part(family, config)
    for key in ("rope_theta", "rope_scaling"):
        part.pop(key, None)
    return config, part


def ours(family: str, config: dict[str, Any]) -> Rope:
    language = family_class(config).sizes(config)[1]
    return Rope(language.head_dim, language.rope_theta, language.rope_scaling)


def saved(part: dict[str, Any], rope: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers 5's own config of the language model, and the keys about rotary positions that it saves."""
    kind = Phi3Config if "original_max_position_embeddings" in part else LlamaConfig
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "original_max_position_embeddings",
    )  # fmt: skip
    theirs = kind(**{key: part[key] for key in keys if key in part}, pad_token_id=None, rope_parameters=dict(rope))
    theirs.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    return theirs, {key: value for key, value in written.items() if key.startswith("rope")}


def assert_same_angles(mine: Rope, theirs: Any, lengths: tuple[int, ...]) -> None:
    rope = theirs.rope_parameters
    for length in lengths:
        if rope["rope_type"] == "default":
            dim = theirs.hidden_size // theirs.num_attention_heads
            frequency, scale = rope["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim), 1.0
        else:
            frequency, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu", seq_len=length)
        found = mine.angles(torch.tensor([1]), torch.tensor([length]))[0, 0, 0, : frequency.numel()]
        torch.testing.assert_close(found, frequency)
        assert getattr(mine.scaling, "attention_scale", 1.0) == pytest.approx(scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_5_saves_is_read_as_it_reads_it(family: str, tmp_path: Path) -> None:
    """Random thetas, kinds and spellings; a kind that the family does not implement is refused by its name."""
    draw = random.Random(family)
    refused = 0
    for _ in range(60):
        config, part = without_rotary(family)
        kind = draw.choice(["default", *OTHERS])
        rope = {"rope_type": kind, "rope_theta": draw.choice([1e4, 5e5, 1e6, 12345.5]), **OTHERS.get(kind, {})}
        if "factor" in rope and kind != "llama3":
            rope["factor"] = draw.choice([1.5, 2.0, 4.0])
        if kind == "longrope" and draw.random() < 0.5:
            rope |= draw.choice([{"factor": 8.0}, {"attention_factor": 1.25}])
        try:
            theirs, written = saved(part, rope, tmp_path)
        except (ValueError, KeyError, StrictDataclassError):  # Phi3Config itself refuses what it does not know
            theirs, written = None, {"rope_parameters": rope}
        spelling = draw.choice(["as saved", "rope_scaling", "type", "nested", "both"])
        inner = dict(written["rope_parameters"])
        if spelling == "rope_scaling":
            written = {"rope_theta": inner.pop("rope_theta"), "rope_scaling": inner}
        elif spelling == "type":
            inner["type"] = inner.pop("rope_type")
            written = {"rope_parameters": inner}
        elif spelling == "nested":
            written = {"rope_parameters": {"full_attention": inner}, "layer_types": ["full_attention"] * 4}
        elif spelling == "both":  # as remote classes under transformers 5
            written = {"rope_theta": inner["rope_theta"], "rope_parameters": {"type": inner["rope_type"], **inner}}
        part |= written
        if kind not in KINDS[family]:
            refused += 1
            with pytest.raises(ValueError, match=rf"rope_type is '{kind}', but only 'default'.* is supported"):
                ours(family, config)
        else:
            assert theirs is not None
            assert_same_angles(ours(family, config), theirs, (5, 64, 65, 100, 300))
    assert refused > 10


def test_the_originals_spelling_is_read_as_transformers_reads_its_own(tmp_path: Path) -> None:
    """``su`` under ``type``, as in the published Phi-3.5; transformers 5 reads it under its newer name only."""
    config = CONFIGS["phi3_5_vision"]
    scaling = {key: value for key, value in config["rope_scaling"].items() if key != "type"}
    theirs, _ = saved(config, {"rope_type": "longrope", "rope_theta": config["rope_theta"], **scaling}, tmp_path)
    assert_same_angles(ours("phi3_5_vision", config), theirs, (5, 64, 65))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "rope_theta is missing"),
        ({"rope_scaling": None}, "rope_theta is missing"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is given as 10000 and 1e.06"),
        ({"rope_theta": 1e4, "rope_scaling": {"factor": 2.0}}, "rope_scaling: factor is not a key that .*'default'"),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "type": "linear"}}, "which one is meant"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4', not a positive number"),
        ({"rope_theta": 1e4, "rope_scaling": "dynamic"}, "rope_scaling is 'dynamic', not an object"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "full_attention and sliding_attention layers differ",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": None}},
            "sliding_attention has no settings",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_or_contradictory_is_named(family: str, keys: dict[str, Any], message: str) -> None:
    config, part = without_rotary(family)
    part |= keys
    with pytest.raises(ValueError, match=message):
        ours(family, config)


def test_two_objects_must_agree() -> None:
    config, part = without_rotary("internvl2")
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    part |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": {**dynamic, "rope_theta": 1e6}}
    language = family_class(config).sizes(config)[1]
    assert (language.rope_theta, language.context) == (1e6, 128)
    part["rope_scaling"]["factor"] = 3.0
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters contradict"):
        ours("internvl2", config)
    part["rope_scaling"] = {"type": "default"}
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters contradict"):
        ours("internvl2", config)
    part |= {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}
    with pytest.raises(ValueError, match="rope_parameters: factor is missing"):
        ours("internvl2", config)


@pytest.mark.usefixtures("job_of_one")
def test_a_resaved_checkpoint_is_the_same_model_and_inspect_shows_its_rotary_settings(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", "internvl2")
    file = tmp_path / "hf" / "config.json"
    old = json.loads(file.read_text())
    before = dict(inspect(tmp_path / "hf")[0].lines)["rotary"]
    assert before == "theta 10,000, dynamic NTK with factor 2 beyond 64 tokens"
    part = old["llm_config"]
    scaling = part.pop("rope_scaling")
    part["rope_parameters"] = {"rope_theta": 5e5, "rope_type": scaling["type"], "factor": scaling["factor"]}
    del part["rope_theta"]
    file.write_text(json.dumps(old))
    hf_to_megatron(tmp_path / "hf", tmp_path / "ours")
    assert dict(inspect(tmp_path / "ours")[0].lines)["rotary"] == before.replace("10,000", "500,000")
    native, _ = to_native(old, map_of(old, "vocabulary", file), tmp_path / "hf")
    assert native["text_config"]["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 2.0}


def test_minicpm_without_a_version_is_told_by_its_sizes() -> None:
    """The config published from May to July 2024 has no version; MiniCPM-V 2's has none either."""
    config = deepcopy(CONFIGS["minicpm_v2_5"])
    del config["version"]
    assert family_class(config).sizes(config) == family_class(config).sizes(CONFIGS["minicpm_v2_5"])
    for other in ({"hidden_size": 2304, "query_num": 64}, {"scale_emb": 12}):
        with pytest.raises(ValueError, match="MiniCPM-V 1 or 2; only MiniCPM-Llama3-V 2.5"):
            family_class(config).sizes({**config, **other})
    with pytest.raises(ValueError, match="version is '2.6'"):
        family_class(config).sizes({**config, "version": "2.6"})
