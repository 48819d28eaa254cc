"""Who holds a run directory: the dead are displaced, the living never, with file locks and without."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mstar_mega.platform import holder
from mstar_mega.platform.holder import Holder, InUseError, take

STALE = 1.2


def hold_for_ever(path: str, locks: bool) -> None:
    """The life of a process that holds."""
    if not locks:
        holder._try_lock = lambda descriptor: None
    take(Path(path), STALE, 0.0, print)
    Path(path).with_name("held").touch()
    time.sleep(100)


def start_holder(path: Path, locks: bool) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("forkserver").Process(target=hold_for_ever, args=(str(path), locks))
    process.start()
    deadline = time.monotonic() + 60
    while not path.with_name("held").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(holder, "_try_lock", lambda descriptor: None)
    return bool(request.param)


def refuse(line: str) -> None:
    raise AssertionError(line)


def test_what_is_given_back_is_taken_at_once(tmp_path: Path, locks: bool) -> None:
    for _ in range(2):
        hold = take(tmp_path / "lock", STALE, 0.0, refuse)
        time.sleep(STALE / 3)  # beats
        hold.release()
    assert (tmp_path / "lock").read_bytes() == b""


def test_a_killed_holder_is_displaced_at_once_and_named(tmp_path: Path, locks: bool) -> None:
    process = start_holder(tmp_path / "lock", locks)
    with pytest.raises(InUseError, match=f"process {process.pid} on "):
        take(tmp_path / "lock", STALE, 0.0, refuse)
    process.kill()
    process.join()
    said: list[str] = []
    take(tmp_path / "lock", 1000 * STALE if locks else STALE, 0.0, said.append).release()
    assert f"process {process.pid} on " in said[0] and "has ended: taken over" in said[0]


def test_a_living_holder_is_waited_for_and_never_displaced(tmp_path: Path, locks: bool) -> None:
    process = start_holder(tmp_path / "lock", locks)
    try:
        os.kill(process.pid or 0, signal.SIGSTOP)  # silent, but it is here and can be seen
        said: list[str] = []
        begun = time.monotonic()
        with pytest.raises(InUseError):
            take(tmp_path / "lock", STALE, 2 * STALE, said.append)
        assert time.monotonic() - begun >= 2 * STALE and "waiting up to" in said[0]
    finally:
        process.kill()
        process.join()


def record(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(asdict(replace(Holder.this(), **fields))))  # type: ignore[arg-type]


def test_a_holder_on_another_machine_is_judged_by_its_beats(tmp_path: Path, locks: bool) -> None:
    path = tmp_path / "lock"
    record(path, host="elsewhere")
    said: list[str] = []
    begun = time.monotonic()
    take(path, STALE, 0.0, said.append).release()
    assert time.monotonic() - begun > STALE
    assert "on elsewhere: watching" in said[0] and "no sign of life for 1 s: taken over" in said[1]
    program = (
        "import sys, time, json; from pathlib import Path; p = Path(sys.argv[1]); d = json.loads(p.read_text())\n"
        "while True: d['beat'] += 1; f = p.open('r+'); f.write(json.dumps(d)); f.close(); time.sleep(0.1)"
    )
    record(path, host="elsewhere")
    other = subprocess.Popen([sys.executable, "-c", program, str(path)])
    try:
        with pytest.raises(InUseError, match="on elsewhere"):
            take(path, 20.0, 0.0, lambda line: None)
    finally:
        other.kill()
        other.wait()


def test_an_earlier_start_of_the_same_job_gives_way_and_another_boots_holder_is_dead(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    record(path, host="elsewhere", job="77", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    said: list[str] = []
    take(path, STALE, 0.0, said.append).release()
    assert "job 77, which is an earlier start of this job: taken over" in said[0]
    record(path, boot="another")
    take(path, 1000.0, 0.0, said.append).release()
    assert "has ended" in said[1]


def test_a_displaced_holder_ends_itself(tmp_path: Path) -> None:
    for locks in (True, False):
        process = start_holder(tmp_path / "lock", locks)
        record(tmp_path / "lock", host="elsewhere")
        process.join(30)
        assert process.exitcode == 1
        (tmp_path / "held").unlink()
        (tmp_path / "lock").unlink()


def test_a_record_that_nobody_can_read_keeps_nobody_out(tmp_path: Path) -> None:
    for content in ("process 3 on node1\n", "[1]", '{"id": 3}', "\x1b[2J"):
        (tmp_path / "lock").write_text(content)
        said: list[str] = []
        take(tmp_path / "lock", 1000.0, 0.0, said.append).release()
        assert len(said) == 1 and "\x1b" not in said[0]
