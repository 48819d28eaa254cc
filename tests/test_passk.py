"""Exploration measures and the quality of scores, against brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mstar_mega.data.types import Group, Query, Response
from mstar_mega.evaluation.passk import (
    Exploration,
    accuracy,
    accuracy_by_kind,
    auc,
    best_of_n_accuracy,
    greedy_accuracy,
    majority_vote_accuracy,
    measure,
    paired_difference,
    pass_at_k,
    random_pass_at_k_of_each,
    reward_pass_at_k,
    sample_accuracy,
    weighted_vote_accuracy,
)


def make_group(
    name: str, correct: Sequence[bool | None], scores: Sequence[float | None] | None = None, kind: str = ""
) -> Group:
    """Right answers are "1", wrong ones "0"."""
    responses = [
        Response(i, [], "", answer=str(int(bool(c))), correct=c, score=scores[i] if scores else None)
        for i, c in enumerate(correct)
    ]
    return Group(Query(name, "?", (), "1", kind=kind), responses)


def random_groups(rng: random.Random, count: int, samples: int) -> list[Group]:
    return [
        make_group(
            f"q{n}",
            [rng.random() < 0.3 for _ in range(samples)],
            [rng.choice([0.1, 0.4, 0.4, 0.8]) for _ in range(samples)],
            kind=rng.choice("ab"),
        )
        for n in range(count)
    ]


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    rng = random.Random(0)
    for _ in range(60):
        samples = rng.randrange(1, 8)
        groups = random_groups(rng, 3, samples)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(range(samples), k))
            hits = [any(group.responses[i].correct for i in subset) for group in groups for subset in subsets]
            assert pass_at_k(groups, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_pass_at_k_edges() -> None:
    assert pass_at_k([make_group("a", [False] * 16), make_group("b", [False] * 15 + [True])], 16) == 0.5
    assert pass_at_k([make_group("a", [True] + [False] * 999)], 1) == pytest.approx(0.001)
    assert pass_at_k([], 4) is None
    with pytest.raises(ValueError, match="K = 4 needs"):
        pass_at_k([make_group("a", [True] * 3)], 4)
    with pytest.raises(ValueError, match="at least 1"):
        pass_at_k([make_group("a", [True])], 0)
    with pytest.raises(ValueError, match="not been judged"):
        pass_at_k([make_group("a", [True, None])], 1)


def test_reward_pass_at_k_matches_brute_force_and_ignores_list_order() -> None:
    rng = random.Random(1)
    for _ in range(100):
        groups = random_groups(rng, 4, 6)
        for k in (1, 2, 6):
            hits = 0
            for group in groups:
                pool = list(group.responses)
                best = []
                for _ in range(k):  # repeatedly take the first of the best
                    top = max(pool, key=lambda r: r.score or 0.0)
                    pool.remove(top)
                    best.append(top.correct)
                hits += any(best)
            assert reward_pass_at_k(groups, k) == pytest.approx(hits / 4)
            shuffled = [Group(g.query, rng.sample(g.responses, 6)) for g in groups]
            assert reward_pass_at_k(shuffled, k) == reward_pass_at_k(groups, k)


def test_reward_pass_ranks_unscored_last_and_refuses_nan() -> None:
    group = make_group("a", [True, False, False], [None, -3.0, 0.0])
    assert reward_pass_at_k([group], 2) == 0.0
    assert reward_pass_at_k([group], 3) == 1.0
    with pytest.raises(ValueError, match="NaN"):
        reward_pass_at_k([make_group("a", [True], [float("nan")])], 1)
    with pytest.raises(ValueError, match="not been judged"):
        reward_pass_at_k([make_group("a", [True, None], [0.9, 0.8])], 2)


def test_greedy_accuracy() -> None:
    assert greedy_accuracy([make_group("a", [True]), make_group("b", [False]), make_group("c", [True])]) == 2 / 3
    assert greedy_accuracy([]) is None
    with pytest.raises(ValueError, match="exactly one"):
        greedy_accuracy([make_group("a", [True, True])])


def test_picks() -> None:
    groups = [
        make_group("a", [True, False, False], [0.9, 0.3, 0.3]),  # best and weighted vote right, majority wrong
        make_group("b", [True, True, False], [0.1, 0.1, 0.8]),  # majority right only
        make_group("c", [False, False, False], [0.1, 0.1, 0.8]),
    ]
    assert best_of_n_accuracy(groups) == pytest.approx(1 / 3)
    assert weighted_vote_accuracy(groups) == pytest.approx(1 / 3)
    assert majority_vote_accuracy(groups) == pytest.approx(1 / 3)
    groups[0].responses[1].score = 0.7
    assert weighted_vote_accuracy(groups) == 0.0
    for group in groups:
        for response in group.responses:
            response.answer, response.correct = None, False
    assert majority_vote_accuracy(groups) == weighted_vote_accuracy(groups) == 0.0


def test_by_kind() -> None:
    groups = [make_group("a", [True, False], kind="sum"), make_group("b", [True, True], kind="sum")]
    groups.append(make_group("c", [False], kind="count"))
    assert list(accuracy_by_kind(groups).items()) == [("count", 0.0), ("sum", 0.75)]
    assert sample_accuracy(groups) == 0.5
    assert sample_accuracy([make_group("a", [])]) == 0.0


def gain_over_random(groups: Sequence[Group], k: int) -> Any:
    """Reward-Pass@K minus Pass@K, and the standard error of the paired difference."""
    gains = [(reward_pass_at_k([group], k) or 0.0) - (pass_at_k([group], k) or 0.0) for group in groups]
    average = sum(gains) / len(gains)
    error = (sum((gain - average) ** 2 for gain in gains) / (len(gains) - 1) / len(gains)) ** 0.5
    return pytest.approx(average), pytest.approx(error)


def test_measure_bundles_everything() -> None:
    groups = random_groups(random.Random(4), 30, 16)
    gain, error = gain_over_random(groups, 2)
    assert measure(groups, 8, 2) == Exploration(
        pass_at_k(groups, 8), 8, reward_pass_at_k(groups, 2), 2, pass_at_k(groups, 2), gain, error,
        best_of_n_accuracy(groups), weighted_vote_accuracy(groups), majority_vote_accuracy(groups),
    )  # fmt: skip


def test_measure_without_scores_or_queries() -> None:
    nothing = Exploration(None, 2, None, 2, None, None, None, None, None, None)
    assert measure([], 2, 2) == nothing
    unscored = replace(nothing, pass_at_k=1.0, pass_at_reward_k=1.0, majority_vote=1.0)
    assert measure([make_group("a", [True, False])], 2, 2) == unscored


def test_auc_matches_pairs_and_sklearn() -> None:
    rng = random.Random(5)
    for _ in range(200):
        size = rng.randrange(2, 30)
        scores = [rng.choice([0.0, 0.1, 0.5, rng.random()]) for _ in range(size)]
        labels = [rng.randrange(2) for _ in range(size)]
        positives = [s for s, y in zip(scores, labels, strict=True) if y]
        negatives = [s for s, y in zip(scores, labels, strict=True) if not y]
        if not positives or not negatives:
            assert auc(scores, labels) is None
            continue
        won = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
        assert auc(scores, labels) == pytest.approx(won / (len(positives) * len(negatives)), abs=1e-12)
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_and_accuracy_edges() -> None:
    assert auc([0.1, 0.9], [0, 1]) == 1.0 and auc([0.9, 0.1], [0, 1]) == 0.0 and auc([0.5] * 4, [0, 1, 1, 0]) == 0.5
    assert auc([], []) is None and accuracy([], []) is None
    assert accuracy([0.2, 0.5, 0.7, 0.4], [0, 1, 0, 1]) == 0.5
    assert accuracy([0.2, 0.3], [0, 1], threshold=0.25) == 1.0
    for measure_of in (auc, accuracy):
        with pytest.raises(ValueError, match="2 scores"):
            measure_of([0.1, 0.2], [1])
        with pytest.raises(ValueError, match="0 or 1"):
            measure_of([0.1, 0.2], [1, 2])
        with pytest.raises(ValueError, match="NaN"):
            measure_of([0.1, float("nan")], [1, 0])


def test_distinct_texts_take_one_place_each() -> None:
    """Three copies of the best text fill both places, unless they count once."""
    responses = [
        Response(0, [1], "a", correct=False, score=0.9), Response(1, [1], "a", correct=False, score=0.9),
        Response(2, [2], "b", correct=True, score=0.5), Response(3, [3], "c", correct=False, score=0.1),
    ]  # fmt: skip
    group = Group(Query("q", "?", (), "1"), responses)
    assert reward_pass_at_k([group], 2) == 0.0 and reward_pass_at_k([group], 2, distinct=True) == 1.0
    fair = measure([group], 4, 2, distinct=True)
    assert fair.reward_pass_at_k == 1.0 and fair.pass_at_reward_k == pytest.approx(2 / 3), (
        "2 different ones on each side"
    )
    assert fair.reward_gain == pytest.approx(1 / 3) and fair.pass_at_k == 1.0
    copied = measure([group], 4, 2)
    assert copied.pass_at_reward_k == pytest.approx(1 / 2) and copied.reward_gain == pytest.approx(-1 / 2)
    assert random_pass_at_k_of_each([group], 2) == [pytest.approx(1 / 2)]
    assert random_pass_at_k_of_each([group], 2, distinct=True) == [pytest.approx(2 / 3)]
    copies = Group(group.query, responses[:2])
    assert random_pass_at_k_of_each([copies, group], 2, distinct=True)[0] == 0.0, "fewer than K different ones"
    with pytest.raises(ValueError, match="K = 3 needs at least 3"):
        random_pass_at_k_of_each([copies], 3, distinct=True)


def test_a_paired_difference_has_the_error_of_the_differences() -> None:
    rng = random.Random(3)
    one = [rng.random() for _ in range(50)]
    other = [value + 0.1 + rng.gauss(0, 0.01) for value in one]
    difference, error = paired_difference(one, other)
    assert difference == pytest.approx(-0.1, abs=0.01)
    assert error == pytest.approx(np.std(np.subtract(one, other), ddof=1) / 50**0.5)
    assert paired_difference([1.0], [0.0]) == (1.0, None) and paired_difference([], []) == (None, None)
    with pytest.raises(ValueError, match="shorter|longer"):
        paired_difference([1.0], [])
