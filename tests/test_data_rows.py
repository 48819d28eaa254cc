"""Rows of large files, and one row in MathV360K's shape."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest

from mstar_mega.data import rows
from mstar_mega.data.mathv360k import parse_row, source_of, to_query
from mstar_mega.data.prompts import LETTER_HINT, TRAINING_SETS
from mstar_mega.data.rows import RowProblem, read_row, read_rows
from mstar_mega.data.types import ImageRef


def row(human: str = "<image>\nQuestion: q?", gpt: str = "The answer is 7", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": "a", "image": "GEOS/images/1.png", "conversations": turns, **fields}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", ["compact", "indented", "lines", "mark"])
def test_every_row_is_found_at_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, form: str
) -> None:
    monkeypatch.setattr(rows, "_CHUNK", chunk)
    rng = random.Random(0)
    alphabet = 'ab"\\[]{},\n\t é漢\U0001f600\ud83d'  # a lone surrogate is escaped by json, and so is valid JSON
    wanted = [{"t": "".join(rng.choices(alphabet, k=rng.randrange(30)))} for _ in range(40)]
    path = tmp_path / "rows.json"
    if form in ("lines", "mark"):
        text = "\n\n".join(json.dumps(each) for each in wanted)
        path.write_text(text, encoding="utf-8-sig" if form == "mark" else "utf-8")
    else:
        text = json.dumps(wanted, indent=2 if form == "indented" else None, ensure_ascii=True)
        path.write_text(text.replace("\\u6f22", "漢").replace("\\u00e9", "é"), encoding="utf-8")
    found = list(read_rows(path))
    assert [each.value for each in found] == wanted
    assert [each.number for each in found] == list(range(1, 41))
    with open(path, "rb") as file:
        assert [read_row(file, each.offset, each.length) for each in found] == wanted


def test_empty_files(tmp_path: Path) -> None:
    for text in ("", " \n", "[]", " [ ] "):
        (tmp_path / "f").write_text(text)
        assert list(read_rows(tmp_path / "f")) == []


def test_bad_lines_are_named_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n' + b"[" * 200_000 + b'\n{"a": 2}\n')
    found = list(read_rows(path))
    assert [each.value for each in found] == [{"a": 1}, None, None, None, {"a": 2}]
    assert [each.problem.split(" (")[0] for each in found] == [
        "", "it is not JSON", "it is not UTF-8", "it is nested too deeply", "",
    ]  # fmt: skip
    assert "byte 23" in found[2].problem


def test_a_list_names_a_row_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": "\xc3\xa9\xff"}, {"a": 2}]')
    first, second = read_rows(path)
    assert first.problem == "it is not UTF-8 (byte 10)" and second.value == {"a": 2}
    path.write_bytes('[{"a": 1}]'.encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, {"a": }]', r"row 2 \(byte 11\) is not JSON"),
        ('[{"a": 1}', r"after row 1 .* stands ''"),
        ('[{"a": 1} {"a": 2}]', r"after row 1 \(byte 10\) stands '\{'"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_a_broken_list_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        list(read_rows(tmp_path / "rows.json"))


def test_a_multiple_choice_row() -> None:
    human = f"<image>\n{LETTER_HINT}\nQuestion: Which?\nIt has two lines.\nChoices:\n(A) red\n(B) sky\nblue\n(C) nan"
    found = parse_row(row(human, "The answer is B"))
    assert (found.source, found.hint) == ("GEOS", LETTER_HINT)
    assert found.question == "Which?\nIt has two lines."
    assert found.choices == ("red", "sky\nblue", "nan") and found.answer == "B"
    assert found.kind == "GEOS, multiple choice"
    image = ImageRef("x", "y")
    query = to_query(found, TRAINING_SETS["mathv360k"], (image,), instruct=False, hide=True)
    assert query.question == human.removeprefix("<image>\n")
    assert (query.answer, query.hidden_answer, query.images) == (None, "B", (image,))


@pytest.mark.parametrize(
    ("gpt", "answer"),
    [
        ("The answer is B", "B"), ("the answer is: (C)", "C"), ("B. green", "B"), ("Green.", "B"), ("C", "C"),
        ("The final answer is red", "A"),
    ],
)  # fmt: skip
def test_letters_of_the_answer(gpt: str, answer: str) -> None:
    assert parse_row(row("<image>Question: q\nChoices:\nA. red\nB: green\n(C) blue", gpt)).answer == answer


def test_a_letter_with_another_choices_text() -> None:
    with pytest.raises(RowProblem, match="names B, but its text is that of A"):
        parse_row(row("<image>Question: q\nChoices:\n(A) red\n(B) blue", "(B) Red."))


@pytest.mark.parametrize(
    ("gpt", "answer"),
    [
        ("The answer is 7", "7"),
        ("The answer is 0.5.", "0.5"),
        ("10^4", "10^4"),
        ("The answer is A", "A"),
        ("a...", "a..."),
    ],
)
def test_free_form_answers(gpt: str, answer: str) -> None:
    assert parse_row(row(gpt=gpt)).answer == answer


def test_sources_of_paths() -> None:
    assert source_of("A-OKVQA/images/420634.jpg") == "A-OKVQA"
    assert source_of("images/tabmwp/7.png") == "tabmwp"
    assert source_of("7.png") == source_of(None) == ""


@pytest.mark.parametrize(
    ("bad", "field", "reason"),
    [
        ([1], "row", "a list"),
        (row(id=""), "id", "empty"),
        (row(id=None), "id", "missing"),
        (row(image=7), "image", "not a path"),
        (row(image="../../etc/passwd"), "image", "leads out"),
        (row(image="/etc/passwd"), "image", "leads out"),
        (row(image=None), "image", "the text shows 1 images, the row names 0"),
        (row("Question: q"), "image", "the text shows 0 images, the row names 1: write <image> where"),
        (row("<image><image>\nq"), "image", "the text shows 2 images"),
        (row("<image>\nHint: h\nQuestion: "), "question", "empty"),
        (row(conversations=None), "conversations", "not one question"),
        (row(conversations=[{"from": "gpt", "value": "x"}] * 2), "conversations", "where the turn from 'human' should"),
        ({"id": "1", "image": "a.png", "conversation": []}, "conversations", "the row has id, image, conversation"),
        (row(gpt=cast(Any, 7)), "conversations", "the value from 'gpt' is no text (it is of type int)"),
        (row("<image>\ud83d"), "conversations", "surrogate"),
        (row(gpt="The answer is "), "answer", "empty"),
        (row("<image>q\nChoices:\n(A) x\n(B) y", "The answer is E"), "answer", "'E' is none of the choices A, B"),
        (row("<image>q\nChoices:\n(A) x\n(C) y"), "choices", "A, C"),
        (row("<image>q\nChoices:\n(a) x"), "choices", "no line below 'Choices:' begins with (A)"),
    ],
)
def test_unusable_rows_say_which_field_and_why(bad: Any, field: str, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        parse_row(bad)
    assert caught.value.field == field and reason in caught.value.reason
