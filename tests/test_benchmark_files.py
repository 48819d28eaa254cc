"""Benchmark files as they are distributed, good and bad, and files of predictions."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from published import BENCHMARKS, VECTORS, lines, needs_data
from pyarrow import parquet

from mstar_mega.cli import main
from mstar_mega.config import BenchmarkConfig
from mstar_mega.data.screen import readable_image
from mstar_mega.evaluation.asking import ask, prompt_text
from mstar_mega.evaluation.benchmarks import find, load_problems
from mstar_mega.evaluation.load import Loaded
from mstar_mega.evaluation.problem import Rules
from mstar_mega.evaluation.scoring import Prediction, Predictions, read_predictions, score


def load(name: str, path: Path, **settings: Any) -> Loaded:
    return load_problems(find(name), path, BenchmarkConfig(**settings))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def m3cot_row(id: str, **changes: Any) -> dict[str, Any]:
    row = {"id": id, "question": "q?", "choices": ["None", "nan"], "context": "", "answer": "B", "domain": "science"}
    return row | {"topic": "theory", "image": {"bytes": png(), "path": f"{id}.png"}} | changes


def write_m3cot(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row | {"image": None}) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------- genuine files


@needs_data
def test_mathvistas_prompts_are_its_own() -> None:
    wanted = json.loads((BENCHMARKS / "mathvista/query.json").read_bytes())
    for file in ("testmini.json", "MathVista_MINI_noimage.tsv"):
        problems = load("mathvista", BENCHMARKS / "mathvista" / file).problems
        assert len(problems) == 1000
        for problem in problems:
            ours, theirs = prompt_text("mathvista", problem, instruct=False), wanted[problem.id]
            assert ours.replace("\r\n", "\n") == theirs.replace("\r\n", "\n"), problem.id
    asked = prompt_text("mathvista", problems[0], instruct=True)
    assert asked.startswith(ours[:4]) and "# Answer" in asked


@needs_data
def test_m3cots_prompts_are_those_of_its_published_outputs() -> None:
    known = {problem.id: problem for problem in load("m3cot", BENCHMARKS / "m3cot/test.jsonl").problems}
    compared, others = 0, []
    for row in lines(VECTORS / "m3cot.jsonl"):
        if "<QUESTION>" in row["prompt"]:  # two of the settings wrap the question again
            continue
        problem = replace(known[row["qid"]], options=dict(zip("ABCDEF", row["choices"], strict=False)))
        ours, theirs = prompt_text("m3cot", problem, instruct=False), row["prompt"]
        compared += 1
        if not (theirs.startswith(ours) and "(" not in theirs[len(ours) :]):  # behind it only an instruction
            others.append(row["id"])
    assert compared == 202 and others == ["llava-13b/dsp#social-commonsense-723"], "a choice has lost its full stop"


@needs_data
def test_mathvistas_json_and_tsv_hold_the_same_problems() -> None:
    first, second = (
        {p.id: p for p in load("mathvista", BENCHMARKS / "mathvista" / file).problems}
        for file in ("testmini.json", "MathVista_MINI_noimage.tsv")
    )
    for id, problem in first.items():
        other = second[id]
        for name in ("options", "answer", "answer_type", "precision", "groups"):
            assert getattr(problem, name) == getattr(other, name), (id, name)


@needs_data
def test_mmstars_two_layouts_ask_the_same() -> None:
    table = {problem.id: problem for problem in load("mmstar", BENCHMARKS / "mmstar/MMStar_noimage.tsv").problems}
    listed = load("mmstar", BENCHMARKS / "mmstar/mmstar_all_text.jsonl").problems
    same = [prompt_text("mmstar", p, False) == prompt_text("mmstar", table[p.id], False) for p in listed]
    assert sum(same) == 1148, "the others write their choices in lines"
    assert all(
        not p.options or p.options == table[p.id].options for p, is_same in zip(listed, same, strict=True) if is_same
    )
    assert len(load("mmstar", BENCHMARKS / "mmstar/MMStar_noimage.tsv", reduced=True).problems) == 1000


@needs_data
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("mmbench", "mmbench/MMBench_DEV_EN_sample.tsv", 78),
        ("mmbench", "mmbench/MMBench_DEV_CN_sample.tsv", 78),
        ("mmbench", "mmbench/CCBench_sample.tsv", 56),
        ("m3cot", "m3cot/test-sample.parquet", 45),
    ],
)
def test_images_inside_genuine_files(name: str, file: str, count: int, tmp_path: Path) -> None:
    loaded = load(name, BENCHMARKS / file)
    asked = ask(name, loaded.problems, BENCHMARKS / file, tmp_path, BenchmarkConfig(), instruct=True)
    assert len(asked.queries) == count and not asked.without_image
    for problem, query in zip(asked.problems, asked.queries, strict=True):
        assert Path(query.images[0].path).parent == tmp_path / "images"
        if problem.circle and problem.circle != problem.id:  # a rotation refers to its first row's image
            first = next(other for other in asked.queries if other.id == problem.circle)
            assert query.images == first.images and query.question != first.question


@needs_data
def test_ai2d_rows() -> None:
    problems = load("ai2d", BENCHMARKS / "ai2d/AI2D_rows_from_MMStar_noimage.tsv").problems
    assert len(problems) == 196 and prompt_text("ai2d", problems[0], False).endswith("from the options above.")


@needs_data
def test_m3cots_images_beside_its_jsonl(tmp_path: Path) -> None:
    problems = [
        problem
        for problem in load("m3cot", BENCHMARKS / "m3cot/test.jsonl").problems
        if (BENCHMARKS / f"m3cot/images/{problem.id}.png").exists()
    ][:20]
    asked = ask("m3cot", problems, BENCHMARKS / "m3cot/test.jsonl", tmp_path, BenchmarkConfig(), instruct=False)
    assert len(asked.queries) == 20 and not (tmp_path / "images").exists()


@needs_data
def test_mathvistas_parquet(tmp_path: Path) -> None:
    rows = list(json.loads((BENCHMARKS / "mathvista/testmini.json").read_bytes()).values())[:30]
    queries = json.loads((BENCHMARKS / "mathvista/query.json").read_bytes())
    wanted = {problem.id: problem for problem in load("mathvista", BENCHMARKS / "mathvista/testmini.json").problems}
    path = tmp_path / "testmini.parquet"
    image = {"bytes": png(), "path": None}
    table = [row | {"decoded_image": image, "query": queries[row["pid"]]} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    problems = load("mathvista", path).problems
    asked = ask("mathvista", problems, path, tmp_path, BenchmarkConfig(), instruct=False)
    for problem, query in zip(asked.problems, asked.queries, strict=True):
        for name in ("options", "answer", "answer_type", "precision", "groups"):
            assert getattr(problem, name) == getattr(wanted[problem.id], name)
        assert query.question == queries[problem.id] and query.images


# ------------------------------------------------------------------------------------------------------- bad files


def test_options_called_none_and_nan_are_options(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("index\tquestion\tA\tB\tC\tanswer\tcategory\n1\tq\tNone\tnan\t\tB\tx\n")
    (problem,) = load("ai2d", path).problems
    assert problem.options == {"A": "None", "B": "nan"}
    path = write_m3cot(tmp_path / "m.jsonl", m3cot_row("a"))
    assert list(load("m3cot", path).problems[0].options.values()) == ["None", "nan"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (m3cot_row("a"), "id: 'a' stands in"),
        (m3cot_row("b", answer="C"), "answer: it is 'C', not one of the options A, B"),
        (m3cot_row("b", answer=None), "answer: it is empty"),
        (m3cot_row("b", question=" "), "question: it is empty"),
        (m3cot_row("b", question=["q"]), "question: it is a list, not text"),
        (m3cot_row("b", choices="[["), "choices: it is not a list"),
        (m3cot_row("b", choices=["x"] * 27), "choices: 27 choices are more than"),
        (m3cot_row("b", choices="[" * 60_000), "choices: it is not a list"),
        ({"id": "b"}, "no such column"),
    ],
)
def test_bad_rows_are_named_refused_or_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = write_m3cot(tmp_path / "m.jsonl", m3cot_row("a"), row)
    with pytest.raises(ValueError, match="1 rows cannot be used") as caught:
        load("m3cot", path)
    assert f"{path}, row 2: " in str(caught.value) and reason in str(caught.value)
    loaded = load("m3cot", path, bad_rows="skip")
    assert len(loaded.problems) == 1 and reason in loaded.skipped[0].reason and loaded.skipped[0].what == "row 2"


HEAD = b"index\tquestion\tA\tB\tanswer\tcategory\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (HEAD + b"1\tq\tx\ty\tA\tc\n2\tq\xff\tx\ty\tA\tc\n", "column 'question' is not UTF-8"),
        (HEAD + b"1\tq\tx\ty\tA\tc\n2\tq\tx\n", "it ends before the column 'B'"),
        (HEAD + b"1\tq\tx\ty\tA\tc\n2\tq\tx\ty\tA\tc\tmore\n", "more cells than there are columns"),
        (b"\xff\xfe" + HEAD, "UTF-16"),
        (HEAD, "no problem that can be used"),
    ],
)
def test_bad_tables(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.tsv") as caught:
        load("ai2d", path)
    assert reason in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    for name, content, reason in [
        ("a.parquet", b"PAR1junk", "no readable parquet"),
        ("a.json", b'{"1": {"pid": "1"}, "1": {}}', "a.json: the key '1' stands twice"),
        ("a.jsonl", b'{"id": \n', "it is not JSON"),
        ("a.xlsx", b"", "not from '.xlsx'"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            load("mathvista", tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        load("mathvista", tmp_path / "none.json")


def test_images_that_cannot_be_had(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    images = {
        "good": {"bytes": png(), "path": "x"},
        "bomb": {"bytes": bomb, "path": "x"},
        "broken": {"bytes": png()[:40], "path": "x"},
        "outside": {"bytes": None, "path": "../../etc/passwd"},
        "absent": None,
    }
    path = tmp_path / "m.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([m3cot_row(id, image=image) for id, image in images.items()]), path)
    problems = load("m3cot", path).problems
    with pytest.raises(ValueError, match="4 of 5 problems have no usable image"):
        ask("m3cot", problems, path, tmp_path, BenchmarkConfig(), instruct=False)
    asked = ask("m3cot", problems, path, tmp_path, BenchmarkConfig(without_image="ask"), instruct=False)
    assert [len(query.images) for query in asked.queries] == [1, 0, 0, 0, 0]
    reasons = {each.what: each.reason for each in asked.without_image}
    assert "decompression bomb" in reasons["problem bomb"] and "leads out of the folder" in reasons["problem outside"]


def test_a_reference_to_a_row_without_image(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    image = base64.b64encode(png()).decode()
    rows = [("1", image), ("2", "1"), ("3", "9"), ("4", "3")]
    path.write_bytes(HEAD[:-1] + b"\timage\n" + "".join(f"{i}\tq\tx\ty\tA\tc\t{cell}\n" for i, cell in rows).encode())
    problems = load("ai2d", path).problems
    assert problems[1].picture == problems[0].picture
    asked = ask("ai2d", problems, path, tmp_path, BenchmarkConfig(without_image="ask"), instruct=False)
    assert [each.what for each in asked.without_image] == ["problem 3", "problem 4"]


# ----------------------------------------------------------------------------------------------------- predictions


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


# -------------------------------------------------------------------------------------------------- whole circles


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


# ------------------------------------------------------------------------------------------- what is said twice, or odd


def test_what_stands_twice_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "twice.tsv"
    table.write_text("index\tanswer\tanswer\n1\tA\tB\n")
    with pytest.raises(ValueError, match="the column 'answer' stands twice"):
        load("mmbench", table)
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


def test_another_file_of_the_benchmark_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "query.json").write_text('{\n"1": "Hint: ...",\n"2": "Hint: ..."\n}\n')
    with pytest.raises(ValueError, match="query.json is an object, but its values are not problems"):
        load("mathvista", tmp_path)


MATHVISTA: dict[str, Any] = {
    "pid": "1", "question": "q", "answer": "7", "answer_type": "integer", "question_type": "free_form", "choices": None,
    "precision": None, "unit": None, "task": "t", "category": "c", "context": "x", "grade": "g", "language": "english",
    "source": "s", "skills": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question_type": "multi-choice"}, "question_type: it is 'multi-choice', not one of multi_choice, free_form"),
        ({"answer": "abc"}, "answer: it is 'abc', no integer"),
        ({"answer_type": "float", "answer": "zz", "precision": 1}, "answer: it is 'zz', no float"),
        ({"answer_type": "float", "answer": "1.5"}, "precision: it is None"),
        ({"answer_type": "float", "answer": "1.5", "precision": 1e9}, "precision: it is 1000000000"),
    ],
)
def test_mathvistas_rows_that_nothing_could_answer(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "testmini.json"
    path.write_text(json.dumps([MATHVISTA]))
    assert len(load("mathvista", path).problems) == 1
    path.write_text(json.dumps([MATHVISTA | change]))
    with pytest.raises(ValueError, match=reason):
        load("mathvista", path)


def test_a_jpeg_that_lies_about_its_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 50), (9, 90, 200)).save(buffer, "JPEG")
    content = buffer.getvalue()
    assert readable_image(content) == (50, 50)
    header = content.index(b"\xff\xc0") + 5
    with pytest.raises(ValueError, match="announces 7000 x 7000 pixels"):
        readable_image(content[:header] + struct.pack(">HH", 7000, 7000) + content[header + 4 :])
    for one in (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"nothing"):
        with pytest.raises(ValueError, match="it is no image of the kinds JPEG, PNG"):
            readable_image(one)


def test_scores_do_not_go_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_m3cot(tmp_path / "m3cot.jsonl", m3cot_row("1"))
    arguments = ["score", "--benchmark", "m3cot", "--data", str(data), "--predictions", str(data)]
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
