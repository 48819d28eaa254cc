"""Selection (operator H of the paper, section 4): which of a query's correct responses are trained on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from mstar_mega.config import SelectionConfig
from mstar_mega.data.types import Group, Response
from mstar_mega.kernels.dispatch import is_on
from mstar_mega.kernels.selection import select_topk


def process_score(response: Response, query_id: str) -> float:
    """The response's process score. Raises ValueError when it is missing or NaN."""
    if response.score is None or math.isnan(response.score):
        raise ValueError(
            f"response {response.index} of query {query_id!r} has process score {response.score}; "
            "score the responses with the process reward model first, or choose a selection without it "
            "(selection.rule all_correct or random_k)"
        )
    return response.score


def is_correct(response: Response, query_id: str) -> bool:
    """The answer reward. Raises ValueError when the response has not been judged."""
    if response.correct is None:
        raise ValueError(f"response {response.index} of query {query_id!r} has not been judged against an answer")
    return response.correct


def _random_rank(seed: int, query_id: str, index: int) -> bytes:
    return hashlib.sha256(json.dumps([seed, query_id, index]).encode()).digest()


def _choose(correct: list[Response], query_id: str, config: SelectionConfig, rng_seed: int) -> list[Response]:
    if config.rule == "all_correct":
        return correct
    if config.rule == "threshold":
        return [response for response in correct if process_score(response, query_id) > config.threshold]
    if config.rule not in ("top_k", "random_k"):
        raise ValueError(f"selection.rule is {config.rule!r}; it must be top_k, all_correct, random_k or threshold")
    if config.k < 1:
        raise ValueError(f"selection.k is {config.k}; {config.rule} needs at least 1")
    if config.rule == "random_k":
        ranked = sorted(correct, key=lambda response: _random_rank(rng_seed, query_id, response.index))
    else:
        ranked = sorted(correct, key=lambda response: (-process_score(response, query_id), response.index))
    return ranked[: config.k]


def select(groups: Sequence[Group], config: SelectionConfig, rng_seed: int) -> list[list[Response]]:
    """Mark ``selected`` on every response of the groups and return each group's selected ones, by sample index.

    The answer filter comes first: only correct responses are eligible. ``random_k`` draws by (rng_seed, query id,
    sample index), so that the order of queries and responses does not matter. Raises ValueError for responses that are
    not judged or, where the rule needs it, not scored.
    """
    correct = [_eligible(group, config.distinct) for group in groups]
    ids = [group.query.id for group in groups]
    if config.rule == "top_k" and config.k >= 1 and is_on("selection"):
        chosen = _top_k(correct, ids, config.k)
    else:
        chosen = [_choose(*of_query, config, rng_seed) for of_query in zip(correct, ids, strict=True)]
    for group, of_group in zip(groups, chosen, strict=True):
        indices = {response.index for response in of_group}
        for response in group.responses:
            response.selected = response.index in indices
    return [sorted((r for r in group.responses if r.selected), key=lambda r: r.index) for group in groups]


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


def _top_k(correct: list[list[Response]], query_ids: list[str], k: int) -> list[list[Response]]:
    """The k best of every query's correct responses, all queries at once."""
    ordered = [sorted(responses, key=lambda response: response.index) for responses in correct]
    pool = [response for responses in ordered for response in responses]
    scores = [
        process_score(response, query_id)
        for responses, query_id in zip(ordered, query_ids, strict=True)
        for response in responses
    ]
    best = select_topk(
        torch.tensor(scores, dtype=torch.float64),
        torch.ones(len(pool), dtype=torch.bool),
        torch.tensor([0, *accumulate(map(len, ordered))]),
        k,
    )
    return [[pool[place] for place in places if place >= 0] for places in best.index.tolist()]
