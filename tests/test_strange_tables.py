"""Tables, indices and tokenizers from a stranger: small files that would fill any memory or end the process."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fuzz.data_files import make_rows
from pyarrow import parquet
from tiny_families import make_model_directory

from mstar_mega.config import DataConfig
from mstar_mega.data import disk
from mstar_mega.data.digits import task as digits
from mstar_mega.data.tables import as_rows, parts_of
from mstar_mega.data.tokenizer import FastTokenizer

# ------------------------------------------------------------------------------------------------ tables


def stream(path: Path, table: pa.Table, **options: Any) -> Path:
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer,
    ):
        writer.write_table(table)
    return path


def test_a_table_unpacks_to_no_more_than_it_may(tmp_path: Path) -> None:
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 40), ["a" * (1 << 20)]).cast(pa.large_string())
    parquet.write_table(pa.table({"question": same}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 10_000
    runs = pa.RunEndEncodedArray.from_arrays([2**30], ["a" * 1000])
    batch = pa.record_batch([runs], schema=pa.schema([pa.field("question", runs.type)]))
    stream(tmp_path / "runs.arrow", pa.Table.from_batches([batch]))
    for name in ("bomb.parquet", "runs.arrow"):
        with pytest.raises(ValueError, match="unpacks to more than 200 times that"):
            as_rows(tmp_path / name, tmp_path / "made")


def test_a_row_is_no_larger_than_a_picture(tmp_path: Path) -> None:
    large = pa.array([bytes(300 << 20)], pa.large_binary())
    path = stream(tmp_path / "cell.arrow", pa.table({"question": ["?"], "x": large}), compression="zstd")
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="more than the 268,435,456 of a picture"):
        as_rows(path, tmp_path / "made")


@pytest.mark.parametrize("type", [pa.duration("s"), pa.timestamp("s"), pa.date32()])
def test_values_that_python_has_no_words_for(tmp_path: Path, type: pa.DataType) -> None:
    most = 2**31 - 1 if type == pa.date32() else 2**62
    path = stream(tmp_path / "x.arrow", pa.table({"question": ["?"], "x": pa.array([most], type)}))
    with pytest.raises(ValueError, match=r"x\.arrow cannot be read as a table"):
        as_rows(path, tmp_path / "made")


def test_a_column_that_names_a_python_type_is_a_column(tmp_path: Path) -> None:
    """pyarrow once unpickled what such a column carries."""
    code = f"cos\nmkdir\n(S'{tmp_path / 'ran'}'\ntR.".encode()
    names = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": code}
    schema = pa.schema([pa.field("question", pa.string(), metadata=names)])
    for write in (parquet.write_table, lambda table, path: stream(path, table)):
        path = tmp_path / ("x.parquet" if write is parquet.write_table else "x.arrow")
        write(pa.table([pa.array(["what?"])], schema=schema), path)
        rows, _ = as_rows(path, tmp_path / path.suffix)
        assert json.loads(rows.read_text())["question"] == "what?"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("state", [[], {"_data_files": "x"}, {"_data_files": [5]}, {"_data_files": [{"filename": 5}]}])
def test_a_saved_folders_state_of_another_shape(tmp_path: Path, state: Any) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state\.json"):
        parts_of(tmp_path)


def test_a_folder_that_holds_anything_else_is_not_replaced(tmp_path: Path) -> None:
    """``data.dir`` of a run that somebody has handed on may be anywhere."""
    (tmp_path / "table").mkdir()
    (tmp_path / "table/letter.txt").write_text("mine")
    path = stream(tmp_path / "x.arrow", pa.table({"question": ["?"]}))
    with pytest.raises(ValueError, match="'letter.txt', which is no part of a table"):
        as_rows(path, tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "my app"}')
    with pytest.raises(OSError, match="another program's file"):
        digits.build(DataConfig(warmup_examples=1, labelled_queries=1), tmp_path, 0)
    assert "my app" in (tmp_path / "manifest.json").read_text() and (tmp_path / "table/letter.txt").exists()


# ------------------------------------------------------------------------------------------------ indices

_ENDLESS = "AS WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
CHANGES = {
    "a view without end": f"DROP TABLE meta; CREATE VIEW meta {_ENDLESS} SELECT n AS value FROM c WHERE n < 0",
    "places without end": f"DROP TABLE places; CREATE VIEW places {_ENDLESS} SELECT n AS number, 'test' AS split, n AS "
    "position FROM c",
    "a computed column": "ALTER TABLE meta RENAME TO m; CREATE TABLE meta (x, value AS (hex(zeroblob(4000000)))); "
    "INSERT INTO meta (x) VALUES (1)",
    "longer than anything": "UPDATE rows SET length = 10000000000000",
    "all of the file": "UPDATE rows SET length = -1",
    "before the file": "UPDATE rows SET offset = -5",
    "text": "UPDATE rows SET length = 'abc'",
    "nothing": "UPDATE rows SET offset = NULL",
    "no such row": "UPDATE places SET number = number + 1000000",
    "another name": "UPDATE rows SET id = x'00ff'",
    "notes of no kind": "UPDATE meta SET value = 'null'",
    "notes without a time": "UPDATE meta SET value = json_remove(value, '$.mtime')",
    "notes without a digest": "UPDATE meta SET value = json_remove(json_set(value, '$.mtime', 'x'), '$.sha256')",
}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexed")
    make_rows(folder)
    disk.build(rows_of(folder), folder / "data", 0)
    return folder


def rows_of(folder: Path) -> DataConfig:
    return DataConfig(
        name="mathv360k", path=str(folder / "rows.json"), images=str(folder / "images"), validation_queries=2,
        test_queries=2,
    )  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_lies_is_made_again_or_refused(indexed: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(indexed / "data", tmp_path / "data")
    with contextlib.closing(sqlite3.connect(tmp_path / "data/rows.sqlite")) as index:
        index.executescript(CHANGES[change])
    try:
        task = disk.build(rows_of(indexed), tmp_path / "data", 0)
        assert len(list(task.labelled)) == len(task.labelled) == 4
    except ValueError as error:
        assert "rows.sqlite" in str(error)


# ------------------------------------------------------------------------------------------------ tokenizers


def padded(**how: Any) -> Callable[[dict[str, Any]], None]:
    padding = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    return lambda content: content.update(padding={**padding, "strategy": "BatchLongest", **how})


def normalized(*parts: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(normalizer={"type": "Sequence", "normalizers": list(parts)})


def replacing(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def in_model(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update(fields)


def split_by(pattern: str) -> Callable[[dict[str, Any]], None]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda content: content.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [part, *filter(None, [content["pre_tokenizer"]])]}
    )


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "padding": (padded(strategy={"Fixed": 10**12}), ""),
    "padding to multiples": (padded(pad_to_multiple_of=2**40), ""),
    "truncation": (
        lambda content: content.update(
            truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
        ),
        "",
    ),
    "drops": (in_model(dropout=0.9), ""),
    "laughs": (normalized(*[replacing({"String": "a"}, "aa")] * 12), "makes a text longer"),
    "a pattern": (normalized(replacing({"Regex": "a*"}, "")), "or has a pattern"),
    "many": (normalized(*[{"type": "NFC"}] * 40), "41 parts, more than 16"),
    "in front": (normalized({"type": "Prepend", "prepend": "x" * 10**6}), "prepend"),
    "a table": (normalized({"type": "Precompiled", "precompiled_charsmap": "////////////"}), "is none of"),
    "an affix": (in_model(continuing_subword_prefix="a" * 50), "continuing_subword_prefix"),
    "another model": (in_model(type="WordLevel", unk_token="x"), "only BPE is read"),
    "backtracking": (split_by("(a+)+$"), "fails in the library"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("phi3_5_vision", "minicpm_v2_5"):
        make_model_directory(family, folder / family)
    return folder


@pytest.mark.parametrize("family", ["phi3_5_vision", "minicpm_v2_5"])
@pytest.mark.parametrize("name", SPOILT)
def test_a_tokenizer_neither_swells_nor_ends_the_process(models: Path, tmp_path: Path, family: str, name: str) -> None:
    spoil, refusal = SPOILT[name]
    content = json.loads((models / family / "tokenizer.json").read_text())
    spoil(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            FastTokenizer(tmp_path / "tokenizer.json").encode("a" * 60 + "!")
    else:
        good = FastTokenizer(models / family / "tokenizer.json")
        assert FastTokenizer(tmp_path / "tokenizer.json").encode("3 + 4 = 7") == good.encode("3 + 4 = 7")
