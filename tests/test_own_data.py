"""A set of one's own: {image, question, answer} in every format, what answers a wrong shape, and what fits the set."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_sets import picture

from mstar_mega import cli
from mstar_mega.config import DataConfig
from mstar_mega.data import disk, tables
from mstar_mega.data.mathv360k import parse_row
from mstar_mega.data.rows import RowProblem
from mstar_mega.data.types import image_digest
from mstar_mega.settings import parse
from mstar_mega.settings.rules import validate

COUNT = 40


def own_rows(folder: Path) -> list[dict[str, Any]]:
    """Two questions about each of 20 pictures; every fourth has choices."""
    (folder / "charts").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for i in range(COUNT):
        (folder / f"charts/{i // 2}.png").write_bytes(picture(i // 2))
        row = {"image": f"charts/{i // 2}.png", "question": f"How many, {i}?", "answer": str(i)}
        rows.append({**row, "choices": ["x, y", "blue"], "answer": "blue"} if i % 4 == 0 else row)
    return rows


def write(folder: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    """The rows in a format; those with pictures inside have no path that leads anywhere."""
    inside = [
        {**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}, "choices": row.get("choices")}
        for row in rows
    ]
    path = folder / f"rows.{form}"
    if form == "json":
        path.write_text(json.dumps(rows))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(
                file, ["question", "image", "answer", "choices"], delimiter="," if form == "csv" else "\t"
            )
            writer.writeheader()
            for i, row in enumerate(rows):
                listed = row.get("choices")
                text = json.dumps(listed) if i % 8 else " | ".join(listed or ())
                writer.writerow({**row, "choices": text if listed else ""})
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(inside), path)
    else:  # as datasets.save_to_disk does: two arrow streams and what names them
        path = folder / "saved"
        path.mkdir()
        for number, part in enumerate((inside[:23], inside[23:])):
            table = pa.Table.from_pylist(part)
            with pa.OSFile(str(path / f"data-0000{number}-of-00002.arrow"), "wb") as sink:
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
        files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
        (path / "state.json").write_text(json.dumps({"_data_files": files}))
        (path / "dataset_info.json").write_text("{}")
    return path


def config_of(path: Path, **settings: Any) -> DataConfig:
    counts = {"labelled_queries": None, "unlabelled_queries": None, "validation_queries": 4, "test_queries": 4}
    return DataConfig("mathv360k", str(path), labelled_share=1.0, warmup_answers=True, **{**counts, **settings})


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "tsv", "parquet", "saved"])
def test_the_same_questions_come_from_every_format(tmp_path: Path, form: str) -> None:
    rows = own_rows(tmp_path)
    config = config_of(write(tmp_path, form, rows))
    task = disk.build(config, tmp_path / "index", 0)
    queries = [*task.labelled, *task.validation, *task.test]
    assert not task.skipped and len(queries) == COUNT and len(task.unlabelled) == 0
    by_text = {query.question.splitlines()[1].removeprefix("Question: "): query for query in queries}
    for i, row in enumerate(rows):
        query = by_text[row["question"]]
        assert query.answer == ("B" if i % 4 == 0 else str(i))
        assert query.choices == (("x, y", "blue") if i % 4 == 0 else ())
        (image,) = query.images
        assert Path(image.path).read_bytes() == picture(i // 2) and image.digest == image_digest(picture(i // 2))
    assert [text for _, text in task.warmup] == [f"# Answer\n\n{query.answer}" for query in task.labelled]
    assert set(disk.file_marks(config, tmp_path / "index")) == {"data.path"}


def test_a_table_is_read_again_only_where_its_bytes_are_others(tmp_path: Path) -> None:
    rows = own_rows(tmp_path)
    path = write(tmp_path, "csv", rows)
    made, _ = tables.as_rows(path, tmp_path / "index")
    before, mark = made.stat().st_mtime_ns, tables.mark_of(path)
    path.touch()
    assert tables.as_rows(path, tmp_path / "index")[0].stat().st_mtime_ns == before
    path.write_text(path.read_text().replace("How many, 3?", "How few, 3?"))
    assert tables.mark_of(path) != mark
    assert "How few" in tables.as_rows(path, tmp_path / "index")[0].read_text()


def test_an_id_is_that_of_the_content_and_may_be_given() -> None:
    row = {"image": "a.png", "question": "How many?", "answer": 4}
    first, again = parse_row(row), parse_row({"answer": 4.0, "question": " How many? ", "image": "a.png"})
    assert first.id == again.id and first.answer == again.answer == "4" and first.image == "a.png"
    assert parse_row({**row, "image": "b.png"}).id != first.id
    assert parse_row({**row, "id": 7}).id == "7" and parse_row({"question": "1+1?", "answer": "2"}).image is None
    assert parse_row({**row, "question": "<image>\nHow many?"}).question == "How many?"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "a", "image": "a.png", "query": "?"}, 'a row in the right shape is {"image": "charts/7.png"'),
        ({"question": "?", "image": "a.png"}, "answer: there is no such field; a row in the right shape is"),
        ({"question": "?", "answer": True}, "answer: it is true, not a text: write yes or no"),
        ({"question": "?", "answer": ["1"]}, "answer: it is list, not a text"),
        ({"question": " ", "answer": "1"}, "question: it is empty"),
        ({"question": "?", "answer": "c", "choices": ["a", "b"]}, "answer: 'c' is none of the choices A, B"),
        ({"question": "?", "answer": "a", "choices": ["a"]}, "choices: there is only one"),
        ({"question": "?", "answer": "a", "choices": {"A": "a"}}, "choices: they are no list of texts"),
        ({"question": "?", "answer": "1", "image": "../up.png"}, "image: its path leads out of the image folder"),
        ({"question": "\ud83d", "answer": "1"}, "question: it has a lone surrogate"),
    ],
)
def test_a_wrong_row_is_told_the_right_shape(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowProblem, match="^") as raised:
        parse_row(row)
    assert said in str(raised.value)


def test_a_folder_and_a_wrong_table_are_told_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "other.csv").write_text("picture,text\na.png,?\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing")
    (tmp_path / "splits/train").mkdir(parents=True)
    (tmp_path / "splits/train/state.json").write_text("{}")
    for name, said in (
        ("set", "is a folder without a table that can be read"),
        ("other.csv", "has the columns picture, text: there is neither question nor conversations. A row in the right"),
        ("cut.parquet", "cut.parquet cannot be read as a table"),
        ("splits", "holds several splits: name one of them"),
        ("none.csv", "there is no such file"),
    ):
        assert cli.main(["data", "check", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error, error


def test_check_ends_with_arguments_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "csv", own_rows(tmp_path))
    assert cli.main(["data", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("NOTE: the settings' splits do not fit") and f"{path}: {COUNT} rows" in said
    last = said.splitlines()[-1].split()
    assert "--data.warmup_answers" in last and "--data.path" in last
    config = parse(last)
    validate(config)
    task = disk.build(config.data, tmp_path / "index", 0)
    assert len(task.validation) == len(task.test) == 4 and len(task.labelled) >= COUNT - 12


def test_bare_answers_and_a_file_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^data.warmup_answers is true and data.warmup_file is given"):
        validate(parse(["--data.warmup_answers=true", "--data.warmup_file=a.jsonl"]))


def test_the_walk_through_of_the_page_at_small_size(tmp_path: Path) -> None:
    """Charts made by the script, read from its CSV; the config ``own`` on them: bare answers, no PRM, to the report."""
    script = Path(__file__).parents[1] / "examples" / "own" / "charts.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "40"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "questions.csv"), done.stderr
    smaller = {
        "data.validation_queries": 4, "data.test_queries": 4, "warmup.epochs": 4, "warmup.optimizer.warmup_steps": 2,
        "warmup.optimizer.batch_size": 16, "evolve.interval": 1, "evolve.epochs": 1, "evolve.responses": 2,
        "temperature.responses": 2, "temperature.queries": 4, "evaluation.k": 2, "generation.max_new_tokens": 8,
    }  # fmt: skip
    run = tmp_path / "run"
    words = ["evolve", "--config", "own", "--data.path", tmp_path / "questions.csv", "--run.dir", run]
    words += [word for name, value in smaller.items() for word in (f"--{name}", value)]
    job = subprocess.run(
        [sys.executable, "-m", "mstar_mega", *map(str, words)], capture_output=True, text=True, timeout=1800
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "report:" in job.stdout and (run / "report.html").is_file()
    assert not list((run / "checkpoints").glob("prm*")), "no PRM is trained"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["event"] == "skipped"]
    losses = [event["loss"] for event in events if event["event"] == "step" and event["stage"] == "warmup"]
    assert losses[-1] < losses[0] / 2, "it learns how an answer is written"
