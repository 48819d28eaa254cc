"""Whole jobs in tests: ``mstar evolve`` on forked ranks, watched and killed like those of torchrun.

The ranks are forked from a server that has imported everything, so a start costs what the job itself does, and a test
can kill and start a job many times.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel

from mstar_mega.report.metrics import comparable, read_metrics

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "examples/configs/smoke.yaml"
SMALLER = [
    *("--config", str(SMOKE), "--run.checkpoint_every_steps", "4", "--run.keep_checkpoints", "100"),
    *("--warmup.optimizer.schedule", "cosine"),
    *("--data.validation_queries", "4", "--data.test_queries", "6", "--annotate.queries", "8"),
    *("--evolve.epochs", "3", "--evolve.optimizer.batch_size", "1", "--report.samples_per_iteration", "1"),
]
"""The smoke config, smaller; all checkpoints are kept, so that a test can go back to any of them."""
BRIEF = [
    *(
        "--evolve.method",
        "sft",
        "--evolve.interval",
        "0.5",
        "--evolve.epochs",
        "1",
        "--evolve.optimizer.batch_size",
        "2",
    ),
    *("--warmup.epochs", "1", "--data.warmup_examples", "64", "--data.labelled_queries", "12"),
    *("--evaluation.k", "2", "--generation.max_new_tokens", "6", "--generation.queries_per_block", "2"),
]
"""Over :data:`SMALLER`: a job of seconds that learns nothing, trained on gold answers."""
_counter = itertools.count()
TIMEOUT_S = 900.0
"""Far beyond what a quiet machine needs (seconds): a busy one must not fail a test."""
_GRACE_S = 3.0


class Job:
    """A started job. ``output`` is what its ranks printed.

    ``before``, a ``"module:function"``, is called on every rank first.
    """

    def __init__(
        self, run_dir: Path, world_size: int = 1, *extra: str, command: str = "evolve", before: str = ""
    ) -> None:
        self.run_dir = run_dir
        self.log = _logs() / f"{next(_counter)}.log"
        argv = [command, *SMALLER, "--run.dir", str(run_dir), *extra]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(parallel.PRELOAD)
        port = _free_port()
        self.processes = []
        for rank in range(world_size):
            process = context.Process(target=_rank, args=(rank, world_size, port, str(self.log), argv, before))
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        """Whether any rank still runs."""
        return any(process.is_alive() for process in self.processes)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL one rank (the launcher then ends the others) or all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.kill()
        self.wait()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The job's exit code: the first rank's that failed, as torchrun does it, else 0."""
        deadline, failed = time.monotonic() + timeout_s, None
        while self.running:
            codes = [process.exitcode for process in self.processes]
            if failed is None and any(codes):
                failed = next(code for code in codes if code)
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()
                assert failed is not None, f"the job did not end in {timeout_s} s:\n{self.output}"
            time.sleep(0.01)
        for process in self.processes:
            process.join()
        return failed or next((process.exitcode for process in self.processes if process.exitcode), 0)

    def run_until(self, condition: Callable[[Path], bool]) -> bool:
        """Wait until the condition holds (True) or the job has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.running:
            if condition(self.run_dir):
                return True
            assert time.monotonic() < deadline, f"the job made no progress:\n{self.output}"
            time.sleep(0.002)
        return condition(self.run_dir)


def finish(run_dir: Path, world_size: int = 1, *extra: str) -> str:
    """Run a job to its end, which must be a good one; returns what it printed."""
    job = Job(run_dir, world_size, *extra)
    code = job.wait()
    assert code == 0, job.output
    return job.output


def outcome(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, bytes], dict[str, bytes]]:
    """What two equal runs have in common: the events without times, every rollout file, the final state's tensors."""
    events = comparable(read_metrics(run_dir / "metrics.jsonl"))
    rollouts = {}
    for path in sorted((run_dir / "rollouts").rglob("block_*")):
        groups = path.read_bytes().partition(b"\n")[2]  # the header's digest covers the images' paths
        rollouts[str(path.relative_to(run_dir))] = re.sub(rb'"path":"[^"]*"', b"", groups)
    return events, rollouts, tensors(run_dir / "checkpoints/evolve" / checkpoints(run_dir, "evolve")[-1])


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint as bytes."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    flat = {name: value for name, value in state.items() if torch.is_tensor(value)}
    assert flat
    return {name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in flat.items()}


def copy_run(source: Path, target: Path) -> Path:
    """A copy of a run directory, to go on in."""
    shutil.copytree(source, target)
    return target


def go_back(run_dir: Path, stage: str, name: str) -> None:
    """Delete the stage's checkpoints after ``name``, and those of later stages."""
    stages = ("warmup", "prm", "evolve")
    for later in stages[stages.index(stage) :]:
        for path in (run_dir / "checkpoints" / later).glob("iteration_*"):
            if later != stage or path.name > name:
                shutil.rmtree(path)


def checkpoints(run_dir: Path, stage: str) -> list[str]:
    """Names, oldest first."""
    return sorted(path.name for path in (run_dir / "checkpoints" / stage).glob("iteration_*"))


def flip_a_bit(path: Path) -> None:
    """Damage one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a log that is being written."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
    return []


@functools.cache
def _logs() -> Path:
    """Where this process keeps its jobs' output; the ranks, which import this module too, make none."""
    folder = Path(tempfile.mkdtemp(prefix="mstar_jobs_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _rank(rank: int, world_size: int, port: int, log: str, argv: list[str], before: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    from mstar_mega.cli import main

    if before:
        module, _, name = before.partition(":")
        getattr(importlib.import_module(module), name)()
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
