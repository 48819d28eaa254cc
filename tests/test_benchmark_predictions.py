"""Files of predictions, good and odd, and what they come to under the rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_rows import load, m3cot_row, write_m3cot

from mstar_mega.cli import main
from mstar_mega.config import BenchmarkConfig
from mstar_mega.evaluation.benchmarks import find
from mstar_mega.evaluation.predictions import Prediction, Predictions, read_predictions
from mstar_mega.evaluation.problem import Rules
from mstar_mega.evaluation.scoring import score


def test_odd_predictions_are_said_and_divide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_m3cot(tmp_path / "m.jsonl", *(m3cot_row(id) for id in "abcd"))
    lines = [("a", "(B)"), ("b", "(A)"), ("b", "(B)"), ("x", "(B)")]
    predictions = tmp_path / "p.jsonl"
    predictions.write_text("".join(json.dumps({"id": id, "response": text}) + "\n" for id, text in lines))
    arguments = ["score", "--benchmark", "m3cot", "--data", str(data), "--predictions", str(predictions)]
    assert main([*arguments, "--out", str(tmp_path / "o.json")]) == 0
    said = capsys.readouterr().out
    assert "2 problems have no prediction and count as wrong (c, d)" in said
    assert "1 predictions repeat an id, of which the first counts (b)" in said and "(x)" in said
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["overall"] == {"accuracy": 0.25, "correct": 1, "total": 4}
    assert (result["missing"], result["repeated"], result["unknown"]) == (["c", "d"], ["b"], ["x"])
    assert [record["correct"] for record in result["records"]] == [True, False, False, False]
    assert main([*arguments, "--out", str(tmp_path / "o.json"), "--odd_predictions", "refuse"]) == 2
    assert "2 problems have no prediction" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{", "it is not JSON"), ("[]", "not an object"), ("{}", "no 'id'"), ('{"id": 1}', "neither"),
     ('{"id": 1, "response": 7}', "not text"), ('{"id": true, "response": ""}', "no 'id'")],
)  # fmt: skip
def test_bad_predictions_are_refused(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "response": "B"}\n' + line + "\n")
    with pytest.raises(ValueError, match="p.jsonl, row 2") as caught:
        read_predictions(path)
    assert reason in str(caught.value)


def test_reward_rules_marker_and_judge(tmp_path: Path) -> None:
    data = write_m3cot(tmp_path / "m.jsonl", m3cot_row("a", choices=["1/2", "7"]))
    problems = load("m3cot", data).problems

    def verdict(response: str, rules: Rules) -> bool:
        return score(find("m3cot"), problems, Predictions({"a": Prediction("a", response)}), rules).records[0].correct

    marked = "(A) is wrong.\n\n# Answer\n\n7.0"
    reward, official = Rules(BenchmarkConfig(rules="reward")), Rules(BenchmarkConfig())
    assert verdict(marked, reward) and not verdict("(B)", reward), "no answer block, no reward"
    assert not verdict(marked, official) and not verdict("no idea", official)
    assert verdict("(A)?\n\n# Answer\n\n(B)", Rules(BenchmarkConfig(marker=True)))
    assert verdict("no idea", Rules(BenchmarkConfig(), judge=lambda problem, response: "B"))
    with pytest.raises(ValueError, match="no reduced set"):
        load("m3cot", data, reduced=True)
    with pytest.raises(ValueError, match="choose one of mathvista"):
        find("mmmu")


def test_a_prediction_that_says_two_things_or_half_a_character_is_refused(tmp_path: Path) -> None:
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text('{"id": "1", "response": "a", "response": "b"}\n')
    with pytest.raises(ValueError, match="row 1: the key 'response' stands twice"):
        read_predictions(predictions)
    predictions.write_text('[{"id": "0", "response": ""}, {"id": "1", "response": "a", "response": "b"}]')
    with pytest.raises(ValueError, match="row 2: the key 'response' stands twice"):
        read_predictions(predictions)
    predictions.write_text('{"id": "1", "response": "cut \\ud83d"}\n')
    with pytest.raises(ValueError, match="row 1: its 'response' has half a character"):
        read_predictions(predictions)


def mmbench(path: Path, *rows: tuple[int, str]) -> Path:
    """Rows (index, answer) of questions with the options A and B."""
    lines = [f"{index}\tq\tx\ty\t{answer}\tocr\tlogic_reasoning\n" for index, answer in rows]
    path.write_text("index\tquestion\tA\tB\tanswer\tcategory\tl2-category\n" + "".join(lines))
    return path


def test_a_question_counts_only_with_all_its_rotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = mmbench(tmp_path / "whole.tsv", (1, "A"), (1_000_001, "B"), (2, "A"), (1_000_002, "B"))
    assert len(load("mmbench", whole).problems) == 4 and not load("mmbench", whole).notes
    cut = mmbench(tmp_path / "cut.tsv", (1, "A"), (1_000_001, "B"), (2, "A"), (1_000_002, "C"))
    with pytest.raises(ValueError, match="question 2 has 1 of its 2 rotations"):
        load("mmbench", mmbench(tmp_path / "lost.tsv", (1, "A"), (1_000_001, "B"), (2, "A")))
    loaded = load("mmbench", cut, bad_rows="skip")
    assert [problem.id for problem in loaded.problems] == ["1", "1000001"] and len(loaded.skipped) == 2
    predictions = tmp_path / "predictions.jsonl"
    answers = {"1": "A", "1000001": "B", "2": "A", "1000002": "B"}
    predictions.write_text("".join(json.dumps({"id": id, "extraction": a}) + "\n" for id, a in answers.items()))
    files = ["--predictions", str(predictions), "--out", str(tmp_path / "s.json")]
    arguments = ["score", "--benchmark", "mmbench", *files]
    assert main([*arguments, "--data", str(cut), "--bad_rows", "skip"]) == 0
    said = capsys.readouterr().out
    assert "(1 of 1)" in said and "of no problem" not in said, "a skipped row is known"
    once = mmbench(tmp_path / "once.tsv", (1, "A"), (2, "A"))
    assert main([*arguments, "--data", str(once)]) == 0
    assert "this is one pass, not the circular accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["notes"]


def test_scores_do_not_go_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_m3cot(tmp_path / "m3cot.jsonl", m3cot_row("1"))
    arguments = ["score", "--benchmark", "m3cot", "--data", str(data), "--predictions", str(data)]
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
