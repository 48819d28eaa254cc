"""Multi-process tests on shared workers: one set of processes per world size, started when first needed.

``run_parallel(2, "test_platform:adds_up", 3)`` calls ``adds_up(3)`` on two ranks of a gloo group and returns both
results.
The functions call ``mstar_mega.platform.distributed.initialize`` for the layout they want and never ``shutdown``.
Workers are forked from one server that has imported torch and megatron-core, so a set of them starts in a blink. Each
process of pytest-xdist has a server and workers of its own. They see no GPU and interpret Triton's kernels.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_S = 120.0
# How long the other ranks may take to end once one has failed: they may be waiting for it for ever.
_GRACE_S = 5.0
PRELOAD = [
    "torch",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "mstar_mega.recipe.job",
    "sklearn.datasets",  # what a job imports late: a second and more of every start
    "matplotlib.figure",
]

_pools: dict[int, Pool] = {}


class RankFailedError(AssertionError):
    """At least one rank raised, died or did not end in time; the message has each rank's traceback."""


def run_parallel(world_size: int, function: str, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Call ``"module:function"`` with picklable ``args`` on every rank; returns the results in rank order."""
    pool = _pools.get(world_size)
    if pool is None or not pool.alive:
        pool = _pools[world_size] = Pool(world_size)
    return pool.run(function, *args, timeout_s=timeout_s)


def close_pools() -> None:
    """End all workers."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


class Pool:
    """Worker processes that form one gloo process group."""

    def __init__(self, world_size: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mstar_workers_"))
        self.alive = True
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with _no_gpu():
            forkserver.ensure_running()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, world_size, str(self.folder), theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: str, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """See :func:`run_parallel`. A set of ranks that has come apart is ended; the next call starts another."""
        self.send(function, *args)
        outcomes = self._collect(timeout_s)
        if all(outcome is not None and outcome[0] for outcome in outcomes):
            return [outcome[1] for outcome in outcomes if outcome is not None]
        together = all(outcome is not None and not outcome[0] for outcome in outcomes)
        if not together or not all(process.is_alive() for process in self.processes):
            self.close()
        texts = [
            f"--- rank {rank}: {'returned normally' if outcome and outcome[0] else outcome[1] if outcome else 'killed'}"
            for rank, outcome in enumerate(outcomes)
        ]
        raise RankFailedError("\n".join([f"{function} failed on {len(texts)} ranks", *texts]))

    def send(self, function: str, *args: Any) -> None:
        """Start a call without waiting for it."""
        for connection in self.connections:
            connection.send((function, args))

    def _collect(self, timeout_s: float) -> list[tuple[bool, Any] | None]:
        outcomes: list[tuple[bool, Any] | None] = [None] * len(self.connections)
        deadline = time.monotonic() + timeout_s
        while None in outcomes:
            pending = [connection for rank, connection in enumerate(self.connections) if outcomes[rank] is None]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                self._dump_stacks(outcomes)
                break
            for connection in ready:
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                try:
                    outcomes[rank] = self.connections[rank].recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join()
                    outcomes[rank] = (False, f"died with exit code {self.processes[rank].exitcode}")
                if not outcomes[rank][0]:  # type: ignore[index]
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return outcomes

    def _dump_stacks(self, outcomes: list[tuple[bool, Any] | None]) -> None:
        """Let every rank that has not ended write where it stands, and take that as its outcome."""
        for rank, outcome in enumerate(outcomes):
            if outcome is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.processes[rank].pid or 0, signal.SIGUSR1)
        for rank, outcome in enumerate(outcomes):
            if outcome is None:
                outcomes[rank] = (False, f"did not end in time; it was at\n{self._stack(rank)}")
        self.close()

    def _stack(self, rank: int) -> str:
        """What a rank writes when asked where it is; a busy machine gets a while for it."""
        file = _stack_file(self.folder, rank)
        for _ in range(50):
            if file.exists() and file.stat().st_size:
                time.sleep(0.1)
                return file.read_text()
            time.sleep(0.1)
        return "an unknown place (it gave no sign)"

    def close(self) -> None:
        """Kill the workers. Harmless the second time."""
        if not self.alive:
            return
        self.alive = False
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()


@contextlib.contextmanager
def _no_gpu() -> Iterator[None]:
    """The environment of processes that start in here: gloo's tensors are on the CPU."""
    settings = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack_{rank}.txt"


def _work(rank: int, world_size: int, folder: str, connection: Connection) -> None:
    """The life of one worker: join the group, then serve calls until the pipe closes."""
    import torch
    import torch.distributed as dist

    stacks = open(_stack_file(Path(folder), rank), "w")  # kept open for the signal handler
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    gc.freeze()  # what was imported need not be searched after each call
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            module, _, name = function.partition(":")
            outcome = (True, getattr(importlib.import_module(module), name)(*args))
        except Exception:
            outcome = (False, traceback.format_exc())
        try:
            connection.send(outcome)
        except (TypeError, AttributeError, ValueError) as error:
            connection.send((False, f"the result cannot be pickled: {error}"))
        # Models hold their groups in cycles, and each group has threads that wake up all the time.
        del outcome
        gc.collect()
        sys.stdout.flush()
