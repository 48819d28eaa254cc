"""Selection rules, and what they refuse."""

from __future__ import annotations

import random

import pytest
from groups import make_group, make_response

from mstar_mega.config import SelectionConfig, SelectionRule
from mstar_mega.data.types import CheckReasoning, Group
from mstar_mega.kernels.dispatch import turn_off
from mstar_mega.rewards.selection import select


def picked(group: Group, rule: str, k: int = 2, threshold: float = 0.5, seed: int = 0) -> list[int]:
    (chosen,) = select([group], SelectionConfig(rule, k, threshold), seed)
    assert chosen == [response for response in sorted(group.responses, key=lambda r: r.index) if response.selected]
    return [response.index for response in chosen]


def test_selection_rules() -> None:
    scores = [0.9, 0.2, 0.7, 0.7, 0.99, 0.7]
    right = [True, True, True, True, False, True]
    group = make_group([make_response(i, s, c) for i, (s, c) in enumerate(zip(scores, right, strict=True))])
    assert picked(group, "all_correct") == [0, 1, 2, 3, 5]
    assert picked(group, "top_k", 1) == [0]
    assert picked(group, "top_k", 2) == [0, 2], "ties go to the lower index"
    assert picked(group, "top_k", 99) == [0, 1, 2, 3, 5]
    assert picked(group, "threshold", threshold=0.7) == [0], "above, not at"
    assert picked(group, "threshold", threshold=0.1) == [0, 1, 2, 3, 5]
    assert picked(group, "top_k_above", 2, 0.1) == [0, 2] and picked(group, "top_k_above", 2, 0.8) == [0]
    assert picked(group, "top_k_above", 2, 0.95) == []
    for response, log_prob in zip(group.responses, (-9, -1, -2, -1, -0.1, -3), strict=True):
        response.log_probs = [log_prob - 0.5, log_prob + 0.5] * (response.index + 1)  # the mean, not the sum
    assert picked(group, "likelihood", 3) == [1, 2, 3] and picked(group, "likelihood", 1) == [1]
    group.responses.reverse()
    assert picked(group, "likelihood", 1) == [1], "ties go to the lower index"
    assert picked(group, "top_k", 3) == [0, 2, 3]
    assert picked(make_group([make_response(0, 0.5, False)]), "top_k") == []


def test_distinct_counts_equal_responses_once() -> None:
    responses = [make_response(i, score, True) for i, score in enumerate((0.3, 0.9, 0.9, 0.5))]
    for response, tokens in zip(responses, ([1], [2], [2], [3]), strict=True):
        response.tokens = tokens
    cases = [("top_k", False, [1, 2]), ("top_k", True, [1, 3]), ("all_correct", True, [0, 1, 3])]
    for rule, distinct, expected in cases:
        config = SelectionConfig(rule, 2, distinct=distinct)
        assert [response.index for response in select([make_group(responses)], config, 0)[0]] == expected


def test_all_queries_at_once_as_one_by_one_and_without_the_kernel() -> None:
    random.seed(5)
    groups = [
        make_group([make_response(i, random.randint(0, 3) / 4, random.random() < 0.6) for i in range(n)], f"q{n}")
        for n in (16, 1, 0, 7)
    ]
    together = select(groups, SelectionConfig("top_k", 3), 0)
    assert together == [select([group], SelectionConfig("top_k", 3), 0)[0] for group in groups]
    for response in (response for group in groups for response in group.responses):
        response.log_probs = [random.randint(-3, 0)]
    rules: list[SelectionRule] = ["top_k", "top_k_above", "likelihood"]
    configs = [SelectionConfig(rule, 3) for rule in rules]
    with_kernel = [select(groups, config, 0) for config in configs]
    turn_off(["selection"])
    try:
        assert with_kernel == [select(groups, config, 0) for config in configs] and with_kernel[0] == together
    finally:
        turn_off([])


def test_random_k_depends_on_seed_query_and_index_only() -> None:
    responses = [make_response(i, correct=i % 3 != 0) for i in range(16)]
    first = picked(make_group(responses, "q1"), "random_k")
    assert len(first) == 2 and all(i % 3 for i in first)
    assert first == picked(make_group(responses[::-1], "q1"), "random_k")
    picks = [tuple(picked(make_group(responses, f"q{i}"), "random_k")) for i in range(300)]
    assert len(set(picks)) > 30
    counts = [sum(i in pick for pick in picks) for i in range(16)]
    assert all(counts[i] == 0 if i % 3 == 0 else 30 < counts[i] < 95 for i in range(16)), "about uniform (60 expected)"
    assert picks != [tuple(picked(make_group(responses, f"q{i}"), "random_k", seed=1)) for i in range(300)]


def test_right_reasoning_takes_what_the_tasks_program_approves_and_nothing_else() -> None:
    group = make_group([make_response(i, 0.5, i % 2 == 0) for i in range(8)])
    config = SelectionConfig("right_reasoning", 2)

    def chosen(check: CheckReasoning, k: int = 2) -> list[int]:
        return [r.index for r in select([group], SelectionConfig("right_reasoning", k), 0, check)[0]]

    for response in group.responses:
        response.text = str(response.index)
    assert chosen(lambda id, text: int(text) >= 4) == [4, 6], "of the correct ones"
    assert chosen(lambda id, text: True if text == "2" else None) == [2], "what it cannot tell is not right"
    assert chosen(lambda id, text: False) == []
    assert len(chosen(lambda id, text: True)) == 2 and chosen(lambda id, text: True, 9) == [0, 2, 4, 6]
    with pytest.raises(ValueError, match=r"selection\.rule is right_reasoning"):
        select([group], config, 0)


def test_selection_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match="not been judged"):
        picked(make_group([make_response(0, 0.5)]), "top_k")
    for score in (None, float("nan")):
        with pytest.raises(ValueError, match="process score"):
            picked(make_group([make_response(0, score, True)]), "top_k")
    with pytest.raises(ValueError, match="selection.k"):
        picked(make_group([make_response(0, 0.5, True)]), "random_k", 0)
    with pytest.raises(ValueError, match="selection.rule"):
        picked(make_group([make_response(0, 0.5, True)]), "best")
    for rule in ("all_correct", "likelihood"):
        assert picked(make_group([make_response(0, None, True)]), rule) == [0], "needs no scores"
