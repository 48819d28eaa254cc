"""What ``mstar inspect`` says of checkpoints and of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from hf_directories import make_checkpoint

from mstar_mega.checkpoint_tools.convert import hf_to_megatron
from mstar_mega.checkpoint_tools.inspection import inspect
from mstar_mega.config import OptimizerConfig
from mstar_mega.models.description import read_config
from mstar_mega.training.checkpoint import save_checkpoint
from mstar_mega.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("job_of_one")


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


def test_a_hub_name_is_answered_with_the_download_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`hf download OpenGVLab/InternVL2-1B --local-dir DIR`"):
        read_config("OpenGVLab/InternVL2-1B")
    with pytest.raises(FileNotFoundError, match="is not a model directory$"):
        read_config(tmp_path)
