"""Under another megatron-core (``make test MCORE=...``): checkpoints go both ways between it and the pinned one."""

from __future__ import annotations

import json
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import test_parallel_truth
import tiny

from mstar_mega.config import DataConfig, ParallelConfig
from mstar_mega.data.digits.task import build as build_digits
from mstar_mega.models.fingerprint import fingerprint
from mstar_mega.training.batches import TrainGroup
from mstar_mega.training.checkpoint import load_checkpoint
from mstar_mega.training.trainer import Trainer

REPO = Path(__file__).parents[1]
OTHER = REPO / ".venv" / "bin" / "python"
PINNED = re.findall(r"^megatron-core==(\S+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)[0]

pytestmark = [
    pytest.mark.skipif(version("megatron-core") == PINNED, reason="this is the pinned megatron-core"),
    pytest.mark.skipif(not OTHER.exists(), reason="needs the environment with the pinned megatron-core (make setup)"),
    pytest.mark.usefixtures("job_of_one"),
]


def batch(folder: Path) -> list[TrainGroup]:
    config = DataConfig(
        warmup_examples=6, labelled_queries=1, unlabelled_queries=0, validation_queries=1, test_queries=1
    )
    family = tiny.family()
    return [TrainGroup(query, [family.response_tokens(text)]) for query, text in build_digits(config, folder, 0).warmup]


def later(trainer: Trainer, folder: Path) -> dict[str, Any]:
    weights = fingerprint(trainer.model)
    losses = [trainer.step(batch(folder)).loss for _ in range(2)]
    return {"megatron": version("megatron-core"), "weights": weights, "losses": losses}


def write(folder: str, name: str) -> dict[str, Any]:
    """Two steps, a checkpoint; the weights there and the losses of two steps more."""
    trainer, _ = test_parallel_truth.make_trainer(ParallelConfig(), "vocabulary")
    for _ in range(2):
        trainer.step(batch(Path(folder)))
    test_parallel_truth.save(trainer, folder, name)
    return later(trainer, Path(folder))


def go_on(folder: str, name: str) -> dict[str, Any]:
    """The same from the checkpoint, by a trainer that began elsewhere."""
    trainer, _ = test_parallel_truth.make_trainer(ParallelConfig(), "vocabulary", seed=9)
    state, common = load_checkpoint(Path(folder) / name, trainer.sharded_state())
    trainer.load_state(state, common["scheduler"])
    return later(trainer, Path(folder))


def both(folder: str) -> dict[str, dict[str, Any]]:
    """Write a checkpoint, and go on from the one that the test's process has written."""
    return {"wrote": write(folder, "theirs"), "went on": go_on(folder, "ours")}


def by_the_pinned(folder: Path) -> dict[str, dict[str, Any]]:
    """:func:`both` in the environment of the pinned megatron-core."""
    program = """
import json, sys, test_other_megatron
from mstar_mega.config import ParallelConfig
from mstar_mega.platform import distributed
distributed.initialize(ParallelConfig(), 0)
print(json.dumps(test_other_megatron.both(sys.argv[1])))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [str(OTHER), "-c", program, str(folder)], cwd=Path(__file__).parent, env=environment, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_continues_what_the_other_saved(tmp_path: Path) -> None:
    ours = write(str(tmp_path), "ours")
    theirs = by_the_pinned(tmp_path)
    assert theirs["wrote"]["megatron"] == PINNED, "the environment .venv holds another megatron-core: make setup"
    assert ours["losses"] == pytest.approx(theirs["wrote"]["losses"], rel=1e-5)
    for saved, loaded in ((theirs["wrote"], go_on(str(tmp_path), "theirs")), (ours, theirs["went on"])):
        assert loaded["megatron"] != saved["megatron"]
        assert loaded["weights"] == saved["weights"]
        assert loaded["losses"] == pytest.approx(saved["losses"], rel=1e-5)
