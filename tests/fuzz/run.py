"""Throw mutated files at the commands: every one ends in order, whatever it is given.

In order is an exit code of 0, 1 or 2 (for a function: a ValueError or an OSError that is the user's to mend) within the
time and memory of a case, one line instead of a traceback, and no character that steers a terminal.

    make fuzz                                   ten minutes, seeds that nobody tried before
    make fuzz ARGS="--seconds 60 --targets config tokenizer --seed 1"
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 10.0
"""Of the processor, for one command on one file of a few kilobytes; on the clock it may be ``PATIENCE`` times that."""
PATIENCE = 12
MEMORY = 4 << 30
"""More than the process has when it begins."""


class Hung(BaseException):
    """A command took longer than it may."""


def cases(name: str, seed: int, numbers: Iterator[int], deadline: float, report: Any) -> None:
    """Run cases of a target in this process, which is no use for anything else afterwards."""
    from fuzz.targets import TARGETS, copy_of
    from mstar_mega.config import ParallelConfig
    from mstar_mega.platform import distributed

    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix=f"mstar_fuzz_{name}_") as folder:
        os.chdir(folder)
        good = Path(folder, "good")
        good.mkdir()
        distributed.initialize(ParallelConfig(), 0)
        target.make(good)
        _limit_memory()
        signal.signal(signal.SIGALRM, _ring)
        signal.signal(signal.SIGPROF, _ring)
        for number in numbers:
            if time.monotonic() > deadline:
                break
            report({"begun": number})
            draw = random.Random(f"{name} {seed} {number}")
            given = copy_of(good, Path(folder, "work"))
            for command in target.spoil(given, draw):
                distributed.initialize(ParallelConfig(), 0)
                problem = outcome(command)
                if problem:
                    report({"target": name, "seed": seed, "case": number, "problem": problem})
            if Path(folder, "ran").exists():
                report({"target": name, "seed": seed, "case": number, "problem": "something in the file was run"})
        os.chdir("/")


def outcome(command: Any) -> str:
    """What is wrong with the way in which a command ended; empty where it ended in order."""
    from mstar_mega import cli

    said = io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * SECONDS)
    shown = " ".join(command) if isinstance(command, list) else f"function {command.__qualname__}"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(command) if isinstance(command, list) else command() and 0
        if code not in (0, 1, 2, None):
            return f"{shown}: exit code {code}"
    except SystemExit as end:
        if end.code not in (0, 1, 2, None):
            return f"{shown}: exit code {end.code}"
    except Hung:
        return f"{shown}: still at it after {SECONDS} s: {traceback.format_exc(limit=-4)}"
    except Exception as error:
        user = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in cli._USER_OS_ERRORS)
        if isinstance(command, list) or not user:
            return f"{shown}: {traceback.format_exc(limit=-6)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    steering = [character for character in said.getvalue() if _steers(character)]
    return f"{shown}: it printed {steering[0]!r}: {said.getvalue()[:300]!r}" if steering else ""


def _steers(character: str) -> bool:
    code = ord(character)
    is_control = code < 32 and character not in "\n\t" or 127 <= code < 160
    return is_control or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"


def _ring(*_: object) -> None:
    raise Hung


def _limit_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def in_a_child(name: str, seed: int, first: int, count: int, seconds: float) -> tuple[list[dict[str, Any]], int]:
    """(problems, cases run) of a target, in a process of its own that may hang or die."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 1
        try:
            with os.fdopen(writing, "w", buffering=1) as pipe:
                numbers = iter(range(first, first + count))
                cases(
                    name, seed, numbers, time.monotonic() + seconds, lambda found: pipe.write(json.dumps(found) + "\n")
                )
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    problems: list[dict[str, Any]] = []
    run, last = 0, -1
    with os.fdopen(reading) as pipe:
        # The alarm inside ends what Python can end; a library that never returns is killed from here.
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        for line in pipe:
            signal.setitimer(signal.ITIMER_REAL, 2 * PATIENCE * SECONDS)
            found = json.loads(line)
            if "begun" in found:
                run, last = run + 1, found["begun"]
            else:
                problems.append(found)
        signal.setitimer(signal.ITIMER_REAL, 0)
    _, status = os.waitpid(child, 0)
    if status:
        text = f"the process ended with {os.waitstatus_to_exitcode(status)} in this case"
        problems.append({"target": name, "seed": seed, "case": last, "problem": text})
    return problems, run


def _import_once() -> None:
    """What every child needs, before they are forked."""
    import matplotlib.figure  # noqa: F401

    from mstar_mega.checkpoint_tools import convert, inspection, verify  # noqa: F401
    from mstar_mega.platform.cpu import apply_cpu_platform
    from mstar_mega.recipe import data_check, job  # noqa: F401

    apply_cpu_platform()


def main() -> int:
    """``make fuzz``: exit code 1 where anything ended out of order."""
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--few", action="store_true", help="the cases that the tests run, of seed 0")
    options = parser.parse_args()
    if options.few:
        options.seed = 0
    _import_once()
    total, problems = 0, []
    for name in options.targets:
        first, count = (0, 10**9) if options.case is None else (options.case, 1)
        count = TARGETS[name].cases if options.few else count
        found, run = in_a_child(name, options.seed, first, count, options.seconds / len(options.targets))
        total += run
        problems += found
        print(f"{name}: {run} cases, {len(found)} out of order", flush=True)
        for problem in found[:20]:
            print(f"  --targets {name} --seed {problem['seed']} --case {problem['case']}: {problem['problem']}")
    print(f"seed {options.seed}: {total} cases, {len(problems)} out of order")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
