"""``mstar evaluate --benchmark``: a policy is asked, killed, resumed, on other layouts, and scored."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jobs import Job
from PIL import Image
from tiny_families import make_model_directory

from mstar_mega import cli
from mstar_mega.config import BenchmarkConfig
from mstar_mega.data.types import Group, Query, Response
from mstar_mega.evaluation.benchmarks import find, load_problems
from mstar_mega.evaluation.predictions import Prediction, read_predictions
from mstar_mega.evaluation.problem import Problem, Rules
from mstar_mega.evaluation.scoring import read, score
from mstar_mega.recipe.benchmark import candidate, first, sample_measures
from mstar_mega.rewards.checker import AnswerChecker


def picture(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_mmbench(path: Path, questions: int) -> None:
    """Two options each, so two rotations; the rotated row refers to the other one's image."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "question", "A", "B", "answer", "category", "image", "l2-category", "split"])
        for i in range(1, questions + 1):
            image = base64.b64encode(picture(i)).decode()
            table.writerow([i, f"which {i}?", "3", "7", "A", "ocr", image, "coarse_perception", "dev"])
            table.writerow([i + 1_000_000, f"which {i}?", "7", "3", "B", "ocr", i, "coarse_perception", "dev"])


def predictions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("policy") / "run"
    job = Job(run_dir, 1, "--data.warmup_examples", "64", "--warmup.epochs", "1", command="warmup")
    assert job.wait() == 0, job.output
    return run_dir


def evaluate(policy: Path, data: Path, out: Path, world_size: int, *extra: str) -> Job:
    arguments = ["--checkpoint", policy, "--benchmark", "mmbench", "--data", data, "--out", out]
    settings = ["--generation.max_new_tokens", "12", "--data.warmup_examples", "64", "--warmup.epochs", "1"]
    settings += ["--generation.queries_per_block", "2", "--data.instruct", "false"]
    return Job(policy, world_size, *map(str, arguments), *settings, *extra, command="evaluate")


def test_a_killed_evaluation_goes_on_and_every_layout_draws_the_same(policy: Path, tmp_path: Path) -> None:
    data = tmp_path / "mmbench.tsv"
    write_mmbench(data, 5)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    sampling = ("--limit", "4", "--responses", "2")
    job = evaluate(policy, data, straight, 2, *sampling, "--parallel.tensor", "2")
    assert job.wait() == 0, job.output

    job = evaluate(policy, data, killed, 1, *sampling)
    assert job.run_until(lambda _: bool(list(killed.rglob("block_*.jsonl"))))
    job.kill()
    blocks = {path: path.stat().st_mtime_ns for path in killed.rglob("block_*.jsonl")}
    assert blocks and not (killed / "scores.json").exists()
    job = evaluate(policy, data, killed, 1, *sampling)
    assert job.wait() == 0, job.output
    assert {path: path.stat().st_mtime_ns for path in blocks} == blocks, "finished blocks are not drawn again"

    rows = predictions(straight)
    assert [row["response"] for row in rows] == [row["response"] for row in predictions(killed)]
    assert [(row["id"], row["sample"]) for row in rows[:4]] == [("1", 0), ("1", 1), ("1000001", 0), ("1000001", 1)]
    scores = json.loads((straight / "scores.json").read_text())
    assert scores["overall"]["total"] == 4 and len(scores["records"]) == 8 and len(rows) == 16
    assert set(scores["samples"]["pass_at_k"]) == {"1", "2"}
    assert scores["groups"]["table"]["CP"]["total"] == 4

    again = score(
        find("mmbench"),
        first(load_problems(find("mmbench"), data, BenchmarkConfig()).problems, 4),
        read_predictions(straight / "predictions.jsonl"),
        Rules(BenchmarkConfig(marker=True)),
    )
    assert again.overall.to_json() == scores["overall"], "predictions.jsonl is what `mstar score` reads"

    assert all("extraction" not in row for row in rows), "other rules than these would score that, not the response"
    assert scores["evaluated"]["limit"] == 4 and list(scores["evaluated"]["data_sha256"]) == ["mmbench.tsv"]

    kept = (killed / "scores.json").read_bytes()
    job = evaluate(policy, data, killed, 1, "--limit", "4")
    assert job.wait() == 2 and "has the scores of another evaluation (responses 2, now 1)" in job.output, job.output
    assert (killed / "scores.json").read_bytes() == kept

    page = (straight / "index.html").read_text()
    assert "only the first 4 questions" in page
    assert "http" not in re.sub(r"http-equiv", "", page), "self-contained"
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    shown = json.loads(found[1])
    assert len(shown["questions"]) == 8 and len(shown["images"]) == 4
    assert shown["questions"][0]["responses"][0]["text"] == rows[0]["response"]


