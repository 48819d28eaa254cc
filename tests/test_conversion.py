"""Hugging Face -> checkpoint -> Hugging Face: the same bytes in any layout, whatever writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from hf_directories import CONFIGS, GOLDENS, all_tensors, assert_same_bytes, make_checkpoint, native_model
from parallel import run_parallel
from safetensors.torch import load_file

from mstar_mega import cli, settings
from mstar_mega.checkpoint_tools import convert
from mstar_mega.checkpoint_tools.convert import hf_to_megatron, megatron_to_hf
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

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


pytestmark = pytest.mark.usefixtures("job_of_one")


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
    keys = {key for key in (*models.index.tensors, *models.index.objects) if not key.startswith("optimizer.")}
    assert {*ours.index.tensors, *ours.index.objects} == keys


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


def test_canonical_names_are_those_of_the_map(tmp_path: Path) -> None:
    for family, config in CONFIGS.items():
        policy = FAMILIES[family].from_config(config, None)
        model = build_model(Config(model=ModelConfig(family=family)), policy)
        ours = {canonical_name(name, model): tuple(p.shape) for name, p in model.named_parameters()}
        assert ours == {mapping.name: mapping.shape for mapping in map_of(config, "vocabulary", tmp_path).mappings}
