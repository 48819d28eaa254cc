"""A run's page in tables: what each iteration measured and did, and what was skipped."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mstar_mega.report.accounting import judged_responses
from mstar_mega.report.headline import measured_ks
from mstar_mega.report.metrics import METRICS_FILE, Event, number
from mstar_mega.report.page import count, empty, escape, number_text, percent, table, time_text
from mstar_mega.report.run import Run

MOST_REASONS = 20
"""Reasons for skipping that are counted one by one."""
MOST_SKIPPED = 200
"""Skipped items listed one by one."""


def iteration_table(run: Run) -> str:
    """A row for each iteration, without the columns that nothing has been measured for."""
    iterations = [number(event, "iteration") for event in run.events if event["event"] != "step"]
    rows = sorted({int(i) for i in iterations if i is not None})
    if not rows:
        return empty("No iteration has been measured yet.")
    ks = measured_ks(run)
    cells = [_iteration_cells(run, iteration, ks) for iteration in rows]
    names = [name for name in cells[0] if any(row[name] != "–" for row in cells)]
    key = (
        "Correct, trunc(ated), no steps: shares of the responses. None correct: queries without a correct response. "
        "Selected: responses."
    )
    note = f'<p class="key">{key}</p>' if "resp." in names else ""
    return table("Iterations", names, [[escape(row[name]) for name in names] for row in cells]) + note


def _iteration_cells(run: Run, iteration: int, ks: tuple[object, object]) -> dict[str, str]:
    def last(name: str, **fields: Any) -> Event:
        events = run.of(name, iteration=iteration, **fields)
        return events[-1] if events else {}

    validation, test = last("evaluation", split="validation"), last("evaluation", split="test")
    generation, selection, improve = last("generation"), last("selection"), last("improve")
    responses = number(generation, "responses")

    def share(key: str) -> str:
        value = number(generation, key)
        of = judged_responses(generation) if key == "correct" else responses
        return percent(value / of if value is not None and of else None)

    return {
        "iteration": str(iteration) if iteration else "warm-up",
        "test accur.": percent(number(test, "greedy_accuracy")),
        "valid. accur.": percent(number(validation, "greedy_accuracy")),
        f"Pass@{ks[0]}": percent(number(validation, "pass_at_k")),
        f"Reward-Pass@{ks[1]}": percent(number(validation, "reward_pass_at_k")),
        f"{ks[1]} at random": percent(number(validation, "pass_at_reward_k")),
        "temp.": number_text(number(generation, "temperature")),
        "queries": count(number(generation, "queries")),
        "resp.": count(responses),
        "correct": share("correct"),
        "trunc.": share("truncated"),
        "no steps": share("without_steps"),
        "none correct": count(number(generation, "queries_without_correct")),
        "selected": count(number(selection, "selected")),
        "steps": count(number(improve, "steps")),
        "loss": number_text(number(improve, "loss")),
        "log-p. gap": number_text(number(last("log_prob_gap"), "largest"), 2),
        "generate": time_text(number(generation, "seconds")),
        "score": time_text(number(generation, "score_seconds")),
        "improve": time_text(number(improve, "seconds")),
    }


def skipped(run: Run) -> str:
    """How much was skipped for which reason, and the first items by name."""
    events = run.of("skipped")
    if not events:
        return empty("Nothing was skipped.")
    reasons = Counter(str(event.get("reason")) for event in events).most_common()
    totals = ", ".join(f"{count(n)} × {escape(reason)}" for reason, n in reasons[:MOST_REASONS])
    if len(reasons) > MOST_REASONS:
        totals += f", and {count(len(reasons) - MOST_REASONS)} more reasons"
    names = ("what", "where", "reason")
    rows = [[escape(event.get(key, "–")) for key in names] for event in events[:MOST_SKIPPED]]
    more = len(events) - MOST_SKIPPED
    rest = empty(f"{count(more)} more are listed in {METRICS_FILE}.") if more > 0 else ""
    return f"<p>{totals}</p>{table('Skipped', names, rows, 'text')}{rest}"
