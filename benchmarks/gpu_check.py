"""Does it all work on this GPU, and how fast? Kernels against their definitions, every stage of the recipe in bfloat16,
a decode step at a published size, and the kernel benchmark, in less than eight minutes (``make gpu-check``).

    .venv/bin/python benchmarks/gpu_check.py [--rehearse] [--out DIRECTORY] [arguments of the recipe]

A step that fails or runs out of time does not keep the others from running. What was found, whole or not, is left in
``gpu_check.json`` with the device, versions and date; the exit status is 0 only if every step passed. ``--rehearse``
takes the same steps without a GPU, on the CPU's sizes, with interpreted kernels and five times the time, and keeps its
result out of ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from environment import environment, write_result

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "gpu_check"
KERNEL_TESTS = (
    "attention_kernels", "kernel_dispatch", "linear_logprob", "logprob", "noise", "norm_kernels", "process_scores",
    "sampling", "selection_kernel", "top_p",
)  # fmt: skip
"""Tests that run on compiled kernels where there is a GPU."""
WORKERS = 4
"""Test processes: compiling is most of their time."""
GOALS = {"log-probs from hidden states": 1.35, "SFT loss from hidden states": 1.3, "log-probs from logits": 1.3}
"""Contests of the kernel benchmark: the most that time may be of the device's own floor."""
RIVALS = ("Liger", "CCE")
"""Triton kernels that the SFT loss must be faster than."""


@dataclass(frozen=True)
class Step:
    """One command of the check."""

    name: str
    command: list[str]
    seconds: float
    """It is ended after this long."""
    read: Callable[[], dict[str, Any]]
    """What the command left behind; raises OSError or ValueError where it left nothing."""


def steps(recipe_arguments: list[str], patience: int = 1) -> list[Step]:
    """The check's commands. Their limits, times ``patience``, add up to less than eight minutes with their starts."""
    tests, speed, run = FOLDER / "tests.xml", FOLDER / "speed", FOLDER / "run"
    suite = [str(ROOT / "tests" / f"test_{name}.py") for name in KERNEL_TESTS]
    step_file = speed / f"step_speed_{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    speed_file = speed / f"kernels_{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    return [
        Step(
            "kernel tests",
            [sys.executable, "-m", "pytest", "-q", "-n", str(WORKERS), "--dist", "worksteal", *suite]
            + ["--junitxml", str(tests)],
            120 * patience,
            lambda: suite_counts(tests),
        ),
        Step(
            "bfloat16 run",
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
            + [str(ROOT / "examples/pretrain_mstar.sh"), "--config", str(ROOT / "examples/configs/smoke.yaml")]
            + ["--model.precision", "bfloat16", "--run.dir", str(run), *recipe_arguments],
            110 * patience,
            lambda: json.loads((run / "summary.json").read_text()),
        ),
        Step(
            "decode step",
            [sys.executable, str(ROOT / "benchmarks/step_speed.py"), "--seconds", "70", "--out", str(speed)]
            + ([] if torch.cuda.is_available() else ["--tiles", "1", "--slots", "16", "--steps", "3"]),
            110 * patience,
            lambda: json.loads(step_file.read_text()),
        ),
        Step(
            "kernel benchmark",
            [sys.executable, str(ROOT / "benchmarks/kernels.py"), "--quick", "--compile", "--seconds", "75"]
            + ["--out", str(speed)],
            110 * patience,
            lambda: json.loads(speed_file.read_text()),
        ),
    ]


def run_step(step: Step) -> dict[str, Any]:
    """Run a step's command, show what it prints, end it and all its processes when its time is over.

    Returns how it ended ("passed", "failed" or "out of time"), its seconds, and what it left behind.
    """
    print(f"-- {step.name} (at most {step.seconds:g} s)", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        ended = "failed" if process.wait(timeout=step.seconds) else "passed"
    except subprocess.TimeoutExpired:
        ended = "out of time"
    finally:
        _end_group(process)
    result: dict[str, Any] = {"ended": ended, "seconds": round(time.monotonic() - started, 1)}
    try:
        result["found"] = step.read()
    except (OSError, ValueError) as error:
        result["missing"] = f"{type(error).__name__}: {error}"
        result["ended"] = "failed" if ended == "passed" else ended
    return result


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of a command running: test workers and ranks are its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def suite_counts(path: Path) -> dict[str, Any]:
    """How many tests pytest ran, and which failed, from its --junitxml file."""
    try:
        suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: {error}") from error
    counts: dict[str, Any] = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    unhappy = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    return counts | {"failed": sorted(f"{case.get('classname')}::{case.get('name')}" for case in unhappy)}


def goals(benchmark: dict[str, Any]) -> dict[str, bool]:
    """What our own entries of the kernel benchmark should reach, in words with the figures, and whether they do."""
    reached = {}
    for contest, entries in benchmark.get("results", {}).items():
        own = entries.get("mstar_mega", {})
        for kind, most in GOALS.items():
            if contest.startswith(kind) and "ratio_to_floor" in own:
                ratio = own["ratio_to_floor"]
                reached[f"{contest}: {ratio:.2f} of the floor, at most {most}"] = ratio <= most
        for rival in RIVALS:
            theirs, ours = (e.get("forward_backward_ms") for e in (entries.get(rival, {}), own))
            if contest.startswith("SFT loss") and theirs and ours:
                reached[f"{contest}: {ours:.2f} ms, less than {rival}'s {theirs:.2f} ms"] = ours < theirs
    return reached


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="take the steps on a machine without a GPU")
    parser.add_argument("--out", default=None, help="directory of the result (default: benchmarks/results)")
    options, recipe_arguments = parser.parse_known_args()
    if not (torch.cuda.is_available() or options.rehearse):
        raise SystemExit(
            f"gpu_check: torch {torch.__version__} sees no CUDA device: run it on a machine with an NVIDIA GPU, or add "
            "--rehearse to take the same steps on the CPU"
        )
    os.environ.pop("TRITON_INTERPRET", None)  # the tests set it themselves where there is no GPU
    os.environ["MSTAR_TEST_GPU"] = "1"
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "speed").mkdir(parents=True)
    started = time.monotonic()
    planned = steps(recipe_arguments, patience=5 if options.rehearse else 1)
    done = {step.name: run_step(step) for step in planned}
    # Goals are for a GPU's kernels and sizes.
    reached = {} if options.rehearse else goals(done["kernel benchmark"].get("found", {}))
    result = {**environment(), "seconds": round(time.monotonic() - started, 1), "goals": reached, "steps": done}
    path = write_result("gpu_check", result, options.out or (str(FOLDER) if options.rehearse else None))
    for name, step in done.items():
        print(f"{name}: {step['ended']}, {step['seconds']:g} s {step.get('missing', '')}")
    for goal, met in reached.items():
        print(f"{goal}: {'met' if met else 'NOT met'}")
    print(f"written: {path}")
    if any(step["ended"] != "passed" for step in done.values()):
        raise SystemExit("gpu_check: not every step passed")


if __name__ == "__main__":
    main()
