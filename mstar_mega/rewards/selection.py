"""Selection (operator H of the paper, section 4): which of a query's correct responses are trained on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import get_args

import torch

from mstar_mega.config import SelectionConfig, SelectionRule
from mstar_mega.data.types import CheckReasoning, Group, Response
from mstar_mega.functions import is_path, load, number
from mstar_mega.kernels.dispatch import is_on
from mstar_mega.kernels.selection import select_topk
from mstar_mega.platform.devices import to_device
from mstar_mega.platform.distributed import device

SCORED_RULES: tuple[SelectionRule, ...] = ("top_k", "top_k_above", "threshold")
"""Those that need process scores."""
CEILING: SelectionRule = "right_reasoning"
"""No method, but what a perfect judge of reasoning would take: for analysis only."""


def require_check(check: CheckReasoning | None) -> CheckReasoning:
    """The task's program that judges reasoning, for the rule ``right_reasoning``. Raises ValueError without one."""
    if check is None:
        raise ValueError(
            f"selection.rule is {CEILING}: it needs a training set whose own program can tell right reasoning "
            "(data.name digits). It is the ceiling of the other rules, for analysis only; choose one of them"
        )
    return check


def process_score(response: Response, query_id: str) -> float:
    """The response's process score. Raises ValueError when it is missing or NaN."""
    if response.score is None or math.isnan(response.score):
        raise ValueError(
            f"response {response.index} of query {query_id!r} has process score {response.score}; "
            "score the responses with the process reward model first, or choose a selection without it "
            "(selection.rule likelihood, random_k or all_correct)"
        )
    return response.score


def is_correct(response: Response, query_id: str) -> bool:
    """The answer reward. Raises ValueError when the response has not been judged."""
    if response.correct is None:
        raise ValueError(f"response {response.index} of query {query_id!r} has not been judged against an answer")
    return response.correct


def mean_log_prob(response: Response) -> float:
    """The policy's mean log-probability per token, at the sampling temperature; -inf for a response without tokens."""
    return math.fsum(response.log_probs) / len(response.log_probs) if response.log_probs else -math.inf


def _random_rank(seed: int, query_id: str, index: int) -> bytes:
    return hashlib.sha256(json.dumps([seed, query_id, index]).encode()).digest()


def select(
    groups: Sequence[Group], config: SelectionConfig, rng_seed: int, check: CheckReasoning | None = None
) -> list[list[Response]]:
    """Mark ``selected`` on every response of the groups and return each group's selected ones, by sample index.

    ``check`` is for the rule that is a ceiling. Raises as :func:`choose_responses`.
    """
    chosen = choose_responses(groups, config, rng_seed, check)
    for group, of_group in zip(groups, chosen, strict=True):
        indices = {response.index for response in of_group}
        for response in group.responses:
            response.selected = response.index in indices
    return [sorted((r for r in group.responses if r.selected), key=lambda r: r.index) for group in groups]


def choose_responses(
    groups: Sequence[Group], config: SelectionConfig, rng_seed: int, check: CheckReasoning | None = None
) -> list[list[Response]]:
    """The responses of each group that ``config`` selects.

    The answer filter comes first: only correct responses are eligible. Ties go to the lower sample index; ``random_k``
    draws by (rng_seed, query id, sample index), so that the order of queries and responses does not matter. ``check``
    says whose reasoning is right; only ``right_reasoning`` asks it. Raises ValueError for responses that are not judged
    or, where the rule needs it, not scored, and for ``right_reasoning`` without ``check``.
    """
    if is_path(config.rule):
        return [_by_function(group, config, rng_seed) for group in groups]
    if config.rule not in get_args(SelectionRule):
        raise ValueError(f"selection.rule is {config.rule!r}; it must be one of {', '.join(get_args(SelectionRule))}")
    ids = [group.query.id for group in groups]
    eligible = [_eligible(group, config.distinct) for group in groups]
    if config.rule == CEILING:
        is_right = require_check(check)
        eligible = [[r for r in of if is_right(id, r.text)] for of, id in zip(eligible, ids, strict=True)]
    if config.rule in ("threshold", "top_k_above"):
        eligible = [
            [response for response in responses if process_score(response, id) > config.threshold]
            for responses, id in zip(eligible, ids, strict=True)
        ]
    if config.rule in ("threshold", "all_correct"):
        return eligible
    if config.k < 1:
        raise ValueError(f"selection.k is {config.k}; {config.rule} needs at least 1")
    if config.rule in ("random_k", CEILING):
        ranked = [
            sorted(responses, key=lambda response: _random_rank(rng_seed, id, response.index))
            for responses, id in zip(eligible, ids, strict=True)
        ]
        return [responses[: config.k] for responses in ranked]
    ordered = [sorted(responses, key=lambda response: response.index) for responses in eligible]
    scores = [
        [mean_log_prob(response) if config.rule == "likelihood" else process_score(response, id) for response in of]
        for of, id in zip(ordered, ids, strict=True)
    ]
    return _best(ordered, scores, config.k)


