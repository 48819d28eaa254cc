"""Benchmark files, predictions and training rows in the forms in which people really have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pytest
from benchmark_rows import load
from pyarrow import parquet

from mstar_mega.data.mathv360k import Question, parse_row
from mstar_mega.data.rows import RowProblem, read_rows
from mstar_mega.evaluation import mmstar
from mstar_mega.evaluation.files import read_cells
from mstar_mega.evaluation.predictions import Prediction, read_predictions

MMSTAR = Path(__file__).parents[2] / "shared/data/benchmarks/mmstar/mmstar_all_text.jsonl"
HINT = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"


def test_mmstar_from_the_hub_with_options_under_no_heading(tmp_path: Path) -> None:
    rows = [
        {
            "index": index, "question": f"{HINT}Question: How many (A) marks?{listed}", "image": b"x", "answer": "B",
            "category": "math", "l2_category": "geometry", "meta_info": {"source": "MathVista", "split": "testmini"},
        }
        for index, listed in enumerate(
            ("\n(A) 54\n(B) 2.5\n(C) 7", "\nChoices:\n(A) 54\n(B) 2.5\n(C) 7", "\nOptions: A: 54, B: 2.5, C: 7")
        )
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "val.parquet")
    for problem in load("mmstar", tmp_path / "val.parquet").problems:
        assert problem.options == {"A": "54", "B": "2.5", "C": "7"} and problem.picture is not None
    assert mmstar.options_inside("Question: Is (A) larger?\n(A) only") == {}
    assert mmstar.options_inside("What is it?\nA. a cat\nB. a dog") == {"A": "a cat", "B": "a dog"}


@pytest.mark.skipif(not MMSTAR.exists(), reason="needs the genuine MMStar texts in ../shared")
def test_every_genuine_mmstar_question_has_its_options() -> None:
    rows = [json.loads(line) for line in MMSTAR.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1500
    assert [row["index"] for row in rows if row["answer"] not in mmstar.options_inside(row["question"])] == []


def test_ai2d_parquet_has_a_list_of_options_and_the_answers_place(tmp_path: Path) -> None:
    for part in range(2):
        rows = [
            {"question": f"Which {i}?", "options": ["4", "3", "2", "1"], "answer": str(i), "image": {"bytes": b"x"}}
            for i in range(3)
        ]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"test-0000{part}-of-00002.parquet")
    problems = load("ai2d", tmp_path).problems
    assert [problem.id for problem in problems] == ["0", "1", "2", "3", "4", "5"]
    assert [problem.answer for problem in problems] == ["A", "B", "C"] * 2
    assert problems[0].options == {"A": "4", "B": "3", "C": "2", "D": "1"}
    parquet.write_table(pa.Table.from_pylist([{**rows[0], "answer": "4"}]), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad.parquet.*it is '4', not one of the options A, B, C, D"):
        load("ai2d", tmp_path / "bad.parquet")


def test_mmbench_parquet_of_lmms_lab(tmp_path: Path) -> None:
    """The category's name is written L2-category, and a missing cell may be a float that is no number."""
    row: dict[str, Any] = {
        "index": 7, "question": "Which?", "hint": None, "A": "cat", "B": "dog", "C": None, "D": None, "answer": "B",
        "category": "ocr", "image": {"bytes": b"x"}, "source": "s", "L2-category": "logic_reasoning", "split": "dev",
        "comment": float("nan"),
    }  # fmt: skip
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "dev.parquet")
    (problem,) = load("mmbench", tmp_path / "dev.parquet").problems
    assert problem.groups["l2"] == ("logic_reasoning",) and problem.options == {"A": "cat", "B": "dog"}
    (cells,) = read_cells(tmp_path / "dev.parquet")
    assert cells.optional("comment") == ""


def workbook(path: Path, *rows: list[Any]) -> Path:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    for row in rows:
        sheet.append(row)
    book.save(path)
    return path


def test_predictions_of_vlmevalkit(tmp_path: Path) -> None:
    header = ["index", "question", "A", "answer", "prediction"]
    rows = [
        [0, "q", "cat", "A", "B"],
        [1, "q", "cat", "A", 7],
        [2, "q", "cat", "A", None],
        [1000003, "q", "c", "A", "a\nb"],
    ]
    expected = {"0": "B", "1": "7", "2": "", "1000003": "a\nb"}
    file = workbook(tmp_path / "model_MMBench.xlsx", header, *rows)
    assert {id: found.response for id, found in read_predictions(file).by_id.items()} == expected
    lines = ["\t".join(header), *("\t".join(map(str, (f"{row[0]}.0", *row[1:4], row[4] or ""))) for row in rows[:3])]
    (tmp_path / "p.tsv").write_text("\n".join(lines) + "\n")
    found = read_predictions(tmp_path / "p.tsv").by_id
    assert {id: each.response for id, each in found.items()} == {"0": "B", "1": "7", "2": ""}
    with pytest.raises(ValueError, match=r"p.xlsx, row 1: it has neither 'response' nor"):
        read_predictions(workbook(tmp_path / "p.xlsx", ["index", "question"], [1, "q"]))
    (tmp_path / "no.xlsx").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"no.xlsx: it is no readable workbook"):
        read_predictions(tmp_path / "no.xlsx")


