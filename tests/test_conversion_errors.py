"""Conversions that cannot be, or are cut off: one clear error, and nothing left that looks complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_directories import all_tensors, assert_same_bytes, make_checkpoint, rewrite
from safetensors.torch import load_file, save_file

from mstar_mega.checkpoint_tools import convert, hf_files
from mstar_mega.checkpoint_tools.convert import hf_to_megatron, megatron_to_hf

pytestmark = pytest.mark.usefixtures("job_of_one")


def break_index(hf: Path) -> str:
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["mlp1.0.bias"] = index["weight_map"]["mlp1.0.weight"]
    path.write_text(json.dumps(index))
    return r"model-0000\d-of-00003.safetensors: tensor 'mlp1.0.bias' is expected here .* but it is in"


def break_length(hf: Path) -> str:
    path = hf / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return r"model-00002-of-00003.safetensors \([\d,]+ bytes\) is truncated"


def remove_shard(hf: Path) -> str:
    (hf / "model-00003-of-00003.safetensors").unlink()
    return r"model-00003-of-00003.safetensors is missing \(safetensors files present: model-00001"


def drop_tensor(hf: Path) -> str:
    rewrite(hf, lambda tensors: tensors.pop("mlp1.1.bias"))
    return r"hf does not hold the model of its config.json: 1 missing: mlp1.1.bias \[16\]"


def add_tensor(hf: Path) -> str:
    rewrite(hf, lambda tensors: tensors.update({"mlp1.5.bias": torch.zeros(3)}))
    return "1 not known to internvl2: mlp1.5.bias"


def reshape_tensor(hf: Path) -> str:
    rewrite(hf, lambda tensors: tensors.update({"mlp1.1.bias": torch.zeros(3)}))
    return r"model.safetensors: mlp1.1.bias is \[3\], expected \[16\]"


def other_family(hf: Path) -> str:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    return r"config.json has model_type 'llava'; supported are internvl_chat"


def no_config(hf: Path) -> str:
    (hf / "config.json").unlink()
    return r"hf/config.json is missing: "


def twice(hf: Path) -> str:
    first, second = (load_file(hf / f"model-0000{n}-of-00003.safetensors") for n in (1, 2))
    name = next(iter(first))
    save_file({**second, name: first[name]}, hf / "model-00002-of-00003.safetensors")
    return rf"model-00002-of-00003.safetensors: tensor '{name}' is also in model-00001-of-00003.safetensors"


def surplus_in_shard(hf: Path) -> str:
    file = hf / "model-00002-of-00003.safetensors"
    save_file({**load_file(file), "more": torch.zeros(1)}, file)
    return r"model-00002-of-00003.safetensors: tensor 'more' is not named in model.safetensors.index.json"


@pytest.mark.parametrize(
    "damage",
    [break_index, break_length, remove_shard, drop_tensor, add_tensor, reshape_tensor, other_family, no_config, twice,
     surplus_in_shard],
)  # fmt: skip
def test_wrong_sources_are_one_clear_error(tmp_path: Path, damage: Any) -> None:
    make_checkpoint(tmp_path / "hf", "internvl2", shards=3)
    message = damage(tmp_path / "hf")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        hf_to_megatron(tmp_path / "hf", tmp_path / "there")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", "internvl2")
    hf_to_megatron(tmp_path / "hf", tmp_path / "there")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = 5
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"6 missing: language.decoder.layers.4.input_layernorm.weight"):
        megatron_to_hf(tmp_path / "there", tmp_path / "back", like=tmp_path / "hf")
    assert not (tmp_path / "back").exists()


def test_a_hugging_face_directory_is_sent_the_other_way(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", "internvl2")
    with pytest.raises(ValueError, match=r"hf is a Hugging Face directory, not a checkpoint: .*hf-to-megatron --hf"):
        megatron_to_hf(tmp_path / "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_impossible_layouts_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", "internvl2")
    with pytest.raises(ValueError, match="--pipeline 3 does not divide the model's 4 layers"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "there", 1, 3)
    with pytest.raises(ValueError, match="--tensor 5 does not divide"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "there", 5, 1)


def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_checkpoint(tmp_path / "hf", "internvl2")
    hf_to_megatron(tmp_path / "hf", tmp_path / "there")

    class Killed(BaseException):
        """Nothing that code would catch, as a signal would be."""

    def die(*_: Any) -> None:
        raise Killed

    there: list[tuple[Any, str]] = [(convert.MegatronWriter, "close"), (convert, "write_index")]
    for place, name in [*there, (convert, "write_plain_state")]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, die)
            hf_to_megatron(tmp_path / "hf", tmp_path / "again")
        assert not (tmp_path / "again").exists()
    back: list[tuple[Any, str]] = [(hf_files.HFWriter, "flush"), (convert, "finish_shards")]
    for place, name in [*back, (convert, "copy_model_files")]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, die)
            megatron_to_hf(tmp_path / "there", tmp_path / "back")
        assert not (tmp_path / "back").exists()
    megatron_to_hf(tmp_path / "there", tmp_path / "back")
    hf_to_megatron(tmp_path / "hf", tmp_path / "again")
    assert_same_bytes(all_tensors(tmp_path / "back"), original)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "back", "hf", "there"]
