"""``summary.json``: what a run came to, computed from its directory alone (``config.yaml`` and ``metrics.jsonl``)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mstar_mega.platform.files import write_text_atomic
from mstar_mega.report.accounting import generated, trajectory, vote_accuracy
from mstar_mega.report.metrics import Event, latest_per_iteration, number, standard_json
from mstar_mega.report.run import Run, load_run

SUMMARY_FILE = "summary.json"


def build_summary(run_dir: str | Path) -> dict[str, Any]:
    """The summary of a run; what has not happened yet is None (empty for ``temperatures``).

    Accuracies are greedy, on the test split; Pass@K, Reward-Pass@K, Pass@K of as many random responses as that ranks
    (``pass_at_reward_k``) and the PRM's quality but after its training ("held_out") are on the validation split.
    "final" and "end" are the newest measurement of the evolving policy. Counts are of the evolving iterations, and so
    is the share of right reasoning, by selection rule, where the task can tell; ``generated`` has every phase's.
    ``trajectory`` has what accuracy had cost at each iteration: runs can be compared at equal training responses and at
    equal generated tokens. Raises ValueError naming the file (and line) where the directory is damaged.
    """
    run = load_run(run_dir)
    if run.problems:
        raise ValueError(f"{run.problems[0]}. No summary can be made of a damaged run directory.")
    return summarize(run)


def summarize(run: Run) -> dict[str, Any]:
    """The summary of an already loaded run, of its undamaged part."""
    return {
        "seed": run.setting("seed"),
        "method": run.setting("evolve", "method"),
        "parallel": _parallel(run),
        "accuracy": {
            "warmup": measured(run, "warmup", "test", "greedy_accuracy"),
            "final": measured(run, "evolve", "test", "greedy_accuracy"),
        },
        **{
            name: {
                "start": measured(run, "warmup", "validation", name),
                "end": measured(run, "evolve", "validation", name),
            }
            for name in ("pass_at_k", "reward_pass_at_k", "pass_at_reward_k")
        },
        "temperatures": [number(event, "temperature") for event in run.of("generation")],
        "responses_generated": _total(run.of("generation"), "responses"),
        "generated": generated(run),
        "trajectory": trajectory(run),
        "vote": vote_accuracy(run),
        "responses_selected": _total(run.of("selection"), "selected"),
        "queries_without_correct_response": _total(run.of("generation"), "queries_without_correct"),
        "right_reasoning": right_reasoning(run) or None,
        "prm": {
            "held_out": _quality(run.of("prm_quality", split="held_out")),
            "start": _quality(run.of("prm_quality", stage="warmup", split="validation")),
            "end": _quality(run.of("prm_quality", stage="evolve", split="validation")),
        },
        "log_prob_gap_max": _largest(run.of("log_prob_gap"), "largest"),
        "seconds": seconds_by_phase(run),
        "peak_memory_bytes": _whole(_largest(run.events, "peak_memory_bytes")),
    }


def write_summary(run_dir: str | Path) -> Path:
    """Write ``summary.json`` into the run directory, atomically; returns its path. Raises as build_summary."""
    path = Path(run_dir) / SUMMARY_FILE
    text = json.dumps(standard_json(build_summary(run_dir)), indent=2, allow_nan=False)
    write_text_atomic(path, text + "\n")
    return path


def share_error(share: float | None, queries: float | None) -> float | None:
    """Standard error of a share of so many queries; None where it is not known."""
    if share is None or not queries or not 0 <= share <= 1:
        return None
    return math.sqrt(share * (1 - share) / queries)


def at_most(points: Mapping[int, float], events: Sequence[Event]) -> dict[int, float]:
    """Standard errors of shares of queries by iteration, as if each query either had it or not: a mean over several
    samples of a query has less. 0 where nobody counted the queries."""
    queries = latest_per_iteration(events, "queries")
    return {i: share_error(share, queries.get(i)) or 0.0 for i, share in points.items()}


def measured(run: Run, stage: str, split: str, name: str) -> float | None:
    """The newest measurement of one kind."""
    values = [number(event, name) for event in run.of("evaluation", stage=stage, split=split)]
    return next((value for value in reversed(values) if value is not None), None)


_QUALITY = (
    "within_query_auc", "within_query_auc_stderr", "mixed_queries", "baselines", "baselines_stderr", "difference",
    "difference_stderr", "pooled_auc", "pooled_step_accuracy", "pooled_step_auc", "reasoning",
)  # fmt: skip


def _quality(events: list[Event]) -> dict[str, Any] | None:
    """What the newest event ``prm_quality`` measured; None: there is none."""
    return {name: events[-1][name] for name in _QUALITY if name in events[-1]} if events else None


def right_reasoning(run: Run) -> dict[str, Any]:
    """By selection rule, the share of right reasoning among the correct responses that it would select, over all
    iterations; the run's own rule also as ``selected``. Empty where the task cannot tell."""
    right: Counter[str] = Counter()
    known: Counter[str] = Counter()
    for event in run.of("selection"):
        by_rule = event.get("right_reasoning") or {}
        for rule, row in {**by_rule, "selected": by_rule.get(event.get("rule"), {})}.items():
            share, responses = number(row, "share"), number(row, "responses")
            if share is not None and responses:
                right[rule] += round(share * responses)
                known[rule] += round(responses)
    return {rule: {"share": right[rule] / known[rule], "responses": known[rule]} for rule in known}


