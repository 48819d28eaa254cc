"""Does the recipe learn, and does it beat Iterative RFT? Runs both over several seeds and writes a table and a figure.

    .venv/bin/python benchmarks/learning.py --seeds 0 1 2 --dir runs/learning

For each seed one warm-up is trained; every method starts from a copy of it and samples the same number of training
responses. Iterative RFT is the paper's: all labelled queries per iteration, optimizer reset, every correct response, no
PRM, temperature 1. Test handwriting is never seen by any setting. Interrupted runs resume.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Method:
    """A row of the table: how it differs from the config file."""

    name: str
    arguments: tuple[str, ...] = ()


METHODS = {
    "mstar": Method("MSTaR (continuous, PRM top-2, adaptive temperature)"),
    "rft": Method(
        "Iterative RFT",
        (
            "--evolve.method=iterative_rft",
            # All correct responses are several times as many as the PRM's two: one epoch takes more optimizer steps
            # than MSTaR's epochs do.
            "--evolve.epochs=1",
            "--selection.rule=all_correct",
            "--temperature.mode=fixed",
            "--temperature.value=1.0",
        ),
    ),
    "random": Method("MSTaR with random-2 instead of PRM top-2", ("--selection.rule=random_k",)),
    "fixed": Method("MSTaR at temperature 1", ("--temperature.mode=fixed", "--temperature.value=1.0")),
}


def launch(command: str, directory: Path, config: str, seed: int, processes: int, extra: tuple[str, ...]) -> None:
    """Run one `mstar` command under torchrun; raises CalledProcessError when it fails."""
    arguments = ["--config", config, "--run.dir", str(directory), "--seed", str(seed), *extra]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run([*torchrun, "-m", "mstar_mega.cli", command, *arguments], cwd=ROOT, check=True)


def run_method(key: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run (or resume) one method from the seed's warm-up; returns its summary."""
    base = Path(options.dir).resolve()
    warm, directory = base / f"warmup_{seed}", base / f"{key}_{seed}"
    if not (directory / "summary.json").exists():
        if not (warm / "done").exists():
            launch("warmup", warm, options.config, seed, options.nproc, ())
            (warm / "done").touch()
        if not directory.exists():
            part = base / f".{directory.name}.part"  # an interrupted copy must not be taken for a run
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(warm, part)
            part.rename(directory)
        extra = ("--run.allow_changed_settings=true", f"--data.dir={warm / 'data'}", *METHODS[key].arguments)
        launch("evolve", directory, options.config, seed, options.nproc, extra)
    return json.loads((directory / "summary.json").read_text())


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def table(results: dict[str, list[dict[str, Any]]], seeds: list[int]) -> str:
    """Markdown: greedy accuracy on test handwriting in percent, mean and standard error over seeds."""
    lines = [
        "| method | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | standard error | responses |",
        "|---|" + "---|" * (len(seeds) + 3),
    ]
    warmups = [100 * summary["accuracy"]["warmup"] for summary in next(iter(results.values()))]
    rows = [("warm-up policy", warmups, 0)]
    for key, summaries in results.items():
        finals = [100 * summary["accuracy"]["final"] for summary in summaries]
        rows.append((METHODS[key].name, finals, summaries[0]["responses_generated"]))
    for name, values, responses in rows:
        mean, error = mean_and_error(values)
        cells = " | ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {cells} | **{mean:.1f}** | {error:.1f} | {responses} |")
    return "\n".join(lines)


def accuracy_curves(directory: Path) -> list[tuple[int, float]]:
    """(training responses generated, test accuracy in percent) after every iteration of a run."""
    generated, curve = 0, []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "generation":
            generated += event["responses"]
        if event["event"] == "evaluation" and event["split"] == "test":
            curve.append((generated, 100 * event["greedy_accuracy"]))
    return curve


def figure(keys: list[str], seeds: list[int], base: Path, path: Path) -> None:
    """Test accuracy against training responses: thin lines are seeds, thick ones their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(7, 4))
    for number, key in enumerate(keys):
        curves = [accuracy_curves(base / f"{key}_{seed}") for seed in seeds]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=f"C{number}", alpha=0.3, linewidth=1)
        mean = [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*curves, strict=False)]
        axes.plot(*zip(*mean, strict=True), color=f"C{number}", linewidth=2.5, marker="o", label=METHODS[key].name)
    axes.set(xlabel="training responses generated", ylabel="greedy accuracy, test handwriting (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["mstar", "rft"])
    parser.add_argument("--dir", default="runs/learning")
    parser.add_argument("--config", default="examples/configs/digits.yaml")
    parser.add_argument("--nproc", type=int, default=2)
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {key: [] for key in options.methods}
    for seed in options.seeds:
        for key in options.methods:
            results[key].append(run_method(key, seed, options))
    text = table(results, options.seeds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "learning.md").write_text(text + "\n")
    figure(options.methods, options.seeds, Path(options.dir).resolve(), RESULTS / "learning.png")
    print(text)


if __name__ == "__main__":
    main()
