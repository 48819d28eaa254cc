"""MMBench questions with an empty option between others are asked, and scored, with the options that they have."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mstar_mega.cli import main
from mstar_mega.config import BenchmarkConfig
from mstar_mega.data.types import Group, Response
from mstar_mega.evaluation.benchmarks import find, load_problems
from mstar_mega.evaluation.problem import Rules
from mstar_mega.evaluation.scoring import Prediction, read
from mstar_mega.recipe.benchmark import Request, prepare, sample_measures
from mstar_mega.rewards.checker import AnswerChecker

TEXTS = ("red", "blue", "", "green")
"""Blue is right; something that reads the text None as nothing has emptied C."""


def rotated(index: int, by: int, texts: Sequence[str] = TEXTS, gold: str = "blue") -> list[object]:
    turned = [texts[(place - by) % len(texts)] for place in range(len(texts))]
    return [index + by * 1_000_000, "which?", *turned, "ABCD"[turned.index(gold)], "ocr"]


def write(path: Path, *rows: list[object]) -> Path:
    image = io.BytesIO()
    Image.new("RGB", (24, 16)).save(image, "PNG")
    cell = base64.b64encode(image.getvalue()).decode()
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "question", "A", "B", "C", "D", "answer", "category", "image"])
        table.writerows([*row, cell] for row in rows)
    return path


def request(data: Path, out: Path) -> Request:
    return Request(out / "none", "mmbench", data, out, None, BenchmarkConfig())


def test_the_policy_is_asked_with_the_options_that_there_are(tmp_path: Path) -> None:
    data = write(tmp_path / "a.tsv", *(rotated(7, by) for by in range(4)), [8, "q?", "x", "y", "", "", "A", "ocr"],
                 [1_000_008, "q?", "y", "x", "", "", "B", "ocr"])  # fmt: skip
    asked = prepare(find("mmbench"), request(data, tmp_path), instruct=False)
    shown = "\nOptions:\nA. red\nB. blue\nD. green\nPlease select the correct answer from the options above."
    assert asked.queries[0].question.endswith(shown)
    assert [query.answer for query in asked.queries] == ["B", "C", "D", "A", "A", "B"]
    assert [query.choices for query in asked.queries[:2]] == [TEXTS, ("green", "red", "blue")]
    assert len(asked.notes) == 1 and "3 rows have no text for an option" in asked.notes[0]
    assert "a.tsv, row 1: A, B, D" in asked.notes[0], "a rotation with the empty option last has no gap"


def test_every_rule_and_vote_reads_the_letters_as_they_are_shown(tmp_path: Path) -> None:
    data = write(tmp_path / "a.tsv", rotated(7, 0, gold="green"))
    asked = prepare(find("mmbench"), request(data, tmp_path), instruct=False)
    problem, query = asked.problems[0], asked.queries[0]
    with AnswerChecker() as checker:
        for rules in ("official", "vlmevalkit", "reward"):
            for answer, right in (("D", True), ("green", True), ("C", False), ("blue", False)):
                prediction = Prediction("7", f"So.\n\n# Answer\n\n{answer}")
                marked = Rules(BenchmarkConfig(rules=rules, marker=True))
                assert read(find("mmbench"), problem, prediction, marked, checker).correct == right
        assert checker.check("green", "D", query.choices).correct
    answers = ("blue", "D", "green")
    responses = [Response(i, [], "", answer=answer, correct=i > 0) for i, answer in enumerate(answers)]
    measures = sample_measures(asked.problems, [Group(query, responses)])
    assert measures["majority_vote"]["overall"]["correct"] == 1, "D and green are one vote"


@pytest.mark.parametrize("by", range(4))
def test_a_lost_rotation_is_still_noticed(tmp_path: Path, by: int) -> None:
    rows = [rotated(7, each) for each in range(4) if each != by]
    with pytest.raises(ValueError, match="question 7 has 3 of its 4 rotations"):
        load_problems(find("mmbench"), write(tmp_path / "a.tsv", *rows), BenchmarkConfig())


def test_an_option_that_no_rotation_has(tmp_path: Path) -> None:
    rows = [
        [7, "q", "x", "y", "", "z", "A", "ocr"],
        [1_000_007, "q", "z", "x", "", "y", "B", "ocr"],
        [2_000_007, "q", "y", "z", "", "x", "D", "ocr"],
    ]
    data = write(tmp_path / "a.tsv", *rows)
    assert len(load_problems(find("mmbench"), data, BenchmarkConfig()).problems) == 3
    predictions, out = tmp_path / "p.jsonl", tmp_path / "s.json"
    answers = {"7": "A", "1000007": "B", "2000007": "D"}
    predictions.write_text("".join(json.dumps({"id": id, "response": text}) + "\n" for id, text in answers.items()))
    files = ["--data", str(data), "--predictions", str(predictions), "--out", str(out)]
    assert main(["score", "--benchmark", "mmbench", *files]) == 0
    result = json.loads(out.read_text())
    assert result["overall"]["correct"] == 1 and "3 rows have no text" in result["notes"][0]
    with pytest.raises(ValueError, match="question 7 has 2 of its 3 rotations"):
        load_problems(find("mmbench"), write(tmp_path / "b.tsv", *rows[:2]), BenchmarkConfig())
