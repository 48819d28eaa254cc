"""mstar verify: against transformers' own InternVL on made-up weights, and against the originals' recorded cases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_directories import GOLDENS, make_checkpoint, native_model, rewrite
from safetensors.torch import load_file, save_file

from mstar_mega import cli
from mstar_mega.checkpoint_tools.convert import hf_to_megatron, megatron_to_hf, to_native
from mstar_mega.config import ParallelConfig
from mstar_mega.platform import distributed

CONTEXT = 290


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """This process is a job of one rank; the command leaves it."""
    distributed.initialize(ParallelConfig(), 0)
    yield
    distributed.shutdown()


def record_case(hf: Path, file: Path) -> None:
    """What transformers computes from a directory in its own layout, in the format of a recorded case."""
    model = native_model(hf)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    tokens = torch.tensor([[5, 6, *[CONTEXT] * 8, 40, 41, 42]])
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        drawn, sequence = [], tokens
        for _ in range(4):
            logits = model(input_ids=sequence, pixel_values=pixels).logits
            drawn.append(int(logits[0, -1].argmax()))
            sequence = torch.cat([sequence, torch.tensor([[drawn[-1]]])], dim=1)
            assert CONTEXT not in drawn
        logits = model(input_ids=tokens, pixel_values=pixels).logits
    case = {
        "input_ids": tokens, "pixel_values": pixels, "image_flags": torch.ones(2, dtype=torch.int64),
        "vision_features": features, "logits": logits, "greedy_tokens": torch.tensor([drawn]),
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in case.items()}, file)


def test_verify_sees_one_changed_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "hf", "internvl2")
    rewrite(tmp_path / "hf", lambda tensors: [tensor.mul_(0.3) for tensor in tensors.values()])
    hf_to_megatron(tmp_path / "hf", tmp_path / "there", 2, 1)
    megatron_to_hf(tmp_path / "there", tmp_path / "native", export=to_native)
    case = tmp_path / "case_made.safetensors"
    record_case(tmp_path / "native", case)
    for directory in ("there", "hf"):
        layout = ["--parallel.tensor", "1", "--parallel.pipeline", "1"] if directory == "hf" else ["--tensor", "1"]
        assert cli.main(["verify", "--checkpoint", str(tmp_path / directory), "--golden", str(case), *layout]) == 0
        assert "greedy tokens 4 of 4 equal" in capsys.readouterr().out
        distributed.initialize(ParallelConfig(), 0)
    rewrite(tmp_path / "hf", lambda tensors: tensors["mlp1.3.bias"][:1].add_(0.5))
    assert cli.main(["verify", "--checkpoint", str(tmp_path / "hf"), "--golden", str(case)]) == cli.USER_ERROR
    told = capsys.readouterr().err
    # The bias is bfloat16, which has no 0.5 more than any value of it.
    found = re.search(
        r"is not the recorded model: case_made.safetensors: features differ by (\S+) .*logits differ", told
    )
    assert found and 0.49 < float(found[1]) < 0.51, told
    distributed.initialize(ParallelConfig(), 0)
    loose = ["--features-tolerance", "10", "--logits-tolerance", "100"]
    broken = load_file(case)
    broken["greedy_tokens"] += 1
    save_file(broken, case)
    assert cli.main(["verify", "--checkpoint", str(tmp_path / "there"), "--golden", str(case), *loose]) == 2
    assert "4 of 4 greedy tokens differ" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["internvl2", "phi3_5_vision", "minicpm_llama3_v2_5"])
def test_recorded_cases_through_the_command(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = GOLDENS / family
    if not source.is_dir():
        pytest.skip(f"the recorded checkpoint {source} is not here")
    hf_to_megatron(source, tmp_path / "there", 2, 2)
    cases = sorted(map(str, source.glob("case_*.safetensors")))
    assert cli.main(["verify", "--checkpoint", str(tmp_path / "there"), "--golden", *cases]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(cases)


def test_what_is_no_case_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"input_ids": torch.zeros(1)}, tmp_path / "x.safetensors")
    args = ["verify", "--checkpoint", str(tmp_path), "--golden", str(tmp_path / "x.safetensors")]
    assert cli.main(args) == cli.USER_ERROR
    assert "x.safetensors has no logits and no greedy_tokens" in capsys.readouterr().err
