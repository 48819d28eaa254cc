"""Directories and files that some rank of a job does not see: one line that names both."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch.distributed as dist
from parallel import run_parallel

from mstar_mega.checkpoint_tools import verify
from mstar_mega.config import Config, DataConfig, ParallelConfig, RunConfig
from mstar_mega.platform import distributed
from mstar_mega.recipe.directory import check_shared, run_directory, shared_data
from mstar_mega.recipe.job import open_job


def seen(name: str, paths: list[Path], writes: bool, holds: str = "") -> str:
    """What a rank says whose own idea of the path is ``paths[rank]``."""
    distributed.initialize(ParallelConfig(), 0)
    try:
        check_shared(name, paths[dist.get_rank()], writes, holds)
    except ValueError as error:
        return str(error)
    return ""


def taken(directories: list[Path]) -> str:
    """A run directory taken, and given back."""
    distributed.initialize(ParallelConfig(), 0)
    rank = dist.get_rank()
    try:
        with run_directory(Config(run=RunConfig(dir=str(directories[rank]))), rank == 0):
            return ""
    except ValueError as error:
        return str(error)


def test_a_run_directory_that_one_rank_does_not_see(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()  # the same path on another machine's own disk is there, and empty
    for said in run_parallel(2, "test_shared_directories:taken", [ours, theirs]):
        assert "run.dir" in said and "is not the same for every rank: rank 1 on " in said
        assert "cannot see what rank 0 on" in said and "all nodes share" in said
    assert run_parallel(2, "test_shared_directories:taken", [ours, ours]) == ["", ""], "the lock was given back"
    assert not list(ours.glob(".seen*"))


def opened(checkpoints: list[Path], run_dir: Path) -> str:
    """What a rank says that opens a job on its own idea of a checkpoint."""
    config = Config(run=RunConfig(dir=str(run_dir)))
    distributed.initialize(ParallelConfig(), 0)
    config.model.checkpoint = str(checkpoints[dist.get_rank()])
    try:
        with open_job(config):
            return ""
    except ValueError as error:
        return str(error)


def test_a_checkpoint_that_one_rank_does_not_see(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours / "model", theirs):
        folder.mkdir(parents=True)
    (ours / "model/config.json").write_text("{}")
    for said in run_parallel(2, "test_shared_directories:opened", [ours, theirs], tmp_path / "run"):
        assert said.startswith("model.checkpoint ") and "rank 1 on " in said and "all nodes share" in said
    for said in run_parallel(2, "test_shared_directories:opened", [ours, ours], tmp_path / "run"):
        assert "config.json" in said and "rank 1" not in said, "both see it, and it is no model's"
    assert sorted(path.name for path in ours.rglob("*")) == ["config.json", "model"], "nothing is left in a checkpoint"


def verified(checkpoints: list[Path], cases: list[Path]) -> str:
    """What a rank says that verifies its own idea of a checkpoint."""
    distributed.initialize(ParallelConfig(), 0)
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    rank = dist.get_rank()
    try:
        verify.run(parser.parse_args(["--checkpoint", str(checkpoints[rank]), "--golden", str(cases[rank])]))
    except ValueError as error:
        return str(error)
    return ""


def test_verify_names_the_rank_that_does_not_see_the_checkpoint_or_the_case(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    (ours / "config.json").write_text("{}")
    (ours / "case.safetensors").write_bytes(b"12")
    cases = [ours / "case.safetensors", theirs / "case.safetensors"]
    for said in run_parallel(2, "test_shared_directories:verified", [ours, theirs], cases):
        assert said.startswith("--checkpoint ") and "rank 1 on " in said and "all nodes share" in said
    for said in run_parallel(2, "test_shared_directories:verified", [ours, ours], cases):
        assert said.startswith("--golden ") and "rank 1 on " in said
    for said in run_parallel(2, "test_shared_directories:verified", [ours, ours], cases[:1] * 2):
        assert "is not a safetensors file" in said, "all see it, and it is no case"


def test_training_files_that_one_rank_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[1]")
    (tmp_path / "other.json").write_text("[1, 2]")
    for other in ("other.json", "none.json"):
        paths = [tmp_path / "rows.json", tmp_path / other]
        for said in run_parallel(2, "test_shared_directories:seen", "data.path", paths, False):
            assert said.startswith("data.path ") and "rank 1 on " in said
    for path, writes in ((tmp_path, True), (tmp_path, False), (tmp_path / "rows.json", False), (tmp_path / "no", True)):
        assert run_parallel(2, "test_shared_directories:seen", "data.dir", [path, path], writes) == ["", ""]
    data = DataConfig(name="mathv360k", path="a.json", images="b", dir="c")
    assert shared_data(Config(data=data)) == {
        "data.path": Path("a.json"),
        "data.images": Path("b"),
        "data.dir": Path("c"),
    }


@pytest.mark.usefixtures("job_of_one")
def test_a_file_in_the_run_directorys_place_is_called_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    config = Config(run=RunConfig(dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="cannot be used: it is a file, not a folder"), run_directory(config, True):
        pass
    assert (tmp_path / "run").read_text() == "in the way"
