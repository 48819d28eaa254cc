"""Benchmark files with something wrong in them: named, refused or counted."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from benchmark_rows import load, m3cot_row, png, write_m3cot
from PIL import Image
from pyarrow import parquet

from mstar_mega.config import BenchmarkConfig
from mstar_mega.data.screen import readable_image
from mstar_mega.evaluation.asking import ask


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


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "twice.tsv"
    table.write_text("index\tanswer\tanswer\n1\tA\tB\n")
    with pytest.raises(ValueError, match="the column 'answer' stands twice"):
        load("mmbench", table)


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
