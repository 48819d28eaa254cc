"""The report's section about the PRM: does it order the responses of a query better than what is free?"""

from __future__ import annotations

from typing import Any

from mstar_mega.report.metrics import Event, number
from mstar_mega.report.page import escape, percent, table
from mstar_mega.report.run import Run
from mstar_mega.report.summary import right_reasoning

BASELINES = {
    "policy_log_prob": "policy log-prob",
    "length": "shorter first",
    "constant_per_query": "constant per query",
}
RULES = {
    "all_correct": "all correct", "random_k": "random k", "likelihood": "k by likelihood", "top_k": "top k by PRM",
    "top_k_above": "top k above threshold", "threshold": "above threshold",
}  # fmt: skip


def prm_section(run: Run) -> str:
    """Tables of AUCs and of right reasoning; empty where nothing has been measured yet."""
    parts = []
    events = run.of("prm_quality")
    if events:
        parts.append(
            "<p>Selection and Reward-Pass@K compare responses of one query. Within-query AUC is the probability that a "
            "response with the right answer scores above one with a wrong answer to the same query (0.5: chance), mean "
            "over the queries that have both, ± one standard error. Difference: PRM minus the free score, paired by "
            "query, in bold where it is not above two standard errors. Pooled AUC mixes all queries: there a score "
            "that is the same for every response of a query, and so orders nothing, does well too.</p>"
        )
        parts.append(table("Quality of the PRM", _HEAD, [_cells(event, event) for event in events]))
        reasoned = [(event, event["reasoning"]) for event in events if isinstance(event.get("reasoning"), dict)]
        if reasoned:
            parts.append("<p>Among responses with the right answer: right reasoning against wrong.</p>")
            parts.append(
                table(
                    "Quality of the PRM among right answers",
                    _HEAD,
                    [_cells(event, quality) for event, quality in reasoned],
                )
            )
    shares = right_reasoning(run)
    if shares:
        parts.append(
            "<p>Right reasoning among the correct responses that each selection rule takes, all iterations.</p>"
        )
        rows = [
            [escape(words), percent(number(shares[rule], "share")), f"{shares[rule]['responses']:,}"]
            for rule, words in RULES.items()
            if rule in shares
        ]
        parts.append(table("Right reasoning by selection rule", ["selection", "right reasoning", "responses"], rows))
    return "".join(parts)


def quality_in_short(quality: dict[str, Any] | None) -> tuple[str, str]:
    """(within-query AUC, the best free score beside it)."""
    if quality is None:
        return "–", "not measured yet"
    own = number(quality, "within_query_auc")
    free = {name: value for name in BASELINES if (value := _of(quality, "baselines", name)) is not None}
    if own is None or not free:
        return "–", "no query has right and wrong responses"
    best = max(free, key=lambda name: free[name])
    return f"{own:.3f}", f"the best free score, {BASELINES[best]}: {free[best]:.3f}"


_HEAD = [
    "measured", "mixed queries", "PRM", *BASELINES.values(),
    *(f"PRM − {name}" for name in BASELINES.values()), "pooled: PRM", "pooled: constant per query",
]  # fmt: skip


def _cells(event: Event, quality: Event) -> list[str]:
    iteration = _policy(event)
    own = _plus_minus(number(quality, "within_query_auc"), number(quality, "within_query_auc_stderr"))
    free = [_plus_minus(_of(quality, "baselines", n), _of(quality, "baselines_stderr", n)) for n in BASELINES]
    pooled = [_plus_minus(_of(quality, "pooled_auc", name), None) for name in ("process_score", "constant_per_query")]
    gaps = [_gap(_of(quality, "difference", name), _of(quality, "difference_stderr", name)) for name in BASELINES]
    queries = number(quality, "mixed_queries")
    return [escape(iteration), "–" if queries is None else f"{queries:,.0f}", own, *free, *gaps, *pooled]


def _policy(event: Event) -> str:
    """Which PRM was measured on whose responses."""
    number = event.get("iteration")
    if event.get("split") == "held_out":
        return f"after its refresh, iteration {number}" if number else "after its training"
    refreshed = ", PRM refreshed" if event.get("stage") == "refresh" else ""
    return f"validation, iteration {number}{refreshed}" if number else "validation, warm-up"


def _gap(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:+.3f}" + ("" if error is None else f" ± {error:.3f}")
    return text if value > 2 * (error or 0.0) else f"<b>{text}</b>"


def _plus_minus(value: float | None, error: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error else "")


def _of(event: Event, key: str, name: str) -> float | None:
    values = event.get(key)
    return number(values, name) if isinstance(values, dict) else None
