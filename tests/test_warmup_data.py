"""A warm-up set made by a tiny policy of its own gold answers, and a warm-up that trains on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Job, events_of

from mstar_mega.data.records import read_groups, write_groups
from mstar_mega.data.types import Query, Response, Step
from mstar_mega.recipe import rollouts
from mstar_mega.recipe.warmup_data import SET_FILE, kept_responses, with_gold_answer
from mstar_mega.rewards.answers import Verdict

SETTINGS = [
    *("--data.warmup_examples", "8", "--data.labelled_queries", "6", "--data.unlabelled_queries", "1"),
    *("--data.validation_queries", "2", "--data.test_queries", "2", "--generation.max_new_tokens", "12"),
    *("--warmup.queries", "5", "--warmup.responses", "4", "--warmup.keep", "2", "--warmup.optimizer.batch_size", "2"),
]


def response(index: int, text: str, correct: bool = True, truncated: bool = False, steps: int = 2) -> Response:
    made = Response(index, [index], text, correct=correct, truncated=truncated)
    made.steps = [Step(0, 1, text) for _ in range(steps)]
    return made


def test_what_is_kept() -> None:
    drawn = [
        response(0, "a", correct=False), response(1, "b", truncated=True), response(2, "c", steps=1), response(3, "d"),
        response(4, "d"), response(5, "e"), response(6, "f"),
    ]  # fmt: skip
    assert [r.index for r in kept_responses(drawn, 2)] == [3, 5]
    assert [r.index for r in kept_responses(drawn, 9)] == [3, 5, 6]
    asked = with_gold_answer(Query("q", "How many?", (), "7", ("x",)))
    assert asked.question.startswith("How many?\n\n") and "is: 7\n" in asked.question and asked.id == "q"


def judge_and_read_steps() -> None:
    """Untrained policies write no steps: give each response two, and call every second one correct."""
    rollouts._verdict = lambda job, query, response: Verdict(response.index % 2 == 0, "exact")
    split = rollouts.split_steps

    def two(tokens: list[int], offsets: list[int], text: str) -> list[Step]:
        return split(tokens, offsets, text) * 2

    rollouts.split_steps = two  # type: ignore[assignment]
    plain = rollouts.to_response

    def untruncated(*arguments: object) -> Response:
        made = plain(*arguments)  # type: ignore[arg-type]
        made.truncated = False
        return made

    rollouts.to_response = untruncated  # type: ignore[assignment]


def test_a_set_is_made_and_trained_on(tmp_path: Path) -> None:
    before = "test_warmup_data:judge_and_read_steps"
    job = Job(tmp_path / "data", 2, *SETTINGS, command="warmup-data", before=before)
    assert job.wait() == 0, job.output
    path = tmp_path / "data" / SET_FILE
    groups = read_groups(path)
    assert 0 < len(groups) <= 5 and f"--warmup.set {path}" in job.output
    assert all(1 <= len(group.responses) <= 2 for group in groups)
    assert all("correct answer is" not in group.query.question for group in groups), "the gold answer is in the set"
    assert all(r.correct and r.index % 2 == 0 for group in groups for r in group.responses)
    whole = path.read_bytes()
    # The same command finds everything done, on another number of ranks too.
    (tmp_path / "data" / SET_FILE).unlink()
    again = Job(tmp_path / "data", 1, *SETTINGS, command="warmup-data", before=before)
    assert again.wait() == 0, again.output
    assert path.read_bytes() == whole
    run = Job(tmp_path / "run", 1, *SETTINGS, "--warmup.set", str(path), command="warmup")
    assert run.wait() == 0, run.output
    steps = [event for event in events_of(tmp_path / "run") if event["event"] == "step"]
    epochs = 3  # of the smoke config
    assert sum(step["responses"] for step in steps) == epochs * sum(len(group.responses) for group in groups)
    groups[0].responses[0].text += "?"
    write_groups(path, groups)
    other = Job(tmp_path / "other", 1, *SETTINGS, "--warmup.set", str(path), command="warmup")
    assert other.wait() == 2 and "another tokenizer" in other.output, other.output


@pytest.mark.parametrize("path", ["missing.jsonl"])
def test_a_missing_set_is_named(path: str, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", 1, *SETTINGS, "--warmup.set", str(tmp_path / path), command="warmup")
    assert job.wait() == 2 and "there is no such file" in job.output, job.output
