"""The recipe as a library: the example of the documentation, and what the command line makes of its work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mstar_mega as mstar
from mstar_mega.settings import parse

REPO = Path(__file__).parents[1]
EXAMPLE = REPO / "examples" / "own" / "evolve.py"
SMALLER = (
    "data={'warmup_examples': 64, 'labelled_queries': 8, 'validation_queries': 4, 'test_queries': 4}, "
    "warmup={'epochs': 1}, annotate={'queries': 4}"
)


def test_settings_as_keywords_are_those_of_the_command_line() -> None:
    groups = {"run": {"dir": "runs/a"}, "temperature": {"grid": [0.5, 1.0], "mode": "fixed"}, "data": {"path": None}}
    config = mstar.load_config("smoke", seed=3, **groups, evolve={"optimizer.lr": 1e-5, "epochs": 2})
    argv = "--config smoke --seed 3 --run.dir runs/a --temperature.mode fixed --evolve.optimizer.lr 1e-5"
    assert config == parse([*argv.split(), "--temperature.grid", "[0.5, 1.0]", "--evolve.epochs", "2"])
    for given, said in (
        ({"evolv": {"epochs": 1}}, "unknown setting '--evolv.epochs'"),
        ({"evolve": {"optimizer": {"lr": 1.0}}}, "evolve.optimizer is a group of settings inside a group"),
        ({"selection": {"k": 0}}, "selection.k is 0: it must be at least 1"),
    ):
        with pytest.raises(ValueError, match="^") as raised:
            mstar.load_config("smoke", **given)
        assert said in str(raised.value)


def test_importing_the_package_is_quick_and_its_names_are_there() -> None:
    program = "import sys, mstar_mega as m; assert 'torch' not in sys.modules; print(dir(m))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "open_session" in done.stdout, done.stderr
    assert callable(mstar.load_config)
    with pytest.raises(AttributeError, match="has no attribute 'evolve'"):
        mstar.evolve  # noqa: B018


def test_the_example_runs_and_the_command_line_takes_its_policy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = (
        f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r}); import evolve; evolve.main({str(run)!r}, {SMALLER})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1800, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 1: " in done.stdout and "the policy is in" in done.stdout
    assert (run / "hf" / "config.json").is_file() and list((run / "hf").glob("*.safetensors"))
    (saved,) = (run / "checkpoints" / "evolve").glob("iteration_*")
    assert saved.name == "iteration_0002_step_000000"
    look = (
        f"import mstar_mega as m; c = m.load_run({str(run)!r})\n"
        "with m.open_session(c, trains=False) as s:\n"
        "    g = s.generate(s.task.test[:2], 2, 0.0); s.reward(g); print(len(g), s.evaluate('test'))\n"
    )
    again = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=1800, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.split()[0] == "2", again.stdout + again.stderr
