"""The ``mstar`` command: finds the subcommand (``commands/``), runs it, and turns a user's mistake into one line."""

from __future__ import annotations

import difflib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mstar_mega import __version__
from mstar_mega.commands import COMMANDS
from mstar_mega.launch import no_restarts
from mstar_mega.platform.exits import BROKEN_PIPE, CONTINUED, INTERRUPTED, USER_ERROR, Stopped
from mstar_mega.platform.files import DISK_FULL
from mstar_mega.platform.orphans import die_with_parent
from mstar_mega.platform.terminal import is_main, say, tame_logging, visible

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer")
"""What gloo says where the process at the other end has ended."""
_USER_OS_ERRORS = (
    *DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ENXIO,
)  # fmt: skip
"""A path that the user gave leads nowhere, may not be used, or cannot be read to its end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand on every rank of the job; returns the exit code.

    A user's mistake (ValueError, a full disk, missing permission) is one line on rank 0 and exit code 2; so is an
    OSError without a number, which is our own and says what to do.
    ``MSTAR_TRACEBACK=1`` shows where it came from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    tame_logging()
    try:
        _join_launcher()
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would complain again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _report("ended, because nothing reads its output any more")
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        is_users = isinstance(error, ValueError) or error.errno in (None, *_USER_OS_ERRORS)
        if os.environ.get("MSTAR_TRACEBACK") == "1" or not is_users:
            raise
        _report(_one_line(error))
        return USER_ERROR
    except Stopped as error:
        _report(str(error), problem=False)
        return CONTINUED
    except Exception as error:
        if os.environ.get("MSTAR_TRACEBACK") == "1" or not any(end in str(error) for end in _LOST_PEER):
            raise
        _report("the connection to another rank is lost: its node says why it has ended")
        return 1
    except KeyboardInterrupt:
        _report("interrupted. The same command goes on from what is finished")
        return INTERRUPTED


def _join_launcher() -> None:
    """What a rank has to do with the torchrun that started it. Raises ValueError where that was told to restart it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    die_with_parent()
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts:
        raise ValueError(no_restarts(restarts))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_help()
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in ("-V", "--version"):
        if is_main():
            say(f"mstar {__version__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(f"there is no command '{name}': {_nearest(name)}choose one of {', '.join(COMMANDS)}")
    if not is_main() and any(argument in ("-h", "--help") for argument in rest):
        return 0
    try:
        return COMMANDS[name].run(rest)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "megatron":
            raise
        raise ValueError(f"megatron-core is not installed. {PLATFORMS}") from None


PLATFORMS = "It has wheels for Linux (x86_64 and aarch64) with Python 3.10 to 3.13, and the program runs on these"
"""Where the program runs, in words; setup.py and the README say the same."""


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'? If not, " if near else ""


def _report(message: str, problem: bool = True) -> None:
    """Print on rank 0, and elsewhere what rank 0 does not know; leave it where torchrun looks for a failure's cause."""
    if is_main():
        say(f"mstar: {'error: ' if problem else ''}{message}", sys.stderr)
    # When one rank alone fails, its line in torchrun's closing table is the only place that says why.
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(error_file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    if problem and "torch" in sys.modules and "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        from mstar_mega.platform.distributed import is_news

        if is_news(message, is_main()):
            say(f"mstar: error: rank {os.environ.get('RANK')} on {socket.gethostname()}: {message}", sys.stderr)


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.errno and not error.filename else str(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL and "disk is full" not in str(text):
        text = f"the disk is full ({text}). Free some space and give the same command again"
    return visible(" ".join(str(text).split())) or type(error).__name__


def _print_help() -> None:
    if not is_main():
        return
    width = max(map(len, COMMANDS))
    say("usage: mstar COMMAND [arguments]\n\nSelf-evolving training of multimodal reasoners.\n\ncommands:")
    for name, command in COMMANDS.items():
        say(f"  {name:<{width}}  {command.what}")
    say("\n'mstar COMMAND --help' shows its settings. On several processes: torchrun ... -m mstar_mega COMMAND")


if __name__ == "__main__":
    sys.exit(main())
