"""What each part of the recipe gains: the paper's Tables 1 to 3 and its temperature rules on the built-in task.

    .venv/bin/python benchmarks/ladder.py                          # every row and seed; go on after any interruption
    .venv/bin/python benchmarks/ladder.py --rows top_2 random_2 --seeds 3 1
    .venv/bin/python benchmarks/ladder.py --report                 # only the tables and the figure, of what is there

A run is an ordinary run directory under ``--dir``. Runs of one seed start from one warm-up policy, one set of step
labels and one PRM (the run ``base``), sample the same number of training responses (but for those that say otherwise)
and are measured on the same test questions, which no training and no setting has seen. Work goes seed by seed, the most
telling rows first. After every run the results are written, and what came of it is kept in
``benchmarks/results/ladder_runs.json``: with that the ladder goes on where the runs themselves are gone. A run that
fails is named and left; the others go on.
"""

from __future__ import annotations

import argparse
import fcntl
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from ladder_results import RESULTS, tables, write_results
from ladder_rows import BY_NAME, DEFAULT_SEEDS, Row
from ladder_runs import Ladder

from mstar_mega import settings
from mstar_mega.settings.rules import validate


def work(
    ladder: Ladder, rows: list[Row], seeds: list[int], jobs: int, write: Callable[[Ladder], object] = lambda _: None
) -> list[str]:
    """Make the runs that are missing; returns a line for each that failed. ``write`` is called after every run.

    Seeds come in the given order, of which a row takes its first ones, and the next seed's base is begun before a
    seed's rows, so that nothing waits for it.
    """
    failures: dict[str, str] = {}
    bases: dict[int, Future[bool]] = {}

    def attempt(name: str, seed: int, make: Callable[[], None]) -> bool:
        try:
            make()
            return True
        except subprocess.CalledProcessError as error:
            failures[f"{name}, seed {seed}"] = f"exit code {error.returncode}, see {ladder.log(name, seed)}"
        except Exception as error:  # whatever it is, the other runs can do without this one
            failures[f"{name}, seed {seed}"] = f"{type(error).__name__}: {error}"
        return False

    def make_row(row: Row, seed: int) -> bool:
        if not bases[seed].result():
            failures[f"{row.name}, seed {seed}"] = "its base failed"
            return False
        return attempt(row.name, seed, lambda: ladder.make(row, seed))

    def make_base(seed: int) -> None:
        if not all(ladder.is_finished(row, seed) for row in rows if seed in seeds[: row.seeds]):
            ladder.make_base(seed)

    with ThreadPoolExecutor(jobs) as pool:

        def start_base(seed: int) -> None:
            bases[seed] = pool.submit(attempt, "base", seed, lambda: make_base(seed))

        try:
            if seeds:
                start_base(seeds[0])
            waiting: dict[Future[bool], str] = {}
            for place, seed in enumerate(seeds):
                for later in seeds[place + 1 : place + 2]:
                    start_base(later)
                for row in rows:
                    if seed in seeds[: row.seeds]:
                        waiting[pool.submit(make_row, row, seed)] = f"{row.name}, seed {seed}"
            for future in as_completed(waiting):
                name = waiting[future]
                print(f"{name}: {'finished' if future.result() else f'FAILED, {failures[name]}'}", flush=True)
                if future.result():
                    try:
                        write(ladder)
                    except Exception as error:  # the runs are what takes long: they go on
                        print(f"results cannot be written: {type(error).__name__}: {error}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [f"{name}: {why}" for name, why in failures.items()]


def main() -> int:
    """Command line. The exit code is 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=DEFAULT_SEEDS, help="a row uses its first ones")
    parser.add_argument("--dir", default="runs/ladder")
    parser.add_argument("--config", default="examples/configs/ladder.yaml")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one process with one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    ladder = Ladder(Path(options.dir).resolve(), options.config, RESULTS / "ladder_runs.json")
    ladder.directory.mkdir(parents=True, exist_ok=True)
    failures = []
    if not options.report:
        with (ladder.directory / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                parser.error(f"{ladder.directory} is in use by another ladder; --report shows what there is")
            rows = [BY_NAME[name] for name in options.rows if is_known(BY_NAME[name], ladder)]
            failures = work(ladder, rows, options.seeds, options.jobs, write_results)
    print(tables(write_results(ladder)))
    if failures:
        print("\nFAILED (the same command tries again):", *failures, sep="\n  ")
    return 1 if failures else 0


def is_known(row: Row, ladder: Ladder) -> bool:
    """Whether this version has the row's settings; says so where it does not."""
    try:
        validate(settings.parse(ladder.arguments(row.name, 0, row.settings)))
        return True
    except ValueError as error:
        print(f"{row.name}: left out, {error}", flush=True)
        return False


if __name__ == "__main__":
    sys.exit(main())
