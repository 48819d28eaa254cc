"""What each part of the recipe gains: the paper's Tables 1 to 3 and its temperature rules on the built-in task.

    .venv/bin/python benchmarks/ladder.py                          # every row and seed; go on after any interruption
    .venv/bin/python benchmarks/ladder.py --rows top_2 random_2 --seeds 0 1
    .venv/bin/python benchmarks/ladder.py --report                 # only the table and the figure, of what is there

A run is an ordinary run directory under ``--dir``. Runs of one seed start from one warm-up policy, one set of step
labels and one PRM (the run ``base``), sample the same number of training responses and are measured on the same test
questions, which no training and no setting has seen. After every run the results are written again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstar_mega.data.records import read_groups
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.recipe.method import needs_prm
from mstar_mega.settings import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- ladder: begin -->", "<!-- ladder: end -->"


@dataclass(frozen=True)
class Row:
    """One method: how it differs from the base settings, and what the paper has for it."""

    name: str
    words: str
    reference: str = "warmup"
    """The row that it is compared with."""
    paper: tuple[float, float] | None = None
    """MathV360K and MathVista accuracy in percent (arXiv 2412.17451, MiniCPM-V-2.5)."""
    seeds: int = 3
    settings: tuple[str, ...] = ()


NO_PRM = ("--selection.rule=all_correct", "--temperature.mode=fixed")
"""The paper's Table 1: every correct response, temperature 1."""
TOP = ("--selection.rule=top_k", "--temperature.mode=fixed")
VOTING = ("--prompts.unlabelled=voting", *TOP)


def _continuous(interval: float, paper: tuple[float, float], seeds: int = 3) -> Row:
    name = f"continuous_{100 * interval:g}"
    words = f"continuous, {100 * interval:g}% intervals, all correct"
    return Row(name, words, "iterative_rft", paper, seeds, (*NO_PRM, f"--evolve.interval={interval}"))


