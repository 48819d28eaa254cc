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
from mstar_mega.checkpoint_tools.inspection import inspect

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


def twice_in_one(hf: Path) -> str:
    file = hf / "model-00002-of-00003.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    name, entry = next(iter(json.loads(content[8 : 8 + size]).items()))
    header = content[8 : 8 + size].rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    return rf"model-00002-of-00003.safetensors: the header names '{name}' twice"


def surplus_in_shard(hf: Path) -> str:
    file = hf / "model-00002-of-00003.safetensors"
    save_file({**load_file(file), "more": torch.zeros(1)}, file)
    return r"model-00002-of-00003.safetensors: tensor 'more' is not named in model.safetensors.index.json"


@pytest.mark.parametrize(
    "damage",
    [break_index, break_length, remove_shard, drop_tensor, add_tensor, reshape_tensor, other_family, no_config, twice,
     twice_in_one, surplus_in_shard],
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


def test_tied_copies_of_phi_are_kept_once_where_they_are_equal(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "hf", "phi3_5_vision")
    embedding, copy = "model.embed_tokens.weight", "model.vision_embed_tokens.wte.weight"
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({copy: tensors[embedding].clone()}))
    done = hf_to_megatron(tmp_path / "hf", tmp_path / "both")
    assert done.copies == (copy,) and f"{copy}: the same as the embedding, kept once" in str(done)
    rewrite(tmp_path / "hf", lambda tensors: tensors.pop(embedding))
    hf_to_megatron(tmp_path / "hf", tmp_path / "instead")
    for name in ("both", "instead"):
        megatron_to_hf(tmp_path / name, tmp_path / f"{name}_back")
        assert_same_bytes(all_tensors(tmp_path / f"{name}_back"), original)
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({embedding: tensors[copy] + 1}))
    with pytest.raises(ValueError, match=rf"{copy} and {embedding} are one tied embedding, but the two .* differ"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "differ")


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "hf", "internvl2", shards=3)
    (tmp_path / "hf" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(ValueError, match=rf"{name} \(\d+ bytes\) is a Git LFS pointer, .*: run `git lfs pull`"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "there")


def test_quantized_checkpoints_are_called_so(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", "minicpm_v2_5")
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ValueError, match=r"config\.json: quantization_config says .* quantized \(bitsandbytes\)"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "there")
    file.write_text(json.dumps(config))
    weight = "llm.model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({weight: tensors[weight].to(torch.int8)}))
    with pytest.raises(ValueError, match=rf"{weight} \(int8\) belongs to quantized weights"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "there")


def test_adapters_and_other_formats_are_called_what_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"base_model.model.lora_A.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "openbmb/MiniCPM"}))
    message = r"adapter holds an adapter \(PEFT, LoRA\), not a whole model: merge it into openbmb/MiniCPM"
    for look in (lambda: hf_to_megatron(folder, tmp_path / "there"), lambda: inspect(folder)):
        with pytest.raises(ValueError, match=message):
            look()
    make_checkpoint(tmp_path / "hf", "internvl2")
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"mlp1.1.lora_A.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"mlp1\.1\.lora_A\.weight belongs to an adapter"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "there")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"hf holds PyTorch weights \(pytorch_model.bin\); only safetensors are read"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "there")


def test_a_stored_buffer_of_integers_is_no_quantization(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", "phi3_5_vision")
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"model.position_ids": torch.arange(3)}))
    with pytest.raises(ValueError, match=r"1 not known to phi3_5_vision: model\.position_ids"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "there")
