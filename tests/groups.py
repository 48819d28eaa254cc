"""Responses and groups with only what a rule looks at, for the tests of rewards."""

from __future__ import annotations

from mstar_mega.data.types import Group, Query, Response


def make_response(
    index: int, score: float | None = None, correct: bool | None = None, answer: str | None = None
) -> Response:
    return Response(index, [], "", score=score, correct=correct, answer=answer)


def make_group(
    responses: list[Response], name: str = "q", answer: str | None = None, choices: tuple[str, ...] = ()
) -> Group:
    return Group(Query(name, "?", (), answer, choices), responses)
