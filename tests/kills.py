"""Counts what a run survives: ``make kill-test`` (``python -m kills [--rounds N] [--ranks 1 2] [--seed S]``).

Each round starts a small job again and again until it has ended, and does something to each start but the last, at a
random moment: SIGKILL to a rank or all, a signal that asks it to stop, a full disk, a flipped byte in a file that the
next start reads, or the loss of one. At the end the log, every response and the final weights are compared with those
of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from jobs import Job, finish, flip_a_bit, outcome

from mstar_mega.platform.exits import CONTINUED

_MOST_STARTS = 40


def limit_files() -> None:
    """On a rank: a disk that is full for files of more than 100 KB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def disturb(kind: str, job: Job, draw: random.Random) -> bool:
    """Do it to a running job; whether it ended as it should."""
    if kind == "kill":
        job.kill(draw.choice([None, *range(len(job.processes))]))
        return True
    if kind == "signal":
        os.kill(draw.choice(job.processes).pid or 0, draw.choice([signal.SIGTERM, signal.SIGUSR1]))
        return job.wait() in (0, CONTINUED)
    return True


def harm(kind: str, run_dir: Path, draw: random.Random) -> bool:
    """Damage or delete a file that the next start reads, of the newest checkpoint or newer; whether there was one."""
    newest = max(
        run_dir.glob("checkpoints/*/iteration*/manifest.json"), key=lambda path: path.stat().st_mtime, default=None
    )
    since = newest.stat().st_mtime if newest else 0.0
    files = sorted(path for path in run_dir.glob("rollouts/*/block_*.jsonl") if path.stat().st_mtime > since)
    if newest is not None:
        files += [newest, *sorted(newest.parent.glob("*.distcp"))]
    if not files:
        return False
    path = draw.choice(files)
    if kind == "flipped byte":
        flip_a_bit(path)
    else:
        path.unlink()
    return True


def one_round(folder: Path, ranks: int, draw: random.Random, counts: Counter[str]) -> bool:
    """A run that is disturbed until it has ended; whether all its starts ended as they should."""
    run_dir, orderly = folder / "run", True
    for start in range(_MOST_STARTS):
        kind = draw.choice(["kill", "kill", "signal", "full disk", "flipped byte", "lost file"])
        last = start == _MOST_STARTS - 1
        job = Job(run_dir, ranks, before="kills:limit_files" if kind == "full disk" and not last else "")
        if last:
            return orderly and job.wait() == 0
        end = time.monotonic() + draw.expovariate(1 / 8.0)
        job.run_until(lambda _, end=end: time.monotonic() > end)  # type: ignore[misc]
        if not job.running:
            code = job.wait()
            if kind == "full disk" and code == 2:
                counts[kind] += 1
                orderly &= "disk is full" in job.output
                continue
            return orderly and code == 0
        if kind == "full disk":
            orderly &= job.wait() in (0, 2)
            counts[kind] += 1
            continue
        orderly &= disturb("signal" if kind == "signal" else "kill", job, draw)
        counts["signal" if kind == "signal" else "kill"] += 1
        if kind in ("flipped byte", "lost file") and harm(kind, run_dir, draw):
            counts[kind] += 1
    return orderly


def main(say: Callable[[str], None] = print) -> int:
    """Run the rounds and print the count; returns 1 where one did not end equal."""
    parser = argparse.ArgumentParser(description="Counts what a run survives.")
    parser.add_argument("--rounds", type=int, default=4, help="runs that are disturbed (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--seed", default=str(int(time.time())), help="names the random moments (default: the time)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mstar_kills_"))
    counts: Counter[str] = Counter()
    equal, failed = 0, []
    wanted = {}
    for ranks in options.ranks:
        finish(folder / f"whole{ranks}", ranks)
        wanted[ranks] = outcome(folder / f"whole{ranks}")
    for number in range(options.rounds):
        ranks = options.ranks[number % len(options.ranks)]
        of_round = folder / str(number)
        of_round.mkdir()
        orderly = one_round(of_round, ranks, random.Random(f"{options.seed} {number}"), counts)
        if orderly and outcome(of_round / "run") == wanted[ranks]:
            equal += 1
            shutil.rmtree(of_round)
        else:
            failed.append(f"round {number} ({ranks} ranks): {of_round}")
        told = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
        say(f"{equal} of {number + 1} runs ended bit-equal; {told}; --seed {options.seed}")
    for line in failed:
        say(f"NOT EQUAL: {line}")
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
