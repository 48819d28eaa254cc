"""Mutated files of every kind, fixed ones: each command ends in order (``make fuzz`` runs new ones for longer)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.run import outcome
from fuzz.targets import TARGETS


def test_commands_end_in_order_whatever_the_files_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.run", "--few"],
        cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = sum(target.cases for target in TARGETS.values())
    assert f"seed 0: {run} cases, 0 out of order" in done.stdout


def wait_for_ever() -> None:
    while True:
        pass


def print_escapes() -> None:
    print("\x1b[2J")


def test_what_is_out_of_order_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from fuzz import run

    monkeypatch.setattr(run, "SECONDS", 0.2)
    before = signal.signal(signal.SIGPROF, run._ring)
    try:
        assert "still at it" in outcome(wait_for_ever)
    finally:
        signal.signal(signal.SIGPROF, before)
    assert "ZeroDivisionError" in outcome(lambda: 1 // 0)
    assert "it printed" in outcome(print_escapes)
    assert outcome(lambda: int("x")) == "", "a ValueError is an orderly end"
    assert outcome(["inspect", "/nowhere"]) == ""
