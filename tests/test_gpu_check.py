"""The check on a GPU keeps to its time, and keeps what it found, whatever its steps do."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu_check import Step, goals, run_step, steps, suite_counts


def nothing() -> dict[str, Any]:
    return {"value": 3}


def python(code: str, seconds: float = 60.0, read: Callable[[], dict[str, Any]] = nothing) -> Step:
    return Step("a step", [sys.executable, "-c", code], seconds, read)


def test_all_limits_together_are_less_than_eight_minutes() -> None:
    planned = steps([])
    assert sum(step.seconds for step in planned) + 5 * len(planned) < 8 * 60
    for step in planned:
        files = [word for word in step.command if word.endswith((".py", ".sh", ".yaml"))]
        assert files and all(Path(file).is_file() for file in files), step.name


def test_the_recipe_takes_arguments() -> None:
    assert steps(["--seed", "3"])[1].command[-2:] == ["--seed", "3"]


def test_a_step_passes_only_with_its_result() -> None:
    assert run_step(python("pass")) | {"seconds": 0} == {"ended": "passed", "seconds": 0, "found": {"value": 3}}
    failed = run_step(python("raise SystemExit(3)"))
    assert failed["ended"] == "failed" and failed["found"] == {"value": 3}
    missing = run_step(python("pass", read=lambda: json.loads(Path("/nowhere").read_text())))
    assert missing["ended"] == "failed" and "FileNotFoundError" in missing["missing"]


def test_a_step_that_takes_too_long_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    sign = tmp_path / "alive"
    write = f"(pathlib.Path({str(sign)!r}).write_text(str(i)), time.sleep(0.05))"
    child = f"import pathlib, time; [{write} for i in range(999)]"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    result = run_step(python(code, seconds=3.0))
    assert result["ended"] == "out of time" and result["seconds"] < 20 and result["found"] == {"value": 3}
    seen = sign.read_text()
    time.sleep(0.5)
    assert seen and sign.read_text() == seen, "its child still runs"


def test_what_pytest_found(tmp_path: Path) -> None:
    file = tmp_path / "tests.xml"
    file.write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0"><testcase classname="a" name="right"/>'
        '<testcase classname="a" name="wrong"><failure/></testcase></testsuite></testsuites>'
    )
    assert suite_counts(file) == {"tests": 2, "failures": 1, "errors": 0, "skipped": 0, "failed": ["a::wrong"]}
    file.write_text("<testsuites>")
    with pytest.raises(ValueError, match="tests.xml"):
        suite_counts(file)


def test_goals() -> None:
    loss = {
        "mstar_mega": {"ratio_to_floor": 1.25, "forward_backward_ms": 10.0},
        "Liger": {"forward_backward_ms": 12.0},
        "CCE": {"left_out": "not installed"},
    }
    slow = {"mstar_mega": {"ratio_to_floor": 1.5}}
    found = {"SFT loss from hidden states, X": loss, "log-probs from hidden states, X": slow, "sampling, X": slow}
    assert goals({"results": found}) == {
        "SFT loss from hidden states, X: 1.25 of the floor, at most 1.3": True,
        "SFT loss from hidden states, X: 10.00 ms, less than Liger's 12.00 ms": True,
        "log-probs from hidden states, X: 1.50 of the floor, at most 1.35": False,
    }


def test_one_failure_keeps_no_other_step_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["kernel tests", "bfloat16 run", "kernel benchmark"])
    commands = ["raise SystemExit(1)", "pass", "pass"]
    planned = [Step(next(names), [sys.executable, "-c", code], 60, nothing) for code in commands]
    monkeypatch.setattr(gpu_check, "steps", lambda arguments, patience: planned)
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse"])
    monkeypatch.setenv("MSTAR_TEST_GPU", "0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="not every step passed"):
        gpu_check.main()
    result = json.loads((tmp_path / "run" / "gpu_check.json").read_text())
    assert [step["ended"] for step in result["steps"].values()] == ["failed", "passed", "passed"]
    assert result["device"] and result["versions"]["torch"] and result["date"]


def test_it_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        gpu_check.main()
