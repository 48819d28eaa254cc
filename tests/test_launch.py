"""The launcher: the ranks' exit codes and last words, signals passed on, and what is refused before anything starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mstar_mega import launch
from mstar_mega.platform.exits import CONTINUED, USER_ERROR

RANK = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
from mstar_mega.platform.orphans import die_with_parent
die_with_parent()
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    Path(sys.argv[2], rank).write_text(str(os.getpid()))
    time.sleep(100)
if sys.argv[1] == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "exit":
    sys.exit(int(sys.argv[2]))
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    options = ["--standalone", "--nproc-per-node", "2", str(folder / "rank.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "mstar_mega.launch", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_ranks(folder: Path) -> list[psutil.Process]:
    deadline = time.monotonic() + 900
    while not all((folder / rank).exists() and (folder / rank).read_text() for rank in "01"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [psutil.Process(int((folder / rank).read_text())) for rank in "01"]


def test_the_exit_code_is_the_ranks_and_no_traceback_is_added(tmp_path: Path) -> None:
    for code in (0, USER_ERROR, CONTINUED):
        process = start(tmp_path, "exit", str(code))
        assert process.communicate(timeout=900) == ("", "") and process.returncode == code
    process = start(tmp_path, "kill")
    _, said = process.communicate(timeout=900)
    assert process.returncode == 1 and said.count("\n") == 1
    assert f"rank 1 on {socket.gethostname()} was killed by SIGKILL" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_goes_on_to_the_ranks_and_they_decide(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, "wait", str(tmp_path))
    wait_for_ranks(tmp_path)
    process.send_signal(number)
    assert process.communicate(timeout=900) == ("", "") and process.returncode == CONTINUED


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    process = start(tmp_path, "wait", str(tmp_path))
    ranks = wait_for_ranks(tmp_path)
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=300)
    assert not alive
    process.communicate()


def test_restarts_and_a_taken_port_are_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in launch._FORWARDED}
    try:
        assert launch.main(["--standalone", "--max-restarts", "3", "x.py"]) == USER_ERROR
        assert "--max-restarts 3: ranks that are started again" in capsys.readouterr().err
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            options = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "localhost", "--master-port", port, "x.py"]
            begun = time.monotonic()
            assert launch.main(options) == USER_ERROR and time.monotonic() - begun < 60
        said = capsys.readouterr().err
        assert f"port {port} on {socket.gethostname()}" in said and said.count("\n") == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_device_that_leads_out_is_not_the_loopback() -> None:
    assert not launch._leads_out("lo") and not launch._leads_out("none")