ROWS = (
    Row("warmup", "warm-up policy", "warmup", (38.8, 52.6), 5),
    _continuous(0.25, (43.1, 57.2), 5),
    Row("top_2", "PRM top-2", "random_2", (45.3, 59.2), 5, TOP),
    Row("random_2", "random-2", "continuous_25", (41.0, 55.5), 5, (*NO_PRM, "--selection.rule=random_k")),
    Row("iterative_rft", "Iterative RFT", "warmup", (42.3, 55.7), 5, (*NO_PRM, "--evolve.method=iterative_rft")),
    Row("rest_em", "ReST-EM", "warmup", (42.3, 55.1), 5, (*NO_PRM, "--evolve.method=rest_em")),
    Row("reward_pass_at_2", "PRM top-2, temperature by Reward-Pass@2", "top_2", (45.9, 59.5), 5),
    Row("pass_at_2", "PRM top-2, temperature by Pass@K", "top_2", (42.8, 58.0), 5, ("--temperature.mode=pass_at_k",)),
    Row("likelihood_2", "2 of the policy's own highest likelihood", "random_2", None, 3,
        (*NO_PRM, "--selection.rule=likelihood")),
    Row("sft", "SFT on the answers, from the base model", "warmup", (44.3, 54.8), 5, ("--evolve.method=sft",)),
    _continuous(1.0, (42.2, 56.7)),
    _continuous(0.5, (43.1, 56.2)),
    _continuous(0.125, (42.3, 56.1)),
    _continuous(0.0625, (41.0, 56.8)),
    Row("threshold", "PRM above 0.5", "continuous_25", (43.8, 57.5), 3, (*TOP, "--selection.rule=threshold")),
    Row("top_1", "PRM top-1", "top_2", (43.0, 59.0), 3, (*TOP, "--selection.k=1")),
    Row("top_4", "PRM top-4", "top_2", (44.0, 58.4), 3, (*TOP, "--selection.k=4")),
    Row("top_2_above", "PRM top-2 of those above 0.5", "top_2", None, 3, (*TOP, "--selection.rule=top_k_above")),
    Row("temperature_0.7", "PRM top-2 at temperature 0.7", "top_2", None, 3, (*TOP, "--temperature.value=0.7")),
    Row("temperature_1.3", "PRM top-2 at temperature 1.3", "top_2", None, 3, (*TOP, "--temperature.value=1.3")),
    Row("oracle", "with unlabelled prompts, true answers", "continuous_25", (42.5, 58.2), 3,
        (*NO_PRM, "--prompts.unlabelled=oracle")),
    Row("oracle_top_2", "with unlabelled prompts, true answers, PRM top-2", "top_2", (42.9, 59.1), 3,
        (*TOP, "--prompts.unlabelled=oracle")),
    Row("voting_0", "with unlabelled prompts by voting, from the start", "top_2", (43.3, 58.2), 3, VOTING),
    Row("voting_25", "... after 25%", "top_2", (42.4, 57.6), 3, (*VOTING, "--prompts.mixin=0.25")),
    Row("voting_50", "... after 50%", "top_2", (42.9, 58.2), 3, (*VOTING, "--prompts.mixin=0.5")),
    Row("voting_75", "... after 75%", "top_2", (45.0, 58.8), 3, (*VOTING, "--prompts.mixin=0.75")),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
ALL_SEEDS = [0, 1, 2, 3, 4]


@dataclass(frozen=True)
class Ladder:
    """Where the runs lie and how they are made."""

    directory: Path
    config: str

    def run(self, name: str, seed: int) -> Path:
        return self.directory / f"{name}_{seed}"

    def launch(self, command: str, name: str, seed: int, settings: tuple[str, ...]) -> None:
        """One `mstar` command in one process with one thread; its output is in the log. Raises CalledProcessError."""
        run = self.run(name, seed)
        arguments = [f"--config={self.config}", f"--run.dir={run}", f"--seed={seed}", *settings]
        with (run.parent / f"{run.name}.log").open("a") as log:
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m",
                 "mstar_mega.cli", command, *arguments],
                cwd=ROOT, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def make_base(self, seed: int) -> None:
        """Warm-up policy, step labels and PRM of a seed."""
        done = self.run("base", seed) / "done"
        if not done.exists():
            self.launch("train-prm", "base", seed, ())
            done.touch()

    def make(self, row: Row, seed: int) -> None:
        """One row's run of a seed, from its base; one that was interrupted goes on."""
        directory, base = self.run(row.name, seed), self.run("base", seed)
        if row.name == "warmup" or (directory / "summary.json").exists():
            return
        if not directory.exists():
            part = directory.with_name(f".{directory.name}.part")  # an interrupted copy must not be taken for a run
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(base, part, ignore=shutil.ignore_patterns("data", "done", ".lock", "tensorboard"))
            part.rename(directory)
        data = f"--data.dir={base / 'data'}"
        self.launch("evolve", row.name, seed, ("--run.allow_changed_settings=true", data, *row.settings))
        shutil.rmtree(directory / "checkpoints")  # gigabytes over a whole ladder; what is reported is elsewhere

    def is_finished(self, row: Row, seed: int) -> bool:
        finished = "done" if row.name == "warmup" else "summary.json"
        return (self.run("base" if row.name == "warmup" else row.name, seed) / finished).exists()

    def answers(self, row: Row, seed: int) -> dict[str, bool]:
        """By test question, whether the last policy's greedy answer is right."""
        run = self.run("base" if row.name == "warmup" else row.name, seed)
        newest = sorted(run.glob("rollouts/evaluation_*_test_greedy"))[-1]
        groups = [group for block in sorted(newest.glob("block_*.jsonl")) for group in read_groups(block)]
        return {group.query.id: bool(group.responses[0].correct) for group in groups}

    def costs(self, row: Row, seed: int) -> dict[str, int]:
        """Training responses, generated tokens of all but measurements, and optimizer steps behind the warm-up's."""
        if row.name == "warmup":
            return {"responses": 0, "tokens": 0, "steps": 0}
        summary = json.loads((self.run(row.name, seed) / "summary.json").read_text())
        steps = [point["steps"] for point in summary["trajectory"]]
        # The base run has step labels for every row; only those that need a PRM pay for them.
        phases = ("evolve", "sweeps", "annotate") if needs_prm(load(self.run(row.name, seed))) else ("evolve", "sweeps")
        return {
            "responses": summary["responses_generated"] or 0,
            "tokens": sum(summary["generated"][phase]["tokens"] for phase in phases),
            "steps": steps[-1] - steps[0],
        }


