"""Accuracy and exploration measures (paper section 6.1) over judged groups, and the quality of step scores.

Every measure is a mean over queries, and None where there is nothing to measure. Responses must have been judged
(``Response.correct``), otherwise ValueError.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mstar_mega.data.types import Group, Response
from mstar_mega.rewards.selection import is_correct, with_distinct_tokens
from mstar_mega.rewards.voting import best_winner, majority_winner, rank_by_score, weighted_winner


def mean(values: Sequence[float]) -> float | None:
    """Exactly rounded; None where there is nothing to measure."""
    return math.fsum(values) / len(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean of values - reference over the same queries in the same order, and its standard error.

    None where there is nothing to measure; the error of a single query is None. Raises ValueError for unequal lengths.
    """
    gaps = [one - other for one, other in zip(values, reference, strict=True)]
    return mean(gaps), standard_error(gaps)


def _correct_count(group: Group) -> int:
    return sum(is_correct(response, group.query.id) for response in group.responses)


def _correct_share(group: Group) -> float:
    return _correct_count(group) / max(len(group.responses), 1)


def _need(group: Group, k: int) -> None:
    if k < 1:
        raise ValueError(f"K is {k}; it must be at least 1")
    if len(group.responses) < k:
        raise ValueError(f"query {group.query.id!r} has {len(group.responses)} responses; K = {k} needs at least {k}")


def greedy_accuracy(groups: Sequence[Group]) -> float | None:
    """Share of queries answered correctly; every group has exactly one (greedy) response, otherwise ValueError."""
    for group in groups:
        if len(group.responses) != 1:
            raise ValueError(
                f"query {group.query.id!r} has {len(group.responses)} responses; greedy accuracy needs exactly one"
            )
    return sample_accuracy(groups)


def sample_accuracy(groups: Sequence[Group]) -> float | None:
    """Mean share of correct responses (Pass@1 of the sampling policy). A query without responses counts as 0."""
    return mean([_correct_share(group) for group in groups])


def pass_at_k(groups: Sequence[Group], k: int) -> float | None:
    """Share of queries with at least one correct response among k samples.

    With n > k samples the unbiased estimate 1 - C(n - c, k) / C(n, k), c of them correct (Chen et al. 2021, arXiv
    2107.03374), which is the plain share when n = k. Raises ValueError when a query has fewer than k responses.
    """
    return mean(pass_at_k_of_each(groups, k))


def pass_at_k_of_each(groups: Sequence[Group], k: int) -> list[float]:
    """:func:`pass_at_k` of every query by itself."""
    values = []
    for group in groups:
        _need(group, k)
        total, wrong = len(group.responses), len(group.responses) - _correct_count(group)
        values.append(1.0 - math.comb(wrong, k) / math.comb(total, k))
    return values


def random_pass_at_k_of_each(groups: Sequence[Group], k: int, distinct: bool = False) -> list[float]:
    """What Reward-Pass@K has to beat, of every query: the chance that k of its responses drawn at random hold a correct
    one; with ``distinct`` k different ones (all, where there are fewer)."""
    if not distinct:
        return pass_at_k_of_each(groups, k)
    values = []
    for group in groups:
        _need(group, k)
        different = Group(group.query, with_distinct_tokens(group.responses))
        values += pass_at_k_of_each([different], min(k, len(different.responses)))
    return values


def reward_pass_at_k(groups: Sequence[Group], k: int, distinct: bool = False) -> float | None:
    """Share of queries with a correct response among the k with the best process score.

    The ranking is over all samples, without an answer filter; ties by sample index, responses without a score last.
    With ``distinct`` responses with the same tokens take one place together. Raises ValueError when a query has fewer
    than k responses.
    """
    return mean(reward_pass_at_k_of_each(groups, k, distinct))


def reward_pass_at_k_of_each(groups: Sequence[Group], k: int, distinct: bool = False) -> list[float]:
    """:func:`reward_pass_at_k` of every query by itself."""
    values = []
    for group in groups:
        _need(group, k)
        ranked = rank_by_score(with_distinct_tokens(group.responses) if distinct else group.responses)
        values.append(float(any([is_correct(response, group.query.id) for response in ranked[:k]])))
    return values


def _picked_accuracy(groups: Sequence[Group], picks: Sequence[Response | None]) -> float | None:
    hits = [
        float(pick is not None and is_correct(pick, group.query.id)) for group, pick in zip(groups, picks, strict=True)
    ]
    return mean(hits)


