"""Asked to stop by a signal at any stage, a job saves, ends with 75, and goes on to the same end."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import Job, checkpoints, events_of, finish, outcome

from mstar_mega.platform.exits import CONTINUED


def logged(**fields: object) -> Callable[[Path], bool]:
    return lambda run_dir: any(fields.items() <= event.items() for event in events_of(run_dir))


def exists(pattern: str) -> Callable[[Path], bool]:
    return lambda run_dir: any(run_dir.glob(pattern))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "warmup": logged(event="step", stage="warmup", step=7),
    "annotate": exists("rollouts/annotate/block_*.jsonl"),
    "prm": logged(event="step", stage="prm", step=1),
    "generation": exists("rollouts/iteration_0001/block_*.jsonl"),
    "evolve": logged(event="step", stage="evolve", iteration=1),
    "measuring": exists("rollouts/evaluation_0001_*/block_*.jsonl"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    finish(directory, 2)
    return directory


def test_a_signal_in_every_stage_loses_no_step(tmp_path: Path, whole: Path) -> None:
    """To one rank of the two, which tells the other."""
    random_number = random.Random("signals")
    run_dir = tmp_path / "run"
    for name, moment in MOMENTS.items():
        job = Job(run_dir, 2)
        assert job.run_until(moment), f"{name} was never seen:\n{job.output}"
        time.sleep(random_number.choice([0.0, 0.05]))
        pid = random_number.choice(job.processes).pid
        assert pid is not None
        os.kill(pid, random_number.choice([signal.SIGTERM, signal.SIGUSR1]))
        assert job.wait() == CONTINUED, job.output
        assert "mstar: stopped by SIG" in job.output and "Traceback" not in job.output, job.output
        steps = [event for event in events_of(run_dir) if event["event"] == "step"]
        if name in ("warmup", "prm", "evolve"):
            last = steps[-1]
            saved = checkpoints(run_dir, last["stage"])[-1]
            done = sum(s["stage"] == last["stage"] and s["iteration"] == last["iteration"] for s in steps)
            iteration = int(saved.split("_")[1])
            assert saved.endswith(f"step_{done:06d}") or iteration == (last["iteration"] or 0) + 1, (saved, done)
        if name == "measuring":
            assert len(steps) == len(
                [e for e in events_of(whole) if e["event"] == "step" and (e["iteration"] or 0) < 2]
            )
            assert checkpoints(run_dir, "evolve"), "training done is saved before it is measured"
    finish(run_dir, 2)
    for made, wanted in zip(outcome(run_dir), outcome(whole), strict=True):
        assert made == wanted


def test_a_block_that_takes_too_long_is_left(tmp_path: Path, whole: Path) -> None:
    """Without patience the samples in flight are lost, and drawn again."""
    run_dir = tmp_path / "run"
    patient = ("--run.grace_seconds", "0")
    job = Job(run_dir, 2, *patient)
    assert job.run_until(exists("rollouts/annotate/origin.json")), job.output
    for process in job.processes:
        os.kill(process.pid or 0, signal.SIGTERM)
    assert job.wait() == CONTINUED, job.output
    finish(run_dir, 2, *patient)
    assert outcome(run_dir)[1:] == outcome(whole)[1:]
