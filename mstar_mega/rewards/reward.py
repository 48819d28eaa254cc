"""The answer reward of one response: the checker's verdict, or a function of the user's (``reward.function``)."""

from __future__ import annotations

from dataclasses import dataclass

from mstar_mega.config import RewardConfig
from mstar_mega.data.types import Query, Response
from mstar_mega.functions import is_path, load, number
from mstar_mega.rewards.checker import AnswerChecker

GRADED = "function"
"""``Response.verdict`` of a response that a function of the user's has judged."""


@dataclass(frozen=True)
class Judged:
    """What a response is worth."""

    correct: bool
    verdict: str
    """How it was judged: see ``Response.verdict``."""
    reward: float | None = None
    """From 0 to 1, of a function of the user's."""

    def note(self, response: Response) -> None:
        """Write it into the response."""
        response.correct, response.verdict, response.reward = self.correct, self.verdict, self.reward


def judge_response(query: Query, response: Response, settings: RewardConfig, checker: AnswerChecker) -> Judged:
    """Judge one response. A truncated one has not answered, whatever it says; an unlabelled query has nothing to
    compare with: neither reaches a function.

    Raises ValueError where a function of the user's fails or returns no number from 0 to 1.
    """
    if query.answer is None or response.truncated:
        return Judged(False, "none")
    if is_path(settings.function):
        given = load("reward.function", settings.function)(query, response)
        reward = number("reward.function", settings.function, given, 0.0, 1.0)
        return Judged(reward >= settings.threshold, GRADED, reward)
    if response.answer is None:
        return Judged(False, "none")
    verdict = checker.check(response.answer, query.answer, query.choices)
    return Judged(verdict.correct, verdict.how)
