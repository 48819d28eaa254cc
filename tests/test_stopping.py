"""Asked to stop by a signal at any stage, a job saves, ends with 75, and goes on to the same end."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import BRIEF, Job, checkpoints, events_of, finish, outcome

from mstar_mega.platform.exits import CONTINUED


def logged(**fields: object) -> Callable[[Path], bool]:
    return lambda run_dir: any(fields.items() <= event.items() for event in events_of(run_dir))


def exists(pattern: str) -> Callable[[Path], bool]:
    return lambda run_dir: any(run_dir.glob(pattern))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "warmup": logged(event="step", stage="warmup", step=1),
    "measuring the warm-up": exists("rollouts/evaluation_0000_*/block_*.jsonl"),
    "evolve": logged(event="step", stage="evolve", iteration=1),
    "measuring": exists("rollouts/evaluation_0001_*/block_*.jsonl"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    finish(directory, 2, *BRIEF)
    return directory


def test_a_signal_in_every_stage_loses_no_step(tmp_path: Path, whole: Path) -> None:
    """To one rank of the two, which tells the other."""
    random_number = random.Random("signals")
    run_dir = tmp_path / "run"
    for name, moment in MOMENTS.items():
        job = Job(run_dir, 2, *BRIEF)
        assert job.run_until(moment), f"{name} was never seen:\n{job.output}"
        pid = random_number.choice(job.processes).pid
        assert pid is not None
        os.kill(pid, random_number.choice([signal.SIGTERM, signal.SIGUSR1]))
        assert job.wait() == CONTINUED, job.output
        assert "mstar: stopped by SIG" in job.output and "Traceback" not in job.output, job.output
        steps = [event for event in events_of(run_dir) if event["event"] == "step"]
        assert _saved(run_dir, steps), (name, steps[-1], checkpoints(run_dir, steps[-1]["stage"]))
    finish(run_dir, 2, *BRIEF)
    for made, wanted in zip(outcome(run_dir), outcome(whole), strict=True):
        assert made == wanted


def _saved(run_dir: Path, steps: list[dict[str, Any]]) -> bool:
    """Whether the newest checkpoint of the last step's stage holds it."""
    last = steps[-1]
    done = sum((s["stage"], s["iteration"]) == (last["stage"], last["iteration"]) for s in steps)
    iteration = last["iteration"] or 0
    newest = checkpoints(run_dir, last["stage"])[-1]
    return newest in (f"iteration_{iteration:04d}_step_{done:06d}", f"iteration_{iteration + 1:04d}_step_000000")


def test_a_block_that_takes_too_long_is_left(tmp_path: Path, whole: Path) -> None:
    """Without patience the samples in flight are lost, and drawn again."""
    run_dir = tmp_path / "run"
    impatient = (*BRIEF, "--run.grace_seconds", "0")
    job = Job(run_dir, 1, *impatient)
    assert job.run_until(exists("rollouts/evaluation_0000_validation_greedy/origin.json")), job.output
    os.kill(job.processes[0].pid or 0, signal.SIGTERM)
    assert job.wait() == CONTINUED, job.output
    assert "Resuming" in finish(run_dir, 1, *impatient)
