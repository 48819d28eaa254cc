"""How well process scores order the responses of one query, beside what can be had for nothing.

Selection and Reward-Pass@K only ever compare responses of one query, so that is what is measured: the area under the
ROC curve (AUC) inside each query that has right and wrong responses, averaged over these queries. An AUC over the
responses of all queries together mostly tells easy queries from hard ones: a score that is the same for all responses
of a query reaches a high one and orders nothing. Both are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mstar_mega.data.types import CheckReasoning, Group, Response
from mstar_mega.evaluation.passk import auc, mean, standard_error
from mstar_mega.rewards.selection import is_correct, mean_log_prob

Judged = tuple[Response, bool]

ENOUGH_QUERIES = 10
"""Mixed queries that it takes to say that the PRM is not better than what is free."""


def _process_score(response: Response) -> float:
    return -math.inf if response.score is None else response.score


def _shortness(response: Response) -> float:
    return -float(len(response.tokens))


BASELINES: dict[str, Callable[[Response], float]] = {"policy_log_prob": mean_log_prob, "length": _shortness}
"""Scores that cost nothing: the policy's mean log-probability per token, as drawn, and shortness. Beside them stands
``constant_per_query``, the query's share of right responses: inside a query it is one half, whatever the data."""


@dataclass(frozen=True)
class Quality:
    """AUCs of the process score and the baselines on one set of judged responses. The event ``prm_quality`` has them.

    A figure is None where there is nothing to measure it on: no mixed query, or for an error a single one.
    """

    within_query_auc: float | None
    """Mean over mixed queries; 0.5: chance."""
    within_query_auc_stderr: float | None
    """Its standard error over mixed queries."""
    mixed_queries: int
    """Queries that have right and wrong responses."""
    responses: int
    """Of all queries, the mixed and the others."""
    right_share: float | None
    baselines: dict[str, float | None]
    """The same AUC of each baseline."""
    baselines_stderr: dict[str, float | None]
    difference: dict[str, float | None]
    """The process score's AUC minus the baseline's, mean over mixed queries."""
    difference_stderr: dict[str, float | None]
    """Its standard error: the differences are paired, query by query."""
    pooled_auc: dict[str, float | None]
    """AUC over all responses together, of ``process_score`` and each baseline: mostly the queries' difficulty."""


def measure_quality(groups: Iterable[Group]) -> Quality:
    """How well scores tell responses with the right answer from others. A response without a score counts as the worst.

    Raises ValueError for responses that are not judged, and for scores that are NaN.
    """
    return _measure([[(r, is_correct(r, group.query.id)) for r in group.responses] for group in groups])


def measure_reasoning_quality(groups: Iterable[Group], check: CheckReasoning) -> Quality:
    """How well scores tell right reasoning from wrong among responses with the right answer, where that is known."""
    return _measure([judge_reasoning(group, check) for group in groups])


def judge_reasoning(group: Group, check: CheckReasoning) -> list[Judged]:
    """The responses with the right answer whose reasoning is known to be right or wrong, each with which it is."""
    correct = [response for response in group.responses if is_correct(response, group.query.id)]
    verdicts = [(response, check(group.query.id, response.text)) for response in correct]
    return [(response, right) for response, right in verdicts if right is not None]


def _measure(queries: Sequence[Sequence[Judged]]) -> Quality:
    mixed = [judged for judged in queries if len({right for _, right in judged}) == 2]
    own = _within(mixed, _process_score)
    others = {name: _within(mixed, score) for name, score in BASELINES.items()}
    others["constant_per_query"] = [0.5] * len(mixed)
    gaps = {name: [a - b for a, b in zip(own, values, strict=True)] for name, values in others.items()}
    everyone = [one for judged in queries for one in judged]
    labels = [int(right) for _, right in everyone]
    shares = [mean([float(right) for _, right in judged]) or 0.0 for judged in queries for _ in judged]
    scores = {"process_score": _process_score, **BASELINES}
    pooled = {name: auc([score(response) for response, _ in everyone], labels) for name, score in scores.items()}
    return Quality(
        within_query_auc=mean(own),
        within_query_auc_stderr=standard_error(own),
        mixed_queries=len(mixed),
        responses=len(everyone),
        right_share=mean([float(label) for label in labels]),
        baselines=_each(mean, others),
        baselines_stderr=_each(standard_error, others),
        difference=_each(mean, gaps),
        difference_stderr=_each(standard_error, gaps),
        pooled_auc={**pooled, "constant_per_query": auc(shares, labels)},
    )


def _within(mixed: Sequence[Sequence[Judged]], score: Callable[[Response], float]) -> list[float]:
    values = [auc([score(response) for response, _ in of], [int(right) for _, right in of]) for of in mixed]
    return [value for value in values if value is not None]


def _each(
    figure: Callable[[Sequence[float]], float | None], values: Mapping[str, Sequence[float]]
) -> dict[str, float | None]:
    return {name: figure(of_name) for name, of_name in values.items()}


WORDS = {
    "policy_log_prob": "the policy's own log-probability",
    "length": "shortness",
    "constant_per_query": "chance",
}


def warn_not_better(quality: Quality) -> str | None:
    """What to tell the person where the process score is not above every free baseline by two standard errors.

    Of fewer than ``ENOUGH_QUERIES`` mixed queries nothing can be said either way.
    """
    if quality.within_query_auc is None or quality.mixed_queries < ENOUGH_QUERIES:
        return None
    weak = []
    for name, gap in quality.difference.items():
        error = quality.difference_stderr[name]
        if gap is not None and not gap > 2 * (error or 0.0):
            weak.append(f"{WORDS[name]} {quality.baselines[name]:.3f} (difference {gap:+.3f}{_plus_minus(error)})")
    if not weak:
        return None
    return (
        f"WARNING: THE PRM IS NOT BETTER THAN WHAT IS FREE: AUC within a query {quality.within_query_auc:.3f}, not "
        f"above {', '.join(weak)} by two standard errors. selection.rule likelihood or random_k may serve as well"
    )


def describe(quality: Quality) -> str:
    """The figures in one line."""
    if quality.within_query_auc is None:
        return "no query has both right and wrong responses: nothing to order"
    free = ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}" for name, value in quality.baselines.items() if value is not None
    )
    error = _plus_minus(quality.within_query_auc_stderr)
    return f"AUC {quality.within_query_auc:.3f}{error} within {quality.mixed_queries} mixed queries ({free})"


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"


def share_of(values: Sequence[bool]) -> dict[str, Any]:
    """{share, responses}: how many of these are true, of how many."""
    return {"share": mean([float(value) for value in values]), "responses": len(values)}
