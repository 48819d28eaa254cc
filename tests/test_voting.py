"""Votes, best of n and pseudo answers, against brute force."""

from __future__ import annotations

import random

import pytest
from groups import make_group, make_response

from mstar_mega.data.types import Response
from mstar_mega.rewards.voting import apply_pseudo_answers, best_winner, majority_winner, vote


def ballots(*pairs: tuple[str | None, float | None]) -> list[Response]:
    return [make_response(i, score, answer=answer) for i, (answer, score) in enumerate(pairs)]


def majority_vote(responses: list[Response]) -> str | None:
    winner = majority_winner(responses)
    return None if winner is None else winner.answer


def best_of_n(responses: list[Response]) -> str | None:
    winner = best_winner(responses)
    return None if winner is None else winner.answer


def test_votes() -> None:
    responses = ballots(("7", 0.9), ("5", 0.5), (None, None), ("5.0", 0.3), ("\\boxed{5}", 0.2), ("8", 0.95))
    assert vote(responses) == majority_vote(responses) == "5"
    assert best_of_n(responses) == "8"
    responses[1].score = 0.1
    assert vote(responses) == "8" and majority_vote(responses) == "5"
    assert vote(responses[::-1]) == "8" and majority_vote(responses[::-1]) == "5"


def test_vote_ties_and_edges() -> None:
    assert vote(ballots(("1", 0.5), ("2", 0.25), ("2", 0.25))) == "2", "equal sums: more votes"
    assert vote(ballots(("1", 0.5), ("2", 0.5))[::-1]) == "1", "then first seen, by sample index"
    assert majority_vote(ballots(("2", None), ("1", None))) == "2"
    assert best_of_n(ballots(("1", 0.5), ("2", 0.5))) == "1"
    assert vote(ballots((None, 0.5))) is majority_vote([]) is best_of_n([]) is None
    assert best_of_n(ballots((None, 0.9), ("1", 0.5))) is None, "the best response has no answer"
    assert best_of_n(ballots(("1", None), ("2", 0.0))) == "2", "unscored ranks last"
    assert vote(ballots(("12", 0.4), ("B", 0.4), ("A", 0.5)), ("7", "12")) == "B"
    cut_off = ballots(("1", 0.9), ("12", 0.5))
    cut_off[0].truncated = True
    assert vote(cut_off) == majority_vote(cut_off) == "12", "an answer at the length limit may be half of one"
    with pytest.raises(ValueError, match="process score"):
        vote(ballots(("1", None)))
    with pytest.raises(ValueError, match="NaN"):
        best_of_n(ballots(("1", float("nan"))))


def test_vote_matches_brute_force() -> None:
    rng = random.Random(3)
    for _ in range(500):
        responses = ballots(*((rng.choice("123"), rng.choice([0.25, 0.5, 1.0])) for _ in range(rng.randrange(1, 8))))
        best = None
        for candidate in "123":
            mine = [r for r in responses if r.answer == candidate]
            if mine:
                key = (sum(r.score or 0 for r in mine), len(mine), -mine[0].index)
                best = max(best, (key, candidate)) if best else (key, candidate)
        assert best is not None
        assert vote(rng.sample(responses, len(responses))) == best[1]


def test_pseudo_answers() -> None:
    group = make_group(ballots(("7", 0.9), ("5", 0.1)))
    group.responses[0].selected = True
    group.responses[1].correct = True
    voted = apply_pseudo_answers(group)
    assert voted.query.answer == "7" and group.query.answer is None
    assert all(r.correct is None and not r.selected for r in voted.responses)
    assert group.responses[0].selected and group.responses[1].correct, "the original is untouched"
    assert apply_pseudo_answers(make_group(ballots((None, 0.1)))).query.answer is None
    with pytest.raises(ValueError, match="labelled"):
        apply_pseudo_answers(make_group(ballots(("7", 0.9)), answer="7"))