def mean_and_error(values: list[float]) -> dict[str, float | None]:
    """Mean over seeds and its standard error (None for one seed)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "stderr": error}


def paired(gaps: list[list[float]]) -> tuple[float, float]:
    """Mean of paired differences, and its standard error over seeds and questions. ``gaps``: by seed and question.

    Seeds are drawn and, inside each, questions (every seed has its own). The spread of the seeds' means holds both
    parts; where it is estimated from few seeds and happens to be small, the questions' part alone is the least that the
    error can be: the larger of the two is taken.
    """
    means = [statistics.mean(of_seed) for of_seed in gaps]
    between = statistics.variance(means) / len(means) if len(means) > 1 else 0.0
    within = sum(statistics.pvariance(of_seed) / len(of_seed) for of_seed in gaps) / len(gaps) ** 2
    return statistics.mean(means), math.sqrt(max(between, within))


def result(ladder: Ladder, row: Row, seeds: list[int]) -> dict[str, Any]:
    """What a row came to over the seeds that are finished. Accuracies and differences are in percent."""
    reference = BY_NAME[row.reference]
    accuracy, gaps, used, costs = [], [], [], []
    for seed in seeds:
        own = ladder.answers(row, seed)
        accuracy.append(100 * statistics.mean(own.values()))
        costs.append(ladder.costs(row, seed))
        if row is not reference and ladder.is_finished(reference, seed):
            other = ladder.answers(reference, seed)
            gaps.append([100.0 * (own[id] - other[id]) for id in own])
            used.append(seed)
    difference, error = paired(gaps) if gaps else (None, None)
    return {
        "name": row.name,
        "words": row.words,
        "seeds": seeds,
        "accuracy": mean_and_error(accuracy),
        "paired": {"reference": row.reference, "difference": difference, "stderr": error, "seeds": used},
        **{name: round(statistics.mean(cost[name] for cost in costs)) for name in ("responses", "tokens", "steps")},
        "paper": None if row.paper is None else {"mathv360k": row.paper[0], "mathvista": row.paper[1]},
    }


def write_results(ladder: Ladder, seeds: list[int]) -> dict[str, Any]:
    """Results, table and figure of everything that is finished."""
    marked = ladder.directory / "commit.json"  # of the code that made the runs, not of the one that reports them
    if not marked.exists():
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        write_text_atomic(marked, json.dumps({"commit": commit, "date": datetime.date.today().isoformat()}))
    rows = []
    for row in ROWS:
        finished = [seed for seed in seeds if ladder.is_finished(row, seed)]
        if finished:
            rows.append(result(ladder, row, finished))
    results = {**json.loads(marked.read_text()), "config": ladder.config, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    write_text_atomic(RESULTS / "ladder.json", json.dumps(results, indent=1) + "\n")
    text = EVIDENCE.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    write_text_atomic(EVIDENCE, f"{head}\n{table(results)}\n{tail}")
    if rows:
        draw(rows, RESULTS / "ladder.png")
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown, behind a line with commit and date."""
    lines = [
        f"Commit `{results['commit'][:12]}`, {results['date']}.",
        "",
        "| row | seeds | accuracy here | against | difference | responses | tokens | steps | the paper says |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        accuracy, pair, paper = row["accuracy"], row["paired"], row["paper"]
        plus = lambda error: "" if error is None else f" ± {error:.1f}"  # noqa: E731
        mine = f"{accuracy['mean']:.1f}{plus(accuracy['stderr'])}"
        gap = "" if pair["difference"] is None else f"{pair['difference']:+.1f}{plus(pair['stderr'])}"
        against = pair["reference"] if gap else ""
        cost = f"{row['responses']:,} | {row['tokens']:,} | {row['steps']:,}"
        said = "" if paper is None else f"{paper['mathv360k']} / {paper['mathvista']}"
        lines.append(
            f"| {row['words']} (`{row['name']}`) | {len(row['seeds'])} | {mine} | {against} | {gap} | {cost} | {said} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy by row with standard errors, and the paper's beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (here, there) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.3 * len(rows)), sharey=True, layout="constrained")
    places = list(range(len(rows)))[::-1]
    means, errors = zip(*((row["accuracy"]["mean"], row["accuracy"]["stderr"] or 0.0) for row in rows), strict=True)
    here.errorbar(means, places, xerr=errors, fmt="o", capsize=3)
    here.set(title="here: accuracy on test handwriting (%)", yticks=places, yticklabels=[row["words"] for row in rows])
    for name, marker in (("mathv360k", "s"), ("mathvista", "^")):
        known = [(row["paper"][name], place) for row, place in zip(rows, places, strict=True) if row["paper"]]
        there.plot(
            [x for x, _ in known],
            [y for _, y in known],
            marker,
            label={"mathv360k": "MathV360K", "mathvista": "MathVista"}[name],
        )
    there.set(title="the paper: accuracy (%)")
    there.legend(fontsize=8)
    for axes in (here, there):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--seeds", type=int, nargs="+", default=ALL_SEEDS, help="a row uses its first ones")
    parser.add_argument("--dir", default="runs/ladder")
    parser.add_argument("--config", default="examples/configs/ladder.yaml")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one process with one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    ladder = Ladder(Path(options.dir).resolve(), options.config)
    ladder.directory.mkdir(parents=True, exist_ok=True)
    if not options.report:
        rows = [BY_NAME[name] for name in options.rows]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(ladder.make_base, options.seeds))
            wanted = [(row, seed) for seed in options.seeds for row in rows if seed in range(row.seeds)]
            for (row, seed), _ in zip(wanted, pool.map(lambda pair: ladder.make(*pair), wanted), strict=True):
                print(f"{row.name}, seed {seed}: finished", flush=True)
                write_results(ladder, ALL_SEEDS)
    print(table(write_results(ladder, ALL_SEEDS)))


if __name__ == "__main__":
    main()