def _by_function(group: Group, config: SelectionConfig, rng_seed: int) -> list[Response]:
    """What a function of the user's selects of one query's responses."""
    chosen = load("selection.rule", config.rule)(group, config, rng_seed)
    known = {id(response) for response in group.responses}
    try:
        selected = list(chosen)
    except TypeError:
        selected = [chosen]
    if any(id(each) not in known for each in selected) or len({id(each) for each in selected}) != len(selected):
        raise ValueError(
            f"selection.rule {config.rule} returned {str(chosen)[:60]} for query {group.query.id}: it must return some "
            "of group.responses, each once"
        )
    return selected


def weight_of(group: Group, response: Response, config: SelectionConfig) -> float:
    """What a selected response counts in the loss (``selection.weight``).

    Raises ValueError where the reward or the process score that it asks for is missing, and where a function of the
    user's returns no finite number.
    """
    if config.weight == "none":
        return 1.0
    if config.weight == "reward":
        return float(is_correct(response, group.query.id)) if response.reward is None else response.reward
    if config.weight == "score":
        return process_score(response, group.query.id)
    path = config.weight
    return number("selection.weight", path, load("selection.weight", path)(group.query, response))


def uses_scores(config: SelectionConfig) -> bool:
    """Whether the selection reads process scores. A function of the user's does, unless it says
    ``function.needs_scores = False``."""
    paths = {"selection.rule": config.rule, "selection.weight": config.weight}
    asking = [load(setting, path) for setting, path in paths.items() if is_path(path)]
    return (
        config.rule in SCORED_RULES
        or config.weight == "score"
        or any(getattr(function, "needs_scores", True) for function in asking)
    )


def _eligible(group: Group, distinct: bool) -> list[Response]:
    """The correct responses; with ``distinct`` the first of those with the same tokens."""
    correct = [response for response in group.responses if is_correct(response, group.query.id)]
    return with_distinct_tokens(correct) if distinct else correct


def with_distinct_tokens(responses: Sequence[Response]) -> list[Response]:
    """The first of the responses with the same tokens, for each."""
    first: dict[tuple[int, ...], Response] = {}
    for response in responses:
        first.setdefault(tuple(response.tokens), response)
    return list(first.values())


def _best(ordered: list[list[Response]], scores: list[list[float]], k: int) -> list[list[Response]]:
    """The k of highest score of every query's responses, which are by sample index; all queries at once."""
    if not is_on("selection"):
        ranks = [sorted(range(len(of_query)), key=lambda i: -of_query[i]) for of_query in scores]
        return [[of[i] for i in rank[:k]] for of, rank in zip(ordered, ranks, strict=True)]
    pool = [response for responses in ordered for response in responses]
    best = select_topk(
        to_device([score for of_query in scores for score in of_query], device(), torch.float64),
        torch.ones(len(pool), dtype=torch.bool, device=device()),
        to_device([0, *accumulate(map(len, ordered))], device()),
        k,
    )
    return [[pool[place] for place in places if place >= 0] for places in best.index.tolist()]
