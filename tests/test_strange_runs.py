"""A run directory from a stranger: nothing that it names runs, and nothing is written or read through its links."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image
from report_runs import make_run

from mstar_mega import functions, settings
from mstar_mega.checkpoint_tools.runs import newest_policy
from mstar_mega.config import Config
from mstar_mega.data.pictures import file_size
from mstar_mega.data.types import ImageRef, image_digest
from mstar_mega.platform.files import write_bytes_atomic
from mstar_mega.platform.inputs import refuse_links_out
from mstar_mega.recipe import benchmark
from mstar_mega.recipe.directory import run_directory
from mstar_mega.recipe.outside_prm import find_outside_prm
from mstar_mega.report.images import shown_picture
from mstar_mega.rewards.checker import AnswerChecker
from mstar_mega.training.checkpoint import load_latest

pytestmark = pytest.mark.usefixtures("job_of_one")
REPO = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------------ what runs


def hostile_settings(folder: Path, name: str = "config.yaml", end: str = settings.END_OF_FILE) -> Path:
    """The settings of a run that name a function of its own."""
    (folder / "bad.py").write_text(
        f"import os\nos.mkdir({str(folder / 'ran')!r})\ndef f(query, response): return 1.0\n"
    )
    config = Config()
    config.reward.function = f"{folder / 'bad.py'}:f"
    text = settings.dump(config)
    (folder / name).write_text(text.removesuffix(settings.END_OF_FILE) + end)
    return folder / name


@pytest.mark.parametrize("end", ["...\n", "...\n\n", "...\n# the end\n", "...", "...\r\n", ""])
@pytest.mark.parametrize("through", ["", "link", "../run/config.yaml"])
def test_a_runs_own_settings_name_no_code(tmp_path: Path, end: str, through: str) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    file = hostile_settings(tmp_path / "run", end=end)
    if through == "link":
        (tmp_path / "mine.yaml").symlink_to(file)
        file = tmp_path / "mine.yaml"
    elif through:
        file = tmp_path / "run" / through
    config = settings.parse(["--config", str(file)])
    with pytest.raises(ValueError, match="code is never taken from a run directory"):
        functions.check(config)
    assert not (tmp_path / "run/ran").exists()


def test_a_settings_file_of_ones_own_may_be_called_as_a_runs(tmp_path: Path) -> None:
    functions.check(settings.parse(["--config", str(hostile_settings(tmp_path, end=""))]))
    assert (tmp_path / "ran").exists()


def test_the_checkers_worker_takes_no_module_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's folder is a usual place to be in, and brings Python files."""
    for name in ("sympy", "math_verify", "json", "resource"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with AnswerChecker() as checker:
        assert checker.check("(x+1)^2", "x^2+2x+1").how == "symbolic"
    assert not (tmp_path / "ran").exists()


def test_python_m_takes_no_module_from_the_working_directory(tmp_path: Path) -> None:
    for name in ("yaml", "torch", "pydantic", "jsonargparse"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    done = subprocess.run(
        [sys.executable, "-m", "mstar_mega", "init", "--help"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr


def test_a_picture_is_given_to_no_other_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\nmkdir {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    (tmp_path / "0.png").write_bytes(file.getvalue())
    ref = ImageRef(str(tmp_path / "0.png"), image_digest(file.getvalue()))
    for look in (lambda: shown_picture(ref), lambda: file_size(ref.path)):
        with pytest.raises(OSError, match="cannot identify image file"):
            look()
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "rollouts", "checkpoints/warmup", "tensorboard", "data"])
@pytest.mark.parametrize("trains", [True, False])
def test_a_job_writes_through_no_link_out_of_its_run(tmp_path: Path, name: str, trains: bool) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "checkpoints").mkdir(parents=True)
    (outside / ".mine.tmp").mkdir(parents=True)
    (outside / "file").write_text("mine")
    (run / name).symlink_to(outside / "file" if "." in name else outside)
    config = Config()
    config.run.dir = str(run)
    with pytest.raises(ValueError, match="is a link that leads out of"), run_directory(config, True, trains):
        raise AssertionError("it was opened")
    assert (outside / "file").read_text() == "mine" and (outside / ".mine.tmp").is_dir()


def test_another_run_is_looked_at_without_tidying_up_in_it(tmp_path: Path) -> None:
    """A job may be writing a checkpoint there."""
    writing = tmp_path / "warmup/.iteration_0000_step_000001.tmp"
    writing.mkdir(parents=True)
    assert load_latest(tmp_path / "warmup", dict, tidy=False) is None and writing.exists()
    assert load_latest(tmp_path / "warmup", dict) is None and not writing.exists()


def test_a_checkpoint_or_a_prm_is_not_read_through_links(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(settings.dump(Config()))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/checkpoints/warmup").symlink_to(tmp_path / "elsewhere")
    config = Config()
    config.prm.checkpoint = str(tmp_path / "run")
    for look in (
        lambda: benchmark.settings_of(tmp_path / "run"),
        lambda: find_outside_prm(config),
        lambda: newest_policy(tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match="is a link that leads out of"):
            look()


def test_links_that_stay_inside_and_a_run_that_is_a_link_itself_are_fine(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/file").write_text("x")
    (tmp_path / "run/link").symlink_to("file")
    (tmp_path / "alias").symlink_to("run")
    refuse_links_out(tmp_path / "alias", "")
    config = Config()
    config.run.dir = str(tmp_path / "alias")
    with run_directory(config, True, True) as directory:
        assert directory == tmp_path / "alias"


def test_a_report_shows_nothing_from_behind_a_link(tmp_path: Path) -> None:
    from mstar_mega.report.html import write_report

    make_run(tmp_path / "other", iterations=1, queries=1)
    run = make_run(tmp_path / "run", iterations=1, queries=1)
    (run / "rollouts").rename(tmp_path / "hidden")
    (run / "rollouts").symlink_to(tmp_path / "other/rollouts")
    with pytest.raises(ValueError, match="is a link that leads out of"):
        write_report(run)


def test_an_atomic_write_goes_through_no_link_that_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".page.{os.getpid()}.tmp").symlink_to("mine")
    write_bytes_atomic(tmp_path / "page", b"theirs")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "page").read_bytes() == b"theirs"
    assert stat.S_ISREG((tmp_path / "page").lstat().st_mode)