def test_predictions_of_mathvistas_authors(tmp_path: Path) -> None:
    value = {"1": {"pid": "1", "question": "q", "response": "It is 5.", "extraction": "5"}, "2": {"response": "x"}}
    (tmp_path / "output.json").write_text(json.dumps(value, indent=2))
    found = read_predictions(tmp_path / "output.json").by_id
    assert found == {"1": Prediction("1", "It is 5.", "5"), "2": Prediction("2", "x")}


def test_predictions_of_lmms_eval(tmp_path: Path) -> None:
    """The question's own id is in ``doc`` or in a measure's record; a set without ids is counted from 0."""
    lines: list[dict[str, Any]] = [
        {"doc_id": 0, "doc": {"index": 17, "question": "q"}, "resps": [["B."]], "filtered_resps": ["B"]},
        {"doc_id": 1, "resps": [["C"]], "mathvista_score": {"question_id": "99", "prediction": "5"}},
        {"doc_id": 2, "target": "A", "filtered_resps": ["A"]},
    ]
    expected = {"17": "B.", "99": "C", "2": "A"}
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "samples.json").write_text(json.dumps({"args": {}, "logs": lines}, indent=2))
    for name in ("samples.jsonl", "samples.json"):
        assert {id: each.response for id, each in read_predictions(tmp_path / name).by_id.items()} == expected
    (tmp_path / "samples.jsonl").write_text('{"doc_id": 0, "resps": []}\n')
    with pytest.raises(ValueError, match="row 1: neither 'resps' nor 'filtered_resps' holds a text"):
        read_predictions(tmp_path / "samples.jsonl")


def test_ids_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('{"id": 1, "response": "a"}\n{"pid": 2.0, "response": "b"}\n')
    assert list(read_predictions(tmp_path / "p.txt").by_id) == ["1", "2"]


def test_a_git_lfs_pointer_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"a.parquet \(\d+ bytes\) is a Git LFS pointer"):
        load("mmstar", tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        list(read_rows(tmp_path / "a.parquet"))


def parsed(value: str, gold: str) -> Question:
    turns = [{"from": "human", "value": f"<image>\n{value}"}, {"from": "gpt", "value": gold}]
    return parse_row({"id": "1", "image": "a/b.png", "conversations": turns})


@pytest.mark.parametrize(
    ("listed", "choices"),
    [
        ("Choices:\n(A) 10 (B) 12 (C) 14", ("10", "12", "14")),
        ("Choices: (A) 10 (B) 12 (C) 14", ("10", "12", "14")),
        ("Choices:\nA. 10 B. 12 C. 14", ("10", "12", "14")),
        ("Choices:\nA) ten\tB) twelve", ("ten", "twelve")),
        ("Choices:\n(A) 1 (B) 2\n(C) 3 (D) 4", ("1", "2", "3", "4")),
        ("Choices:\n(A) f(x) (B) f (C) x", ("f(x)", "f", "x")),
        ("Choices:\n(A) see (B)\n(B) A: the lung", ("see (B)", "A: the lung")),
        ("Choices:\n(A) \n(B) 12", ("", "12")),
        ("Choices:\n(A) 10, (B) 12, (C) 14", ("10", "12", "14")),
        ("Choices:\n(A) 1, 2; (B) 2, 3;", ("1, 2", "2, 3")),
        ("Options:\n(A) 10\n(B) 12", ("10", "12")),
        ("Options: A. 10 B. 12", ("10", "12")),
    ],
)
def test_choices_as_rows_have_them(listed: str, choices: tuple[str, ...]) -> None:
    found = parsed(f"Question: What?\n{listed}", "The answer is B")
    assert (found.question, found.choices, found.answer) == ("What?", choices, "B")


@pytest.mark.parametrize(
    ("listed", "gold", "message"),
    [
        ("(A) 10", "A", "choices: there is only one"),
        ("(A) \n(B) 12", "A", "answer: choice A, which it names, is empty"),
        ("(A) 10\n(C) 12", "A", "choices: they are lettered A, C, not A, B, C"),
        ("(A) 10 (B) 12", "C", "answer: 'C' is none of the choices A, B"),
    ],
)
def test_choices_that_cannot_be_meant(listed: str, gold: str, message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        parsed(f"What?\nChoices:\n{listed}", gold)


@pytest.mark.parametrize(
    "gold",
    ["5", "Answer: 5", "**5**", "**5**.", "**5.**", "The answer is **5**.", "**Answer:** 5", "**The answer is 5**",
     "Final answer: 5", "answer is 5", "The final answer is: 5.", "So the answer is 5", "The correct answer is 5",
     "答案：5", "答案是5"],
)  # fmt: skip
def test_golds_as_rows_have_them(gold: str) -> None:
    assert parsed("How many?", gold).answer == "5"
    assert parsed("How many?\nChoices:\n(A) 4\n(B) 5", gold).answer == "B"
    assert parsed("How many?", "2**3").answer == "2**3"
    assert parsed("How many?\nOptions: none that I know", gold).choices == ()


@pytest.mark.parametrize("gold", ["b", "Option B", "The correct option is (B)", "Choice B.", "The answer is option B"])
def test_letters_as_rows_name_them(gold: str) -> None:
    assert parsed("What?\nChoices:\n(A) 4\n(B) 5", gold).answer == "B"
