"""A run directory from a stranger, every checksum right: each command on it ends in order and runs nothing of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import forging
import pytest
import torch
from jobs import SMALLER, Job, checkpoints
from PIL import Image
from test_bad_input import TINY

from mstar_mega import cli
from mstar_mega.platform import distributed


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("given") / "run"
    job = Job(directory, 1, *TINY, command="warmup")
    assert job.wait() == 0, job.output
    yield directory
    distributed.shutdown()


def in_the_index(checkpoint: Path, ran: Path) -> None:
    good = (checkpoint / forging.TORCH_INDEX).read_bytes()
    argument = b"\x8c" + bytes([len(str(ran))]) + str(ran).encode()
    module = "torch.distributed.checkpoint.filesystem"
    forging.put_torch_index(checkpoint, forging.named(module, "os.mkdir", argument, b"0" + good))


def in_a_layers_own_state(checkpoint: Path, ran: Path) -> None:
    forging.hide_in_own_state(checkpoint, forging.Marker(ran))


def in_the_plain_state(checkpoint: Path, ran: Path) -> None:
    torch.save(forging.Marker(ran), checkpoint / "common.pt")
    forging.seal(checkpoint)


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "evaluate": lambda run, picture: ["evaluate", str(run)],
    "generate": lambda run, picture: ["generate", str(run), "--image", str(picture), "--question", "How many?"],
    "resume": lambda run, picture: ["warmup", *SMALLER, *TINY, "--run.dir", str(run)],
}
"""``mstar inspect``, ``convert`` and ``verify`` take a converted checkpoint: tests/test_strange_checkpoints.py."""


@pytest.mark.parametrize("forge", [in_the_index, in_a_layers_own_state, in_the_plain_state])
def test_commands_on_a_forged_run(
    warmed_up: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    forge: Callable[[Path, Path], None],
) -> None:
    picture, ran = tmp_path / "picture.png", tmp_path / "ran"
    Image.new("RGB", (48, 48)).save(picture)
    for name, command in COMMANDS.items():
        run = tmp_path / name
        shutil.copytree(warmed_up, run)
        newest = checkpoints(run, "warmup")[-1]
        forge(run / "checkpoints/warmup" / newest, ran)
        code, said = cli.main(command(run, picture)), capsys.readouterr()
        assert not ran.exists(), f"{name} ran it"
        everything = said.out + said.err + caplog.text
        assert newest in everything and "weights_only" not in everything
        if code == 0:  # it went back to the checkpoint before
            assert "damaged" in everything
        else:
            assert code == 2 and len(re.findall("^mstar: error: ", said.err, re.MULTILINE)) == 1, said
        caplog.clear()
