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


def disturb(kind: str, job: Job, draw: random.Random) -> str:
    """Do it to a running job; what is wrong with how it ended, empty if nothing is."""
    if kind != "signal":
        job.kill(draw.choice([None, *range(len(job.processes))]))
        return ""
    number = draw.choice([signal.SIGTERM, signal.SIGUSR1])
    has_begun = bool(job.output)
    os.kill(draw.choice(job.processes).pid or 0, number)
    code = job.wait()
    # Before a rank listens it dies of the signal, as any program does; the launcher then says 75.
    return "" if code in (0, CONTINUED) or (code == -number and not has_begun) else f"{number.name}: exit code {code}"


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
    path = draw.choice([file for file in files if file.stat().st_size] or files)
    if kind == "flipped byte" and path.stat().st_size:
        flip_a_bit(path)
    else:
        path.unlink()
    return True


def one_round(folder: Path, ranks: int, draw: random.Random, counts: Counter[str]) -> list[str]:
    """A run that is disturbed until it has ended; what was wrong with how its starts ended."""
    run_dir, problems = folder / "run", []
    for start in range(_MOST_STARTS):
        kind = draw.choice(["kill", "kill", "signal", "full disk", "flipped byte", "lost file"])
        last = start == _MOST_STARTS - 1
        job = Job(run_dir, ranks, before="kills:limit_files" if kind == "full disk" and not last else "")
        end = time.monotonic() + draw.expovariate(1 / 8.0)
        if not last:
            job.run_until(lambda _, end=end: time.monotonic() > end)  # type: ignore[misc]
        if kind == "full disk" and not last:
            code = job.wait()
            counts[kind] += 1
            if code not in (0, 2) or (code == 2 and "disk is full" not in job.output):
                problems.append(_told(start, f"{kind}: exit code {code}", job))
            continue
        if last or not job.running:
            code = job.wait()
            return problems + ([_told(start, f"undisturbed: exit code {code}", job)] if code else [])
        if problem := disturb(kind, job, draw):
            problems.append(_told(start, problem, job))
        counts["signal" if kind == "signal" else "kill"] += 1
        if kind in ("flipped byte", "lost file") and harm(kind, run_dir, draw):
            counts[kind] += 1
    return problems


def _told(start: int, what: str, job: Job) -> str:
    return f"start {start}, {what}: {' | '.join(job.output.splitlines()[-3:])}"


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
        problems = one_round(of_round, ranks, random.Random(f"{options.seed} {number}"), counts)
        if outcome(of_round / "run") == wanted[ranks]:
            equal += 1
        else:
            problems.append("not equal")
        failed += [f"round {number} ({ranks} ranks), {problem} ({of_round})" for problem in problems]
        if not problems:
            shutil.rmtree(of_round)
        told = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
        say(f"{equal} of {number + 1} runs ended bit-equal; {told}; --seed {options.seed}")
    for line in failed:
        say(f"OUT OF ORDER: {line}")
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
