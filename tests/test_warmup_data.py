"""A warm-up set made by a tiny policy of its own gold answers, and a warm-up that trains on it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from jobs import Job, events_of

from mstar_mega.data.prompts import ANSWER_MARKER, Template
from mstar_mega.data.records import read_groups
from mstar_mega.data.types import ImageRef, Query, Response, Step, Task
from mstar_mega.data.written_out import with_written_out, write
from mstar_mega.recipe import rollouts
from mstar_mega.recipe.warmup_data import SET_FILE, kept_responses, with_gold_answer
from mstar_mega.rewards.reward import Judged

SETTINGS = [
    *("--data.warmup_examples", "20", "--data.labelled_queries", "6", "--data.unlabelled_queries", "1"),
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
    """Untrained policies write no steps and no answer: give each response two and one, and call every second right."""
    rollouts.judge_response = lambda query, response, *_: Judged(response.index % 2 == 0, "exact")
    split = rollouts.split_steps

    def two(tokens: list[int], offsets: list[int], text: str) -> list[Step]:
        return split(tokens, offsets, text) * 2

    rollouts.split_steps = two  # type: ignore[assignment]
    plain = rollouts.to_response

    def untruncated(*arguments: object) -> Response:
        made = plain(*arguments)  # type: ignore[arg-type]
        made.truncated, made.text = False, f"{made.text}\n\n{ANSWER_MARKER}\n\n1"
        return made

    rollouts.to_response = untruncated  # type: ignore[assignment]


def test_a_set_is_made_and_trained_on(tmp_path: Path) -> None:
    before = "test_warmup_data:judge_and_read_steps"
    path = tmp_path / "data" / SET_FILE
    # A config may name the file before it is there.
    named = ("--data.warmup_file", str(path))
    job = Job(tmp_path / "data", 2, *SETTINGS, *named, command="warmup-data", before=before)
    assert job.wait() == 0, job.output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ids = Counter(row["id"] for row in rows)
    assert 0 < len(ids) <= 5 and max(ids.values()) <= 2 and f"--data.warmup_file {path}" in job.output
    blocks = (tmp_path / "data").rglob("block_*")
    drawn = {(g.query.id, r.text) for file in blocks for g in read_groups(file) for r in g.responses if r.correct}
    assert {(row["id"], row["response"]) for row in rows} <= drawn
    whole = path.read_bytes()
    # The same command finds everything done, on another number of ranks too.
    (tmp_path / "data" / SET_FILE).unlink()
    again = Job(tmp_path / "data", 1, *SETTINGS, command="warmup-data", before=before)
    assert again.wait() == 0, again.output
    assert path.read_bytes() == whole
    run = Job(tmp_path / "run", 1, *SETTINGS, "--data.warmup_file", str(path), command="warmup")
    assert run.wait() == 0, run.output
    steps = [event for event in events_of(tmp_path / "run") if event["event"] == "step"]
    epochs = 3  # of the smoke config
    assert sum(step["responses"] for step in steps) == epochs * len(rows)
    other = Job(tmp_path / "other", 1, *SETTINGS, "--data.warmup_file", str(path), "--seed", "9", command="warmup")
    assert other.wait() == 2 and "made for another set, or another seed" in other.output, other.output
    path.write_text(path.read_text().replace("# Answer", "# answer"))
    again = Job(tmp_path / "run", 1, *SETTINGS, "--data.warmup_file", str(path), command="warmup")
    assert again.wait() == 2 and f"data.warmup_file {path} is not the file that" in again.output, again.output


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.jsonl"
    job = Job(tmp_path / "run", 1, *SETTINGS, "--data.warmup_file", str(path), command="warmup")
    assert job.wait() == 2 and f"data.warmup_file {path}: there is no such file" in job.output, job.output


def test_a_file_of_responses_for_a_set_in_memory(tmp_path: Path) -> None:
    queries = {id: Query(id, "q", (ImageRef(f"{id}.png", id),), "1") for id in ("a", "b", "c")}
    task = Task([(queries["c"], "old")], [queries["a"]], [], [queries["b"]], [])
    path = tmp_path / "set.jsonl"
    good = f"r\n\n{ANSWER_MARKER}\n\n1"
    texts = [("a", good), ("b", good), ("c", good), ("a", "\n\u2028"), ("a", f"2{good}"), ("a", f"3{good}")]
    write(path, [(queries[id], text) for id, text in texts])
    found = with_written_out(task, path, Template(("{question}",)), 2)
    assert found.warmup == [(queries["a"], good), (queries["a"], f"2{good}")], "at most so many"
    assert [each.what for each in found.skipped] == ['row 2 (id "b")', 'row 3 (id "c")', 'row 4 (id "a")']
    assert "validation split" in found.skipped[0].reason and "warm-up split" in found.skipped[1].reason
