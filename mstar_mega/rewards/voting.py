"""Answers that many responses agree on: PRM-weighted voting, majority voting, best of n.

Answers that are the same choice, number or normalised text are one candidate (:func:`answers.answer_key`). Only
responses with an answer vote. The order of the list never matters: responses count by their sample index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from mstar_mega.data.types import Group, Response
from mstar_mega.rewards.answers import answer_key
from mstar_mega.rewards.choices import resolve_choice


def _voting_score(response: Response) -> float:
    if response.score is None or math.isnan(response.score):
        raise ValueError(
            f"response {response.index} votes with answer {response.answer!r} but its process score is "
            f"{response.score}; score the responses with the process reward model first"
        )
    return response.score


def _winner(
    responses: Sequence[Response], weight: Callable[[Response], float], choices: Sequence[str]
) -> Response | None:
    """The first response of the candidate with the largest summed weight; ties: more votes, then first seen."""
    candidates: dict[str, list[Response]] = {}
    for response in sorted(responses, key=lambda response: response.index):
        if response.answer is not None and not response.truncated:  # cut off inside its answer, perhaps
            candidates.setdefault(answer_key(response.answer, choices), []).append(response)
    if not candidates:
        return None
    # max keeps the first of equals, and the dict is in order of first sight
    votes = max(candidates.values(), key=lambda votes: (math.fsum(map(weight, votes)), len(votes)))
    return votes[0]


def weighted_winner(responses: Sequence[Response], choices: Sequence[str] = ()) -> Response | None:
    """A response with the answer whose responses have the largest sum of process scores; None without any answer.

    Raises ValueError when a response that votes has no process score.
    """
    return _winner(responses, _voting_score, choices)


def majority_winner(responses: Sequence[Response], choices: Sequence[str] = ()) -> Response | None:
    """A response with the most frequent answer (ties: first seen); None without any answer."""
    return _winner(responses, lambda _: 1.0, choices)


def rank_by_score(responses: Sequence[Response]) -> list[Response]:
    """Best process score first, ties by sample index; responses without a score (no steps) last.

    Raises ValueError for a NaN score.
    """
    for response in responses:
        if response.score is not None and math.isnan(response.score):
            raise ValueError(f"response {response.index} has process score NaN; the process reward model has diverged")
    return sorted(responses, key=lambda r: (r.score is None, -(r.score or 0.0), r.index))


def best_winner(responses: Sequence[Response]) -> Response | None:
    """The response with the best process score, whether or not it has an answer; None for an empty list."""
    ranked = rank_by_score(responses)
    return ranked[0] if ranked else None


def vote(responses: Sequence[Response], choices: Sequence[str] = ()) -> str | None:
    """Pseudo answer by PRM-weighted voting (paper section 5); a choice's letter where ``choices`` has it.

    None when no response has an answer. Raises ValueError when a response that votes has no process score.
    """
    winner = weighted_winner(responses, choices)
    if winner is None or winner.answer is None:
        return None
    return (resolve_choice(winner.answer, choices) if choices else None) or winner.answer


def apply_pseudo_answers(group: Group) -> Group:
    """The group with the voted answer as its query's answer, ready to be judged and selected like a labelled one.

    Its responses are copies, not judged and not selected. Without any answer to vote for the query's answer stays None.
    Raises ValueError when the query already has an answer: a gold answer is never replaced.
    """
    if group.query.answer is not None:
        raise ValueError(f"query {group.query.id!r} is labelled; pseudo answers are for unlabelled queries only")
    pseudo = vote(group.responses, group.query.choices)
    responses = [replace(response, correct=None, selected=False) for response in group.responses]
    return Group(replace(group.query, answer=pseudo), responses)