def seconds_by_phase(run: Run) -> dict[str, float | None]:
    """Seconds of work that count towards the result, whichever start did it: a killed attempt's lost work does not.

    ``total`` is that of the stages that have ended, or of the phases where this is more (a stage still runs).
    """
    phases = {
        "warmup": _seconds(run.of("step", stage="warmup")),
        "annotate": _seconds(run.of("annotation")),
        "prm": _seconds(run.of("step", stage="prm")),
        "temperature": _seconds(run.of("temperature")),
        "generate": _seconds(run.of("generation")),
        "score": _seconds(run.of("generation"), "score_seconds"),
        "improve": _seconds(run.of("improve")),
        "evaluate": _seconds(run.of("evaluation")),
    }
    known = [value for value in phases.values() if value is not None]
    # The stage "total" closes the log of a whole run; the others add up to what it covers, over all its starts.
    stages = _seconds([event for event in run.of("stage") if event.get("stage") != "total"])
    total = max(sum(known), stages or 0.0) if known or stages is not None else None
    return {**phases, "total": None if total is None else round(total, 3)}


def _parallel(run: Run) -> dict[str, int | None]:
    event = _last(run.of("run"))
    declared = event.get("parallel")
    declared = declared if isinstance(declared, dict) else {}
    sizes = {
        name: _whole(number(declared, name) or number({name: run.setting("parallel", name)}, name))
        for name in ("tensor", "pipeline")
    }
    data, world = _whole(number(declared, "data")), _whole(number(event, "world_size"))
    if data is None and world and sizes["tensor"] and sizes["pipeline"]:
        data = world // (sizes["tensor"] * sizes["pipeline"])
    return {**sizes, "data": data}


def _last(events: list[Event]) -> Event:
    return events[-1] if events else {}


def _present(events: Iterable[Event], key: str) -> list[float]:
    return [value for event in events if (value := number(event, key)) is not None]


def _total(events: list[Event], key: str) -> int | None:
    values = _present(events, key)
    return int(sum(values)) if values else None


def _seconds(events: list[Event], key: str = "seconds") -> float | None:
    values = _present(events, key)
    return round(sum(values), 3) if values else None


def _largest(events: list[Event], key: str) -> float | None:
    # A NaN compares with nothing, so max would keep or lose it by its place: it counts as the largest.
    return max(_present(events, key), key=lambda value: (math.isnan(value), value), default=None)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
