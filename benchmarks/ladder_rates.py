"""The learning rate at which each method of the ladder does best, so that none stands there with another's.

    .venv/bin/python benchmarks/ladder_rates.py        # resumes; writes benchmarks/results/ladder_rates.json

Each method runs at every rate on seeds that no row of the ladder uses, and is measured on validation questions: test
handwriting has no part in the choice. `ladder_rows.OWN` holds what was chosen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ladder import work
from ladder_results import RESULTS, commits, mean_and_error
from ladder_rows import BY_NAME, Row
from ladder_runs import Ladder, read_answers

from mstar_mega.platform.files import write_text_atomic

SEEDS = [51]
COMMON = ("--data.validation_queries=1500", "--data.test_queries=100", "--evaluation.k=2")
"""Many questions and few samples of each: it is the greedy answer that counts."""
RATES = {
    "iterative_rft": (1e-5, 4e-5, 1e-4, 3e-4, 1e-3),
    "rest_em": (1e-5, 4e-5, 1e-4, 3e-4, 1e-3),
    "sft_warmup": (1e-5, 4e-5, 3e-4, 1e-3),
    "sft": (3e-4, 1.2e-3),
    "continuous_25": (1e-5, 4e-5, 1e-4),
    "random_2": (1e-5, 4e-5, 1e-4),
    "top_2": (1e-5, 4e-5, 1e-4),
}
PASSES = {"sft_warmup": (2, 8, 24), "sft": (8, 24)}
"""Passes over the labelled queries, of methods that generate nothing; the others' number is the budget."""


def candidates() -> dict[Row, tuple[str, float, int | None]]:
    """A row for each method, rate and number of passes (None: the ladder's)."""
    found = {}
    for method, rates in RATES.items():
        for rate in rates:
            for passes in PASSES.get(method, (None,)):
                name = f"{method}_{rate:g}" + ("" if passes is None else f"_{passes}")
                settings = [f"--evolve.optimizer.lr={rate}", *([] if passes is None else [f"--evolve.passes={passes}"])]
                row = BY_NAME[method]  # whose own rate and passes, earlier on the command line, do not count
                row = replace(row, name=name, seeds=len(SEEDS), settings=(*row.settings, *settings))
                found[row] = (method, rate, passes)
    return found


def collect(ladder: Ladder) -> dict[str, Any]:
    """Every finished run, in percent of the validation questions, and by method the best."""
    found: list[dict[str, Any]] = []
    starts = []
    for row, (method, rate, passes) in candidates().items():
        seeds = ladder.finished_seeds(row)
        if seeds:
            scores = [
                100 * statistics.mean(read_answers(ladder.run(row.name, seed), "validation").values()) for seed in seeds
            ]
            starts += [start for seed in seeds for start in ladder.starts(row, seed)]
            found.append(
                {"method": method, "rate": rate, "passes": passes, "seeds": seeds, "accuracy": mean_and_error(scores)}
            )
    best: dict[str, dict[str, Any]] = {}
    for item in found:
        if item["method"] not in best or item["accuracy"]["mean"] > best[item["method"]]["accuracy"]["mean"]:
            best[item["method"]] = item
    chosen = {method: {"rate": item["rate"], "passes": item["passes"]} for method, item in best.items()}
    return {"commits": commits(starts), "common": COMMON, "chosen": chosen, "runs": found}


def write(ladder: Ladder) -> dict[str, Any]:
    """Results of everything that is finished."""
    results = collect(ladder)
    write_text_atomic(RESULTS / "ladder_rates.json", json.dumps(results, indent=1) + "\n")
    return results


def main() -> int:
    """Command line. The exit code is 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="runs/ladder_rates")
    parser.add_argument("--config", default="examples/configs/ladder.yaml")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    ladder = Ladder(Path(options.dir).resolve(), options.config, Path(options.dir) / "outcomes.json", COMMON)
    ladder.directory.mkdir(parents=True, exist_ok=True)
    failures = work(ladder, list(candidates()), SEEDS, options.jobs, write)
    for item in write(ladder)["runs"]:
        passes = "" if item["passes"] is None else f", {item['passes']} passes"
        print(f"{item['method']} at {item['rate']:g}{passes}: {item['accuracy']['mean']:.1f}")
    if failures:
        print("\nFAILED (the same command tries again):", *failures, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
