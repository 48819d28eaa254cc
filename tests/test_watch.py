"""A rank that hangs is named, with its node and what it was doing; one that computes is left alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import Job, events_of

from mstar_mega.platform import stopping, watch

LIMIT = 1.0


@pytest.fixture
def ended() -> Iterator[list[str]]:
    stopping.reset()
    yield []
    stopping.reset()


def wait_until(condition: object, seconds: float, beats: bool = True) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if beats:
            watch.beat()
        if condition:
            return True
        time.sleep(0.02)
    return bool(condition)


def test_a_silent_rank_is_named_and_one_that_speaks_is_not(ended: list[str]) -> None:
    store = watch.LocalStore()
    store.set("mstar/life/1", json.dumps({"n": 1, "still": 0.0, "doing": "annotate, block 3", "host": "node2\x1b"}))
    watching = watch.Watch(store, 0, 2, LIMIT, ended.append, True)
    assert wait_until(ended, 30)
    watching.close()
    assert len(ended) == 1 and "no sign of life for 1 s from rank 1 on node2\\x1b (annotate, block 3)" in ended[0]


def test_waiting_for_each_other_for_ever_is_noticed(ended: list[str]) -> None:
    watch.beat("evolve training, step 3")
    watching = watch.Watch(watch.LocalStore(), 0, 1, LIMIT, ended.append, True)
    assert wait_until(ended, 30, beats=False)
    watching.close()
    assert "no progress for 1 s: rank 0 on " in ended[0] and "(evolve training, step 3)" in ended[0]


def test_a_long_computation_is_no_hang(ended: list[str]) -> None:
    limit = 5.0  # a busy machine gives a tenth of a second in it
    watching = watch.Watch(watch.LocalStore(), 0, 1, limit, ended.append, False)
    with watch.computing("making data"):
        begun = time.monotonic()
        while time.monotonic() - begun < 2 * limit:
            pass
    watching.close()
    assert not ended


def test_other_ranks_notice_that_rank_0_is_gone(ended: list[str]) -> None:
    class Gone(watch.LocalStore):
        def check(self, keys: list[str], /) -> bool:
            raise RuntimeError("Broken pipe\nframe #0")

    watching = watch.Watch(Gone(), 1, 2, LIMIT, ended.append, True)
    assert wait_until(ended, 30)
    watching.close()
    assert ended == ["the first node cannot be reached for 1 s (Broken pipe)"]


def test_a_request_to_stop_goes_from_one_rank_to_all(ended: list[str]) -> None:
    store = watch.LocalStore()
    watching = watch.Watch(store, 0, 1, 60.0, ended.append, True)
    stopping.ask("SIGTERM on node7")
    deadline = time.monotonic() + 30
    while not store.check(["mstar/stop"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    stopping.reset()  # from here on this is another rank
    while not stopping.asked() and time.monotonic() < deadline:
        time.sleep(0.02)
    watching.close()
    assert stopping.asked() == "SIGTERM on node7"


def test_a_stopped_rank_ends_the_job_within_the_limit(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", 2, "--run.hang_minutes", "0.25")
    assert job.run_until(lambda run_dir: any(event["event"] == "step" for event in events_of(run_dir))), job.output
    stopped = job.processes[1].pid or 0
    os.kill(stopped, signal.SIGSTOP)
    begun = time.monotonic()
    while job.processes[0].is_alive() and time.monotonic() - begun < 120:
        time.sleep(0.1)
    seconds = time.monotonic() - begun
    job.kill()
    assert f"no sign of life for 15 s from rank 1 on {socket.gethostname()} (" in job.output, job.output
    assert 12 <= seconds < 60  # its last sign of life was up to 1.5 s before it stopped
