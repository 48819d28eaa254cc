"""Hugging Face -> checkpoint -> Hugging Face: the same bytes in any layout, whole or absent, and errors that name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parallel import run_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor

from mstar_mega import cli, settings
from mstar_mega.checkpoint_tools import convert, hf_files
from mstar_mega.checkpoint_tools.convert import hf_to_megatron, megatron_to_hf
from mstar_mega.checkpoint_tools.inspection import inspect
from mstar_mega.checkpoint_tools.maps import map_of
from mstar_mega.checkpoint_tools.megatron_files import MegatronWeights
from mstar_mega.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from mstar_mega.models import golden
from mstar_mega.models.build import FAMILIES, build_model
from mstar_mega.models.description import family_from_hf
from mstar_mega.models.initialization import canonical_name
from mstar_mega.models.lmm import Head
from mstar_mega.models.packing import Prompt
from mstar_mega.platform import distributed
from mstar_mega.training.checkpoint import load_checkpoint, save_checkpoint
from mstar_mega.training.trainer import Trainer

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]

CONFIGS: dict[str, dict[str, Any]] = {
    "internvl2": {
        "model_type": "internvl_chat",
        "force_image_size": 16,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "bfloat16",
        "llm_config": {
            "model_type": "internlm2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 301, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64,
            "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
            "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False,
        },
    },
    "phi3_5_vision": {
        "model_type": "phi3_v",
        "torch_dtype": "bfloat16",
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 301, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 256, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]},
        "embd_layer": {
            "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
            "use_hd_transform": True, "with_learnable_separator": True,
        },
        "img_processor": {
            "name": "clip_vision_model", "image_dim_out": 8, "num_img_tokens": 4,
            "vision_config": {
                "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
            },
        },
    },
    "minicpm_v2_5": {
        "model_type": "minicpmv",
        "version": "2.5",
        "torch_dtype": "float16",
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 301, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 64, "rope_theta": 10000.0, "query_num": 3, "resampler_num_heads": 2,
        "batch_vision_input": True, "drop_vision_last_layer": False, "patch_size": 4, "image_size": 16,
        "slice_config": {"max_slice_nums": 9, "patch_size": 4},
        "vision_config": {
            "model_type": "idefics2", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        },
    },
}  # fmt: skip
"""config.json of a model of each family that is made in a blink; grouped queries and an odd vocabulary where it can."""


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """This process is a job of one rank."""
    distributed.initialize(ParallelConfig(), 0)
    yield
    distributed.shutdown()


def make_checkpoint(folder: Path, family: str, head: Head = "vocabulary", shards: int = 1) -> dict[str, Tensor]:
    """A Hugging Face directory with random weights; returns them."""
    folder.mkdir(parents=True)
    config = {**CONFIGS[family], **({convert.HEAD_KEY: head} if head != "vocabulary" else {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 290}))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        source.name: torch.randn(source.shape, generator=generator).to(getattr(torch, config["torch_dtype"]))
        for mapping in map_of(config, head, folder).mappings
        for source in mapping.sources
    }
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file)
        weight_map.update(dict.fromkeys(names[number::shards], file))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Of all safetensors files; each name may stand in one of them only."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(tensors)
        tensors.update(part)
    return tensors


def assert_same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


# -- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("head", ["vocabulary", "linear", "likelihood"])
def test_there_and_back_gives_the_same_bytes(tmp_path: Path, family: str, head: Head) -> None:
    original = make_checkpoint(tmp_path / "hf", family, head, shards=3)
    for tensor, pipeline in LAYOUTS:
        there, back = tmp_path / f"mcore{tensor}{pipeline}", tmp_path / f"back{tensor}{pipeline}"
        done = hf_to_megatron(tmp_path / "hf", there, tensor, pipeline)
        assert done.tensors == len(original) and done.values == sum(t.numel() for t in original.values())
        assert len(list(there.glob("*.distcp"))) == tensor * pipeline
        megatron_to_hf(there, back, shard_bytes=4000)
        assert_same_bytes(all_tensors(back), original)
        index = json.loads((back / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(original) and len(set(index["weight_map"].values())) > 1
        for name in ("config.json", "added_tokens.json"):
            assert (back / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize("family", ["internvl2", "phi3_5_vision", "minicpm_llama3_v2_5"])
def test_reference_checkpoints_come_back_byte_for_byte(tmp_path: Path, family: str) -> None:
    source = GOLDENS / family
    if not source.is_dir():
        pytest.skip(f"the recorded checkpoint {source} is not here")
    for tensor, pipeline in LAYOUTS:
        name = f"{tensor}{pipeline}"
        hf_to_megatron(source, tmp_path / name, tensor, pipeline)
        megatron_to_hf(tmp_path / name, tmp_path / f"{name}-hf")
        assert_same_bytes(all_tensors(tmp_path / f"{name}-hf"), load_file(source / "model.safetensors"))


def through_the_model(folder: str, family: str, tensor: int, pipeline: int, head: Head) -> None:
    """Load a converted checkpoint into a model of this layout and save it as training does."""
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    distributed.initialize(parallel, 0)
    policy = FAMILIES[family].from_config(CONFIGS[family], None)
    config = Config(parallel=parallel, model=ModelConfig(family=family, precision="bfloat16"))
    model = build_model(config, policy, head)
    path = Path(folder)
    state, _ = load_checkpoint(path / "there", {"model": model.sharded_state_dict()})
    model.load_state_dict(state["model"])
    trainer = Trainer(model, OptimizerConfig(), policy.prompt, 10)
    save_checkpoint(path, f"saved{tensor}{pipeline}", trainer.sharded_state(), {"stage": "warmup"})


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("tensor", "pipeline", "head"), [(1, 1, "linear"), (2, 1, "likelihood"), (2, 2, "vocabulary")])
def test_what_training_saves_in_any_layout_converts_back(
    tmp_path: Path, family: str, tensor: int, pipeline: int, head: Head
) -> None:
    original = make_checkpoint(tmp_path / "hf", family, head)
    hf_to_megatron(tmp_path / "hf", tmp_path / "there", 1, 2)
    args = (str(tmp_path), family, tensor, pipeline, head)
    if tensor * pipeline == 1:
        through_the_model(*args)
    else:
        run_parallel(tensor * pipeline, "test_conversion:through_the_model", *args)
    saved = tmp_path / f"saved{tensor}{pipeline}"
    assert MegatronWeights(saved).optimizer_bytes > 0
    with pytest.raises(ValueError, match="Add --like"):
        megatron_to_hf(saved, tmp_path / "nothing")
    megatron_to_hf(saved, tmp_path / "back", like=tmp_path / "hf")
    # The model trains in bfloat16, and the config says so.
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in original.items()}
    assert_same_bytes(all_tensors(tmp_path / "back"), expected)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {**config, "torch_dtype": "bfloat16"}


def test_the_checkpoint_is_the_model_parameter_by_parameter(tmp_path: Path) -> None:
    """Names and values as the model itself writes them; the map is one to one."""
    make_checkpoint(tmp_path / "hf", "internvl2", "likelihood")
    hf_to_megatron(tmp_path / "hf", tmp_path / "there", 2, 2)
    through_the_model(str(tmp_path), "internvl2", 1, 1, "likelihood")
    ours, models = MegatronWeights(tmp_path / "there"), MegatronWeights(tmp_path / "saved11")
    assert set(ours.parameters) == set(models.parameters)
    for name in ours.parameters:
        assert torch.equal(ours.read(name), models.read(name)), name
    keys = {key for key in models.index.state_dict_metadata if not key.startswith("optimizer.")}
    assert set(ours.index.state_dict_metadata) == keys


def test_padding_is_zero_and_stays_inside(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "hf", "internvl2")
    hf_to_megatron(tmp_path / "hf", tmp_path / "there")
    table = MegatronWeights(tmp_path / "there").read("language.embedding.word_embeddings.weight")
    assert table.shape == (384, 16) and not table[301:].any()
    assert torch.equal(table[:301], original["language_model.model.tok_embeddings.weight"])


def convert_together(folder: str) -> None:
    distributed.initialize(ParallelConfig(), 0)
    path = Path(folder)
    hf_to_megatron(path / "hf", path / "there", 2, 1)
    megatron_to_hf(path / "there", path / "back", shard_bytes=4000)


def test_processes_share_the_work(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "hf", "internvl2")
    run_parallel(2, "test_conversion:convert_together", str(tmp_path))
    assert_same_bytes(all_tensors(tmp_path / "back"), original)
    assert {path.name.split("_")[-1] for path in (tmp_path / "there").glob("*.distcp")} == {"0.distcp", "1.distcp"}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = make_checkpoint(tmp_path / "hf", "internvl2")
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    assert cli.main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", there, "--tensor", "2"]) == 0
    assert cli.main(["convert", "megatron-to-hf", "--checkpoint", there, "--out", back]) == 0
    assert_same_bytes(all_tensors(tmp_path / "back"), original)
    distributed.initialize(ParallelConfig(), 0)  # the command has left the job
    assert cli.main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", there]) == cli.USER_ERROR
    assert "exists and is not empty" in capsys.readouterr().err
    distributed.initialize(ParallelConfig(), 0)


# -- transformers' own layout ----------------------------------------------------------------------------------------


def native_model(folder: Path) -> Any:
    from transformers import InternVLForConditionalGeneration

    model, told = InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


@pytest.mark.parametrize("case", ["one_tile", "multi_tile_two_images", "dynamic_ntk"])
def test_native_layout_gives_the_original_logits_in_transformers(tmp_path: Path, case: str) -> None:
    source = GOLDENS / "internvl2"
    if not source.is_dir():
        pytest.skip(f"the recorded checkpoint {source} is not here")
    tensors = load_file(source / f"case_{case}.safetensors")
    shutil.copytree(source, tmp_path / "hf", copy_function=shutil.copyfile)
    tmp_path.joinpath("hf").chmod(0o755)
    context = json.loads((source / "meta.json").read_text())["img_context_token_id"]
    (tmp_path / "hf" / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": context}))
    hf_to_megatron(tmp_path / "hf", tmp_path / "there")
    megatron_to_hf(tmp_path / "there", tmp_path / "native", export=convert.to_native)
    model = native_model(tmp_path / "native")
    with torch.no_grad():
        logits = model(input_ids=tensors["input_ids"], pixel_values=tensors["pixel_values"]).logits
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=5e-4)


def test_a_run_from_random_weights_exports_to_transformers(tmp_path: Path) -> None:
    """The built-in size has no Hugging Face directory behind it: config and tokenizer are written for it."""
    config = Config()
    family = FAMILIES["internvl2"]("digits")  # type: ignore[call-arg, arg-type]
    model = tiny.randomize(build_model(config, family))
    run = tmp_path / "run"
    state = Trainer(model, OptimizerConfig(), family.prompt, 10).sharded_state()
    save_checkpoint(run / "checkpoints" / "warmup", "iteration_0000_step_000001", state, {"stage": "warmup"})
    (run / "config.yaml").write_text(settings.dump(config))
    megatron_to_hf(run, tmp_path / "native", export=convert.to_native)
    vision, context = family.vision, family.tokenizer.id("<IMG_CONTEXT>")
    count = (vision.grid // 2) ** 2
    text = family.tokenizer.encode("Which row?")
    tokens = [text[0], *[context] * count, *text]
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    prompt = Prompt(tokens, list(range(1, 1 + count)), pixels)
    ours = golden.logits(model, golden.Case([prompt], pixels, None, torch.ones(1, dtype=torch.bool)))
    with torch.no_grad():
        theirs = native_model(tmp_path / "native")(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-4)
    assert (tmp_path / "native" / "tokenizer.model").exists()
    megatron_to_hf(run, tmp_path / "back")
    again = family_from_hf(tmp_path / "back")
    assert again.vision == family.vision and again.tokenizer.encode("row 3") == family.tokenizer.encode("row 3")
    hf_to_megatron(tmp_path / "back", tmp_path / "there")
    saved = MegatronWeights(run / "checkpoints" / "warmup" / "iteration_0000_step_000001")
    made = MegatronWeights(tmp_path / "there")
    for name in saved.parameters:
        rows = family.language.vocab if "word_embeddings" in name or "output_layer" in name else None
        assert torch.equal(saved.read(name)[:rows], made.read(name)[:rows]), name


# -- what is wrong is named ------------------------------------------------------------------------------------------


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


def rewrite(hf: Path, change: Any) -> None:
    tensors = all_tensors(hf)
    for path in hf.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, hf / "model.safetensors")


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


# -- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_the_same_of_both_formats(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "hf", "internvl2", "linear", shards=2)
    hf_to_megatron(tmp_path / "hf", tmp_path / "there", 2, 2)
    (theirs,), (ours,) = inspect(tmp_path / "hf"), inspect(tmp_path / "there")
    a, b = dict(theirs.lines), dict(ours.lines)
    total = sum(tensor.numel() for tensor in original.values())
    assert a["all parameters"] == f"{total:,} in {len(original)} tensors"
    assert a["family"] == b["family"] == "internvl2, linear head"
    for part in ("language", "vision", "vision tower", "connector", "language layers", "score head", "dtype"):
        assert a[part] == b[part], part
    assert a["score head"] == "32" and a["dtype"] == "bfloat16"
    assert (a["embedding"], b["embedding"]) == (f"{301 * 16:,}", f"{384 * 16:,}")
    assert b["cut for"] == "tensor 2 x pipeline 2" and "4 files" in b["format"]


def test_inspect_reads_no_weights_and_shows_the_training_step(tmp_path: Path) -> None:
    model, _ = tiny.build()
    position = {"iteration": 3, "step": 7, "total_steps": 40, "temperature": 0.9}
    state = Trainer(model, OptimizerConfig(), lambda query: None, 10).sharded_state()  # type: ignore[arg-type, return-value]
    stage = tmp_path / "run" / "checkpoints" / "evolve"
    path = save_checkpoint(stage, "iteration_0003_step_000007", state, {"stage": "evolve", "position": position})
    for file in path.glob("*.distcp"):
        file.write_bytes(b"")
    (found,) = inspect(tmp_path / "run")
    lines = dict(found.lines)
    assert lines["stage"] == "evolve" and lines["step"] == "7 of iteration 3; 40 in total"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert lines["all parameters"].startswith(f"{count:,} in ")
    assert lines["optimizer state"] == f"{8 * count:,} bytes"


def test_inspect_names_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint: expected model.safetensors.index.json"):
        inspect(tmp_path)
    with pytest.raises(ValueError, match="there is no such directory"):
        inspect(tmp_path / "none")


def test_canonical_names_are_those_of_the_map(tmp_path: Path) -> None:
    for family, config in CONFIGS.items():
        policy = FAMILIES[family].from_config(config, None)
        model = build_model(Config(model=ModelConfig(family=family)), policy)
        ours = {canonical_name(name, model): tuple(p.shape) for name, p in model.named_parameters()}
        assert ours == {mapping.name: mapping.shape for mapping in map_of(config, "vocabulary", tmp_path).mappings}
