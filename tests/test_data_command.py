"""``mstar data``: what a set holds, its leaks, and one query as the policy sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data_sets import config_of, good_rows, picture, row

from mstar_mega import cli
from mstar_mega.commands import UNUSABLE
from mstar_mega.data import disk
from mstar_mega.models.families.internvl2 import InternVL2

SMALL = ("--data.validation_queries", "10", "--data.test_queries", "14")


def run(*arguments: object) -> int:
    return cli.main(["data", *map(str, arguments)])


def test_check_reports_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = good_rows(tmp_path)
    (tmp_path / "GEOS/images/cut.png").write_bytes(picture(500)[:50])
    rows += [
        row("cut", "GEOS/images/cut.png"),
        row("cut", "GEOS/images/1a.png"),
        row("again", "GEOS/images/2b.png", "question 0", "0"),
    ]
    rows[0]["conversations"][0]["value"] += "\nChoices:\n(A) x\n(B) y"
    rows[0]["conversations"][1]["value"] = "The answer is B"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(picture(0))
    problem: dict[str, object] = {"question_type": "multi_choice", "answer_type": "text", "precision": None}
    problem |= {"unit": None, "answer": "y", "choices": ["x", "y"], "image": "images/0.png"}
    groups = ("language", "source", "category", "task", "context", "grade")
    problem["metadata"] = {"skills": [], **dict.fromkeys(groups, "any")}
    exam = {str(i): {**problem, "pid": str(i), "question": text} for i, text in enumerate(("QUESTION  0", "other"))}
    (tmp_path / "exam.json").write_text(json.dumps(exam))
    command = ("check", tmp_path / "rows.json", *SMALL, "--against", f"mathvista={tmp_path / 'exam.json'}")
    assert run(*command, "--out", tmp_path / "out.json") == 0
    shown = capsys.readouterr().out
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["rows"] == 183 and facts["usable"] + facts["left_over"] == 180
    assert facts["sources"] == {"GEOS": {"free form": facts["usable"] - 1, "multiple choice": 1}}
    assert facts["images"] == {
        "paths": 121, "pictures": 60, "unreadable": 1, "min_width": 8, "max_width": 8, "min_height": 8, "max_height": 8,
    }  # fmt: skip
    assert {reason.split(":")[0]: found["count"] for reason, found in facts["problems"].items()} == {
        "image": 1, "id": 1, "answer": 1,
    }  # fmt: skip
    assert facts["shared_between_splits"]["pictures"] == 0
    assert sum(split["queries"] for split in facts["splits"].values()) == facts["usable"]
    leaks = facts["leaks"]["mathvista"]
    assert leaks["image and question"] == {"count": 1, "examples": ["row 1 (id id-0-0) = 0"]}
    assert leaks["question"]["count"] == 0 and leaks["image"]["count"] == 1 + 2 * 2, "three rows, two questions"
    cost, _ = facts["costs"]
    assert cost["tiles"] == 1 and cost["image_tokens"] == 9 and cost["queries"] == facts["usable"]
    published = {cost["family"]: cost for cost in facts["published_costs"]}
    # 8 x 8 pixels: one tile; four by four crops and the whole, with its newlines and separator; one slice.
    counts = {"internvl2": (1, 256), "phi3_5_vision": (17, 48 * 49 + 1 + 12 * 13), "minicpm_v2_5": (1, 96)}
    for family, (tiles, tokens) in counts.items():
        assert published[family]["tiles"] == tiles * facts["usable"]
        assert published[family]["image_tokens"] == tokens * facts["usable"]
        assert 2 < published[family]["text_tokens_estimate"] / facts["usable"] < 100
    for text in (
        "(exact)",
        "(estimate)",
        "GEOS",
        "1 unreadable",
        "row 181 (id cut) GEOS/images/cut.png",
        "shared with mathvista",
        "tokens a prompt",
    ):
        assert text in shown


def test_show_says_why_a_query_is_in_no_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*good_rows(tmp_path), row("lost", "GEOS/images/lost.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert run("show", tmp_path / "rows.json", "lost", *SMALL) == 2
    said = capsys.readouterr().err
    assert "the query 'lost' is in no set (row 181: GEOS/images/lost.png: there is no such file)" in said


def test_check_points_at_what_may_not_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = good_rows(tmp_path)
    rows[4] = row("inline", "GEOS/images/1a.png", "which? Choices: (A) x (B) y", "B")
    rows += [row(f"lost {i}", f"GEOS/images/lost{i}.png") for i in range(5)]
    rows += [row(f"odd {i}", "GEOS/images/1a.png", f"{i}\nChoices:\n(A) x\n(B) y", f"odd {i}") for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = config_of(tmp_path)
    labelled = disk.DiskQueries(disk.open_source(config, tmp_path / "index"), "labelled")
    right, wrong = labelled[0], labelled[1]
    answers = {right.id: right.answer, wrong.id: "many", "nobody": "1"}
    lines = [{"id": id, "response": f"r\n\n# Answer\n\n{answer}"} for id, answer in answers.items()]
    (tmp_path / "warmup.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    warmup = ("--data.warmup_file", tmp_path / "warmup.jsonl", "--data.warmup_examples", "1")
    assert run("check", tmp_path / "rows.json", *SMALL, *warmup, "--out", tmp_path / "out.json") == 0
    said = capsys.readouterr().out
    assert "read as free form, with a letter as the answer: 1 (row 5 (id inline))" in said
    assert f"warm-up file {tmp_path / 'warmup.jsonl'}: 2 usable responses" in said
    assert '  left out: row 3 (id "nobody"): id: the training set has no usable query' in said
    assert f"1 arrive at another answer than the gold one, and teach it: {wrong.id}: 'many', not" in said
    assert "      11  for 11 other reasons" in said, "each odd answer is a reason of its own"
    facts = json.loads((tmp_path / "out.json").read_text())
    assert [each["row"] for each in facts["unusable_rows"]] == list(range(181, 226))
    assert facts["unusable_rows"][0]["where"] == "GEOS/images/lost0.png"


def test_check_of_a_file_too_small_for_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(good_rows(tmp_path)))
    assert run("check", tmp_path / "rows.json", "--data.test_queries", "500") == 0
    assert "NOTE: the settings' splits do not fit the file: data." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "0 rows"),
        ("[]", "0 rows"),
        (json.dumps([row("lost", "GEOS/images/lost.png")]), "image: there is no such file (row 1 (id lost)"),
        (json.dumps(["a text"]), "row: it is text, not an object (row 1)"),
        (json.dumps([""]), "row: it is empty, not an object (row 1)"),
    ],
)
def test_check_of_a_file_without_a_usable_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert run("check", tmp_path / "rows.json", "--out", tmp_path / "out.json") == UNUSABLE
    said = capsys.readouterr()
    assert reason in said.out and said.out.splitlines()[-1].startswith("FAILED: nothing is usable") and not said.err
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["usable"] == 0 and facts["costs"] == facts["published_costs"] == []
    assert run("show", tmp_path / "rows.json", "nobody") == cli.USER_ERROR
    assert "nothing is usable (`mstar data check` says why)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"rows.json has no usable row: `mstar data check .*rows.json --data.images "):
        disk.open_source(config_of(tmp_path), tmp_path / "index")


def test_check_fails_where_a_job_would_refuse_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([*good_rows(tmp_path), row("lost", "GEOS/images/lost.png")]))
    command = ("check", tmp_path / "rows.json", *SMALL)
    assert run(*command) == 0 and "FAILED" not in capsys.readouterr().out
    assert run(*command, "--data.bad_rows", "refuse") == UNUSABLE
    said = capsys.readouterr().out
    assert "unusable: 1" in said and "FAILED: data.bad_rows is 'refuse': 1 rows and 0 responses cannot be used" in said
    assert run(*command, "--data.warmup_file", tmp_path / "none.jsonl") == UNUSABLE
    assert f"FAILED: no response of the warm-up file {tmp_path / 'none.jsonl'} is usable" in capsys.readouterr().out


def test_show_needs_neither_splits_that_fit_nor_a_warmup_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([*good_rows(tmp_path), row("lost", "GEOS/images/lost.png")]))
    monkeypatch.chdir(tmp_path)
    settings = ("--data.warmup_file", "none.jsonl", "--data.bad_rows", "refuse")
    assert run("show", "rows.json", "id-3-1", *settings) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("NOTE: the settings' splits do not fit the file: data.validation_queries is 250")
    assert second.startswith("query id-3-1 of the ") and "labelled half" in second
    assert rest[-1] == "1 tiles of (48, 48) pixels: not written (--out TILES.png does)"
    assert not (tmp_path / "tiles.png").exists()
    assert run("show", "rows.json", "id-3-1", *SMALL) == 0 and "NOTE" not in capsys.readouterr().out


@pytest.mark.parametrize("action", ["check", "show"])
def test_help_is_the_actions_own(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(action, "--help") == run(action, "rows.json", "-h") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: mstar data {action} {'PATH' if action == 'check' else '[PATH] ID'} ")
    assert "--out" in said and "Every setting of 'mstar evolve --help' may follow as --dotted.name VALUE" in said
    assert said.count("\n") < 50 and ("--against" in said) == (action == "check")


def test_show_prints_the_prompt_and_renders_the_tiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(good_rows(tmp_path)))
    (tmp_path / "GEOS/images/3a.png").write_bytes(striped())
    assert run("show", tmp_path / "rows.json", "id-3-1", *SMALL, "--out", tmp_path / "tiles.png") == 0
    shown = capsys.readouterr().out
    tokenizer = InternVL2("digits").tokenizer
    start, image = tokenizer.id("<|im_start|>"), tokenizer.id("<IMG_CONTEXT>")
    assert f"<{start}>user\n<{tokenizer.id('<img>')}>{'·' * 9}<{tokenizer.id('</img>')}>\nHint: " in shown
    assert f" + 9 x {image} + [{tokenizer.id('</img>')}, " in shown
    assert "Question: question 1" in shown and "gold answer" in shown and "1 tiles of (48, 48) pixels" in shown
    tile = np.asarray(Image.open(tmp_path / "tiles.png"))
    assert tile.shape == (48, 48, 3) and tile[:, 4].max() == 0 and tile[:, -4].min() == 255


def striped() -> bytes:
    """Black on the left, white on the right."""
    import io

    data = io.BytesIO()
    stripes = Image.new("RGB", (48, 48))
    stripes.paste((255, 255, 255), (24, 0, 48, 48))
    stripes.save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "choose check or show"),
        (("check",), "usage: mstar data check PATH"),
        (("check", "none.json"), "data.path none.json: there is no such file"),
        (("show", "rows.json", "nobody", *SMALL), "no set has a query 'nobody'; there are id-"),
        (("check", "rows.json", *SMALL, "--against", "exam.json"), "give it as BENCHMARK=FILE"),
        (
            ("check", "rows.json", *SMALL, "--against", "mathvista=exam.json"),
            "--against mathvista exam.json: there is no such file",
        ),
        (
            ("check", "rows.json", *SMALL, "--against", "foo=rows.json"),
            "there is no benchmark 'foo': choose one of mathvista, ",
        ),
        (("check", "rows.json", "--out"), "--out has no value"),
        (("check", "rows.json", "--data.pathh", "x"), "did you mean '--data.path'"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(good_rows(tmp_path)))
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == cli.USER_ERROR
    assert said in capsys.readouterr().err
