"""torchrun with manners: ``python -m mstar_mega.launch [torchrun's options] FILE [arguments]``.

Processes, ranks and rendezvous are torchrun's own. What differs is what a person and a batch script see of the end:

* A signal goes on to the ranks, which save and leave by themselves (``platform/stopping.py``); torchrun would end them.
* The exit code is the ranks': 0, 2 for a user's mistake, 75 for "to be continued", 1 for a crash; one line says which
  rank failed, instead of two tracebacks.
* A taken port and a number of restarts are refused in words, and a host name that means the loopback device does not
  keep the nodes apart.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mstar_mega.platform.exits import CONTINUED, USER_ERROR
from mstar_mega.platform.terminal import say

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_LAST_WORDS_S = 5
"""Seconds that ranks have to end once one of them has failed; they are killed then."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks of this node and wait for them; returns the exit code."""
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        ranks = _children()
        if not ranks:
            os._exit(CONTINUED)  # nothing has begun
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM)

    for number in _FORWARDED:
        signal.signal(number, forward)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # not every host without a name in reverse
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = torchrun.parse_args(list(sys.argv[1:] if argv is None else argv))
    problem = _problem(options)
    if problem:
        say(f"mstar: error: {problem}", sys.stderr)
        return USER_ERROR
    options.signals_to_handle, options.shutdown_timeout = "SIGQUIT", _LAST_WORDS_S
    if _nodes(options) > 1:
        _leave_loopback()
    logging.disable(logging.ERROR)  # torchrun's own account of what is said below in one line
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        code, line = _verdict(error.failures, bool(asked))
        if code == USER_ERROR and options.node_rank == 0:
            line = _unsaid(error.failures)
        if line:
            say(f"mstar: {line}", sys.stderr)
        return code
    except Exception as error:
        if os.environ.get("MSTAR_TRACEBACK") == "1":
            raise
        text = " ".join(str(error).split())[:300]
        say(f"mstar: error: the nodes did not find each other: {type(error).__name__}: {text}", sys.stderr)
        return 1
    return 0


def _nodes(options: Any) -> int:
    return int(str(options.nnodes).rpartition(":")[2])


def _problem(options: Any) -> str:
    """What is wrong with the options that can be told before anything starts; empty: nothing."""
    if options.max_restarts:
        return no_restarts(options.max_restarts)
    here = options.node_rank == 0 and _nodes(options) > 1 and options.rdzv_backend == "static"
    if here and options.master_port and _taken(options.master_port):
        return (
            f"port {options.master_port} on {socket.gethostname()}, where the nodes were to meet, is taken by another "
            "program: choose another (RDZV_PORT for the SLURM script, --master-port for torchrun)"
        )
    return ""


def no_restarts(number: int) -> str:
    """Why ranks are not started again, in words."""
    return (
        f"--max-restarts {number}: ranks that are started again one by one cannot go on with each other. Leave it at 0 "
        "and give the whole command again: it goes on from what is finished"
    )


def _taken(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _children() -> list[int]:
    """Processes whose parent this one is."""
    mine = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                mine.append(int(path.parent.name))
    return mine


def _verdict(failures: dict[int, Any], asked: bool) -> tuple[int, str]:
    """(exit code, what to say) of this node's failed ranks; those that ended by themselves have said their own."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    for code in (CONTINUED, USER_ERROR):
        if code in codes.values():
            return code, ""
    if asked and set(codes.values()) <= {-signal.SIGTERM}:
        return CONTINUED, "stopped before the ranks had met; the same command begins anew"
    rank = min(failures, key=lambda rank: failures[rank].timestamp)
    code = codes[rank]
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    return 1, f"rank {rank} on {socket.gethostname()} {how}: the job ends, and the same command goes on"


def _unsaid(failures: dict[int, Any]) -> str:
    """What a rank has found wrong and rank 0, which speaks for all, was ended too soon to say; empty: it has said it.

    A rank leaves its message where torchrun looks for it, in ``RANK ON THIS NODE/error.json``.
    """
    first = min((each for each in failures.values() if each.exitcode == USER_ERROR), key=lambda each: each.timestamp)
    ended_itself = 0 in failures and failures[0].exitcode > 0
    if ended_itself or (Path(first.error_file).parents[1] / "0" / "error.json").exists():
        return ""
    return f"error: {first.message['message'] if isinstance(first.message, dict) else first.message}"


def _leave_loopback() -> None:
    """Where this host's name means the loopback device (Debian: 127.0.1.1), name gloo a device that leads out."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with contextlib.suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return
        device = next((name for _, name in socket.if_nameindex() if _leads_out(name)), None)
        if device is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = device


def _leads_out(device: str) -> bool:
    """Whether a network device has an IPv4 address that is not the loopback's."""
    import fcntl

    address_of_device = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        found = fcntl.ioctl(probe.fileno(), address_of_device, struct.pack("256s", device.encode()[:15]))
        return not socket.inet_ntoa(found[20:24]).startswith("127.")
    return False


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: after a failure the interpreter's own end can wait for ever for the rendezvous' threads.
    os._exit(ended)