def test_a_converted_checkpoint_is_evaluated(tmp_path: Path) -> None:
    hf = make_model_directory("minicpm_v2_5", tmp_path / "hf")
    cli.main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "checkpoint")])
    data = tmp_path / "mmbench.tsv"
    write_mmbench(data, 2)
    arguments = ["--checkpoint", str(tmp_path / "checkpoint"), "--benchmark", "mmbench", "--data", str(data)]
    for place, ranks, extra in (("one", 1, []), ("two", 2, ["--parallel.tensor", "2"])):
        out = ["--out", str(tmp_path / place), "--generation.max_new_tokens", "6", *extra]
        job = Job(tmp_path / place, ranks, *arguments, *out, command="evaluate")
        assert job.wait() == 0, job.output
    assert len(predictions(tmp_path / "one")) == 4 and predictions(tmp_path / "one") == predictions(tmp_path / "two")
    job = Job(tmp_path, 1, *arguments[:1], str(hf), *arguments[2:], "--out", str(tmp_path / "no"), command="evaluate")
    assert job.wait() == 2 and "neither a run directory" in job.output


def test_missing_images_are_refused_and_counted_when_allowed(policy: Path, tmp_path: Path) -> None:
    data = tmp_path / "mmbench.tsv"
    write_mmbench(data, 2)
    data.write_text(re.sub(r"\t2\tcoarse", "\tnone.png\tcoarse", data.read_text()))
    job = evaluate(policy, data, tmp_path / "out", 1)
    assert job.wait() == 2
    assert "1 of 4 problems have no usable image" in job.output and "mmbench.tsv, row 4" in job.output
    job = evaluate(policy, data, tmp_path / "out", 1, "--without_image", "ask")
    assert job.wait() == 0, job.output
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert [each["what"] for each in scores["without_image"]] == ["problem 1000002"]
    assert scores["overall"]["total"] == 2


@pytest.mark.parametrize(
    ("name", "problem", "response", "answer"),
    [
        ("m3cot", Problem("1", "q", {"A": "x", "B": "y"}, "B"), "no idea", None),
        ("m3cot", Problem("1", "q", {"A": "x", "B": "y"}, "B"), "it is (B)", "B"),
        ("mmbench", Problem("1", "q", {"A": "x", "B": "y"}, "B"), "Sorry, I can't help with images", None),
        ("mathvista", Problem("1", "q", {}, "7", "integer"), "# Answer\n\nN/A", None),
        ("mathvista", Problem("1", "q", {}, "7", "integer"), "# Answer\n\n7", "7"),
    ],
)
def test_what_is_no_answer_does_not_vote(name: str, problem: Problem, response: str, answer: str | None) -> None:
    rules = Rules(BenchmarkConfig(marker=True))
    with AnswerChecker() as checker:
        reading = read(find(name), problem, Prediction("1", response), rules, checker)
    assert candidate(problem, reading, rules) == answer


def test_ways_to_choose_among_responses() -> None:
    def group(id: str, *responses: tuple[str, bool, float]) -> Group:
        made = [
            Response(i, [], answer, answer=answer, correct=correct, score=value)
            for i, (answer, correct, value) in enumerate(responses)
        ]
        return Group(Query(id, "q", (), "A", ("x", "y")), made)

    groups = [
        group("1", ("B", False, 0.2), ("B", False, 0.2), ("A", True, 0.9)),
        group("2", ("A", True, 0.5), ("A", True, 0.5), ("B", False, 0.8)),
    ]
    problems = [Problem(id, "q", {"A": "x", "B": "y"}, "A", groups={"l3": ("ocr",)}) for id in ("1", "2")]
    measured = sample_measures(problems, groups)
    assert {name: measured[name]["overall"]["correct"] for name in ("majority_vote", "best_of_n", "weighted_vote")} == {
        "majority_vote": 1,
        "best_of_n": 1,
        "weighted_vote": 2,
    }
    assert measured["pass_at_k"]["3"] == 1.0 and measured["pass_at_k"]["1"] == pytest.approx(0.5)
    for each in (response for group in groups for response in group.responses):
        each.score = None
    assert "best_of_n" not in sample_measures(problems, groups)
