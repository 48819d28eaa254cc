"""What the ladder's finished runs come to: ladder.json, the tables of docs/evidence.md and the figure."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from ladder_rows import BY_NAME, QUESTIONS, ROWS, Row
from ladder_runs import ROOT, Ladder, present_code

from mstar_mega.platform.files import write_text_atomic

RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- ladder: begin -->", "<!-- ladder: end -->"


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


def compare(ladder: Ladder, row: Row, reference: Row) -> dict[str, Any] | None:
    """Accuracy of a row minus that of another, in points, over the seeds of both; None: there is no such seed.

    Raises ValueError for runs that were measured on different questions.
    """
    seeds = sorted({*ladder.finished_seeds(row)} & {*ladder.finished_seeds(reference)})
    gaps = []
    for seed in seeds:
        own, other = ladder.outcome(row, seed), ladder.outcome(reference, seed)
        if (own.questions, own.count) != (other.questions, other.count):
            runs = " and ".join(ladder.run(each.name, seed).name for each in (row, reference))
            raise ValueError(f"{runs} were measured on different questions: they do not belong into one ladder")
        gaps.append([100.0 * (mine - theirs) for mine, theirs in zip(own.answers(), other.answers(), strict=True)])
    if row is reference or not gaps:
        return None
    difference, error = paired(gaps)
    return {"row": row.name, "reference": reference.name, "difference": difference, "stderr": error, "seeds": seeds}


def result(ladder: Ladder, row: Row, seeds: list[int]) -> dict[str, Any]:
    """What a row came to over the seeds that are finished. Accuracies and differences are in percent."""
    outcomes = [ladder.outcome(row, seed) for seed in seeds]
    costs = [outcome.costs for outcome in outcomes]
    pair = compare(ladder, row, BY_NAME[row.reference]) or {}
    return {
        "name": row.name,
        "words": row.words,
        "seeds": seeds,
        "accuracy": mean_and_error([100 * statistics.mean(outcome.answers()) for outcome in outcomes]),
        "paired": {"reference": row.reference, "difference": pair.get("difference"), "stderr": pair.get("stderr")},
        **{name: round(statistics.mean(cost[name] for cost in costs)) for name in costs[0]},
        "paper": None if row.paper is None else {"mathv360k": row.paper[0], "mathvista": row.paper[1]},
        "commits": commits([start for outcome in outcomes for start in outcome.made_by]),
    }


def commits(starts: list[dict[str, Any]]) -> list[str]:
    """The commits of these starts; with a plus sign where the code was changed since."""
    return sorted({start["commit"] + ("+" if start["changed"] else "") for start in starts})


def collect(ladder: Ladder) -> dict[str, Any]:
    """Everything that is finished, by whichever start. ``commit`` and ``date``: of the newest run."""
    finished = {row: seeds for row in ROWS if (seeds := ladder.finished_seeds(row))}
    starts = [start for row, seeds in finished.items() for seed in seeds for start in ladder.outcome(row, seed).made_by]
    newest = max(starts, key=lambda start: str(start["date"]), default={**present_code(), "date": None})
    pairs = {(row.name, row.reference): None for row in ROWS} | {(q.row, q.reference): None for q in QUESTIONS}
    compared = [compare(ladder, BY_NAME[row], BY_NAME[reference]) for row, reference in pairs]
    return {
        "commit": newest["commit"],
        "date": newest["date"],
        "commits": commits(starts),
        "config": ladder.config,
        "rows": [result(ladder, row, seeds) for row, seeds in finished.items()],
        "comparisons": [pair for pair in compared if pair is not None],
    }


def write_results(ladder: Ladder) -> dict[str, Any]:
    """Results, tables and figure of everything that is finished."""
    results = collect(ladder)
    RESULTS.mkdir(exist_ok=True)
    write_text_atomic(RESULTS / "ladder.json", json.dumps(results, indent=1) + "\n")
    text = EVIDENCE.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    write_text_atomic(EVIDENCE, f"{head}\n{tables(results)}\n{tail}")
    if results["rows"]:
        draw(results["rows"], RESULTS / "ladder.png")
    return results


def tables(results: dict[str, Any]) -> str:
    """Both tables in Markdown, behind a line with commit and date."""
    made = ", ".join(f"`{commit[:12]}{'+' if commit.endswith('+') else ''}`" for commit in results["commits"])
    parts = [f"Commit {made or 'unknown'}, {results['date']}.", table(results), "### Questions asked", answers(results)]
    return "\n\n".join(parts)


def _plus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.1f}"


def table(results: dict[str, Any]) -> str:
    """A line for each row."""
    lines = [
        "| row | seeds | accuracy here | against | difference | responses | tokens | tokens to measure | steps "
        "| the paper says |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        accuracy, pair, paper = row["accuracy"], row["paired"], row["paper"]
        mine = f"{accuracy['mean']:.1f}{_plus(accuracy['stderr'])}"
        gap = "" if pair["difference"] is None else f"{pair['difference']:+.1f}{_plus(pair['stderr'])}"
        against = pair["reference"] if gap else ""
        cost = " | ".join(f"{row[name]:,}" for name in ("responses", "tokens", "evaluation_tokens", "steps"))
        said = "" if paper is None else f"{paper['mathv360k']} / {paper['mathvista']}"
        lines.append(
            f"| {row['words']} (`{row['name']}`) | {len(row['seeds'])} | {mine} | {against} | {gap} | {cost} | {said} |"
        )
    return "\n".join(lines)


def _side(difference: float, error: float) -> int:
    """1 or -1 for a difference beyond two standard errors, 0 for one that may be chance."""
    return 0 if abs(difference) <= 2 * error else 1 if difference > 0 else -1


def answers(results: dict[str, Any]) -> str:
    """A line for each question that can be answered yet."""
    lines = [
        "| question | compared | seeds | difference | beyond two standard errors | wanted | as wanted |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {(pair["row"], pair["reference"]): pair for pair in results["comparisons"]}
    for question in QUESTIONS:
        pair = found.get((question.row, question.reference))
        if pair is not None:
            gap = f"{pair['difference']:+.1f}{_plus(pair['stderr'])}"
            side = _side(pair["difference"], pair["stderr"])
            beyond = {1: "yes, above", 0: "no", -1: "yes, below"}[side]
            holds = {"above": side > 0, "not below": side >= 0}.get(question.wanted)
            verdict = "" if holds is None else "yes" if holds else "no"
            compared = f"`{question.row}` − `{question.reference}`"
            seeds = len(pair["seeds"])
            lines.append(
                f"| {question.words} | {compared} | {seeds} | {gap} | {beyond} | {question.wanted} | {verdict} |"
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