def best_of_n_accuracy(groups: Sequence[Group]) -> float | None:
    """Share of queries whose response with the best process score is correct."""
    return _picked_accuracy(groups, [best_winner(group.responses) for group in groups])


def weighted_vote_accuracy(groups: Sequence[Group]) -> float | None:
    """Share of queries whose PRM-weighted vote is correct; no answer at all is wrong."""
    return _picked_accuracy(groups, [weighted_winner(group.responses, group.query.choices) for group in groups])


def majority_vote_accuracy(groups: Sequence[Group]) -> float | None:
    """Share of queries whose most frequent answer is correct; no answer at all is wrong."""
    return _picked_accuracy(groups, [majority_winner(group.responses, group.query.choices) for group in groups])


def accuracy_by_kind(groups: Sequence[Group]) -> dict[str, float]:
    """:func:`sample_accuracy` by ``Query.kind``, in alphabetical order."""
    shares: dict[str, list[float]] = {}
    for group in groups:
        shares.setdefault(group.query.kind, []).append(_correct_share(group))
    return {kind: math.fsum(of_kind) / len(of_kind) for kind, of_kind in sorted(shares.items())}


@dataclass(frozen=True)
class Exploration:
    """What one policy's samples at one temperature offer, as the event ``evaluation`` has it. None: no process scores,
    or nothing to measure."""

    pass_at_k: float | None
    k: int
    reward_pass_at_k: float | None
    reward_k: int
    pass_at_reward_k: float | None
    """Pass@K at ``reward_k``: of so many random responses, what Reward-Pass@K has to beat. Of different ones where that
    counts different ones."""
    reward_gain: float | None
    """Reward-Pass@K minus that."""
    reward_gain_stderr: float | None
    """Its standard error: the difference is paired, query by query."""
    best_of_n: float | None
    weighted_vote: float | None
    majority_vote: float | None


def measure(groups: Sequence[Group], k: int, reward_k: int, distinct: bool = False) -> Exploration:
    """All measures over sampled groups. Those that rank by process score are None when no response at all has one.

    ``distinct`` is for Reward-Pass@K and its counterpart at random, see :func:`random_pass_at_k_of_each`.
    """
    scored = any(response.score is not None for group in groups for response in group.responses)
    at_random = random_pass_at_k_of_each(groups, reward_k, distinct)
    by_score = reward_pass_at_k_of_each(groups, reward_k, distinct) if scored else []
    gain, gain_stderr = paired_difference(by_score, at_random) if scored else (None, None)
    return Exploration(
        pass_at_k=pass_at_k(groups, k),
        k=k,
        reward_pass_at_k=mean(by_score),
        reward_k=reward_k,
        pass_at_reward_k=mean(at_random),
        reward_gain=gain,
        reward_gain_stderr=gain_stderr,
        best_of_n=best_of_n_accuracy(groups) if scored else None,
        weighted_vote=weighted_vote_accuracy(groups) if scored else None,
        majority_vote=majority_vote_accuracy(groups),
    )


def _check_scores(scores: Sequence[float], labels: Sequence[int]) -> None:
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} scores but {len(labels)} labels")
    if not all(label in (0, 1) for label in labels):
        raise ValueError("labels must be 0 or 1; cut soft labels first")
    if any(math.isnan(score) for score in scores):
        raise ValueError("a score is NaN; the process reward model has diverged")


def accuracy(scores: Sequence[float], labels: Sequence[int], threshold: float = 0.5) -> float | None:
    """Share of scores on their label's side of the threshold (at it: positive); None for empty input.

    Raises ValueError for unequal lengths, labels other than 0 and 1, and NaN.
    """
    _check_scores(scores, labels)
    return mean([float((score >= threshold) == bool(label)) for score, label in zip(scores, labels, strict=True)])


def auc(scores: Sequence[float], labels: Sequence[int]) -> float | None:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties counting half.

    None when there is only one class. Raises ValueError as :func:`accuracy`.
    """
    _check_scores(scores, labels)
    positives = sum(map(int, labels))
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return None
    tallies: dict[float, list[int]] = {}
    for score, label in zip(scores, labels, strict=True):
        tallies.setdefault(score, [0, 0])[int(label)] += 1
    twice_won, below = 0, 0  # in integers, so that the result is exact
    for _, (negative, positive) in sorted(tallies.items()):
        twice_won += positive * (2 * below + negative)
        below += negative
    return twice_won / (2 * positives * negatives)
