"""The top of a run's page: its state, its headline numbers and how they have changed, and the story in sentences."""

from __future__ import annotations

import datetime
import math
from typing import Any

from mstar_mega.report.accounting import in_words, judged_responses
from mstar_mega.report.metrics import number
from mstar_mega.report.page import count, escape, percent, time_text
from mstar_mega.report.prm import quality_in_short
from mstar_mega.report.run import Run
from mstar_mega.report.summary import share_error


def status(run: Run) -> str:
    """Finished or where it is."""
    if run.finished:
        return '<span class="pill done">finished</span>'
    if not run.events:
        return '<span class="pill">no events yet</span>'
    return f'<span class="pill live">unfinished: {escape(_where(run))}</span>'


def _where(run: Run) -> str:
    """What the newest event belongs to."""
    iterations = [int(i) for event in run.events if (i := number(event, "iteration"))]
    if iterations:
        return f"iteration {max(iterations)}"
    ended = [str(event.get("stage")) for event in run.of("stage")]
    return f"after {ended[-1]}" if ended else "first stage"


def facts(run: Run, summary: dict[str, Any]) -> str:
    """What kind of run it is."""
    parallel = summary["parallel"]
    named = [
        ("policy", " ".join(str(p) for name in ("family", "size") if (p := run.setting("model", name)) is not None)),
        ("method", str(summary["method"] or "").replace("_", " ")),
        ("seed", "" if summary["seed"] is None else str(summary["seed"])),
        ("tensor × pipeline × data", " × ".join(str(size) for size in parallel.values() if size is not None)),
        ("last event", _last_time(run)),
    ]
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in named if v)


def _last_time(run: Run) -> str:
    seconds = number(run.events[-1], "time") if run.events else None
    if seconds is None or not math.isfinite(seconds):
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def tiles(run: Run, summary: dict[str, Any]) -> str:
    """The headline numbers."""
    ks = measured_ks(run)
    accuracy, prm = summary["accuracy"], summary["prm"]
    memory = summary["peak_memory_bytes"]
    generated, selected = summary["responses_generated"], summary["responses_selected"]
    share = f" ({percent(selected / generated)})" if generated and selected else ""
    of_all = "none generated yet" if generated is None else f"of {count(generated)} generated{share}"
    peak = f"peak memory {memory / 2**30:.2f} GiB" if memory else ""
    shown = [
        change_tile("Test accuracy, greedy", accuracy["warmup"], accuracy["final"], _queries(run, "test")),
        change_tile(
            f"Pass@{ks[0]}", summary["pass_at_k"]["start"], summary["pass_at_k"]["end"], _queries(run, "validation")
        ),
        change_tile(
            f"Reward-Pass@{ks[1]}",
            summary["reward_pass_at_k"]["start"],
            summary["reward_pass_at_k"]["end"],
            _queries(run, "validation"),
            f"; {ks[1]} at random {percent(_newest(summary['pass_at_reward_k']))}",
        ),
        _tile("PRM: within-query AUC", *quality_in_short(prm["end"] or prm["start"] or prm["held_out"])),
        _tile("Responses selected", count(selected), of_all),
        _tile("Time", time_text(summary["seconds"]["total"]), peak),
    ]
    return "".join(shown)


def _tile(label: str, value: str, note: str, kind: str = "") -> str:
    return (
        f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note {kind}">{escape(note)}</div></div>'
    )


def _newest(values: dict[str, float | None]) -> float | None:
    return values["start"] if values["end"] is None else values["end"]


def _queries(run: Run, split: str) -> float | None:
    """How many queries the newest measurement of a split had."""
    events = run.of("evaluation", split=split)
    return number(events[-1], "queries") if events else None


def change_tile(label: str, start: float | None, end: float | None, queries: float | None, beside: str = "") -> str:
    """A figure and how it has changed; the arrow is grey unless the change is known to be over two standard errors."""
    if start is None and end is None:
        return _tile(label, percent(None), "")
    if start is None or end is None:
        return _tile(
            label, percent(end if start is None else start), ("warm-up policy" if start else "newest") + beside
        )
    points = 100 * (end - start)
    arrow, kind = ("▲", "up") if points > 0 else ("▼", "down") if points < 0 else ("=", "")
    errors = [share_error(share, queries) for share in (start, end)]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors) or abs(end - start) <= 2 * math.hypot(*known):
        kind = ""
    return _tile(label, percent(end), f"{arrow} {abs(points):.1f} from {percent(start)}{beside}", kind)


def measured_ks(run: Run) -> tuple[object, object]:
    """K of Pass@K and of Reward-Pass@K, as measured or, before that, as set."""
    values = []
    for key, setting in (("k", "k"), ("reward_k", "reward_k")):
        seen = [event[key] for event in run.of("evaluation") if event.get(key) is not None]
        values.append(seen[-1] if seen else run.setting("evaluation", setting) or "K")
    return values[0], values[1]


def story(run: Run, summary: dict[str, Any]) -> list[str]:
    """What happened, in a few sentences; each only where its numbers exist."""
    start, end = summary["accuracy"]["warmup"], summary["accuracy"]["final"]
    generation, iterations = run.of("generation"), len(run.of("improve"))
    told = []
    if start is not None:
        told.append(f"The warm-up policy answers {percent(start)} of the test queries correctly.")
    if start is not None and end is not None:
        error = math.hypot(*(_test_error(run, stage) for stage in ("warmup", "evolve")))
        rounds = f"{iterations} iteration{'s' * (iterations != 1)}"
        told.append(
            f"After {rounds} of self-evolving training ({str(summary['method']).replace('_', ' ')}) it is "
            f"{percent(end)}: {100 * (end - start):+.1f} points, with a combined standard error of {100 * error:.1f}."
        )
    if generation:
        responses = summary["responses_generated"] or 0
        correct = sum(number(event, "correct") or 0.0 for event in generation)
        judged = sum(judged_responses(event) or 0.0 for event in generation)
        temperatures = [t for t in summary["temperatures"] if t is not None]
        low, high = min(temperatures, default=0.0), max(temperatures, default=0.0)
        told.append(
            f"{count(responses)} responses were sampled at temperature {low:g}{f' to {high:g}' if high > low else ''}; "
            f"{percent(correct / judged if judged else None)} of those with a known answer were correct, and "
            f"{count(summary['responses_selected'])} were selected for training."
        )
        without = summary["queries_without_correct_response"]
        told.append(f"{count(without)} queries had no correct response among theirs.")
    if generation or run.of("annotation"):
        text = in_words(summary["generated"])
        told.append(f"{text[0].upper()}{text[1:]}.")
    if (vote := summary["vote"]) is not None:
        told.append(
            f"Pseudo answers by vote were right for {percent(vote['accuracy'])} of {count(vote['answers_known'])} "
            "unlabelled queries; what agrees with them is not counted as correct here."
        )
    if summary["log_prob_gap_max"] is not None:
        limits = [limit for event in run.of("log_prob_gap") if (limit := number(event, "limit")) is not None]
        told.append(
            f"Generation and training agree on log-probabilities within {summary['log_prob_gap_max']:.2g}"
            + (f" (limit {limits[-1]:g})." if limits else ".")
        )
    empty = [event.get("iteration") for event in run.of("selection") if not number(event, "selected")]
    if empty:
        told.append(f"Nothing was selected in iteration {', '.join(map(str, empty))}.")
    return told or ["Nothing has been measured yet."]


def _test_error(run: Run, stage: str) -> float:
    events = run.of("evaluation", stage=stage, split="test")
    return (number(events[-1], "standard_error") or 0.0) if events else 0.0
