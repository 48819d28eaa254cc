"""Sets on disk: splits by image, what is left out, seeded orders, memory, and files that change."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import typing
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mstar_mega.config import DataConfig
from mstar_mega.data import disk, task
from mstar_mega.data.order import Joined, Permutation, shuffled
from mstar_mega.data.prompts import TRAINING_SETS
from mstar_mega.data.splits import part_of
from mstar_mega.data.types import Query, Task
from mstar_mega.kernels.noise import key_of

GROUPS, PER_IMAGE = 60, 3


def picture(colour: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (colour % 256, colour // 256, 7)).save(data, "PNG")
    return data.getvalue()


def row(id: str, image: str, question: str = "q", answer: str = "1") -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\nQuestion: {question}"},
        {"from": "gpt", "value": f"The answer is {answer}"},
    ]
    return {"id": id, "image": image, "conversations": turns}


def good_rows(folder: Path) -> list[dict[str, Any]]:
    """Three questions about each of 60 images, the third under another name of the same picture."""
    images = folder / "GEOS/images"
    images.mkdir(parents=True, exist_ok=True)
    for g in range(GROUPS):
        for copy in ("a", "b"):
            (images / f"{g}{copy}.png").write_bytes(picture(g))
    return [
        row(f"id-{g}-{n}", f"GEOS/images/{g}{'b' if n == 2 else 'a'}.png", f"question {n}", str(n))
        for g in range(GROUPS)
        for n in range(PER_IMAGE)
    ]


def make(folder: Path, rows: list[Any], warmup: list[Any] | None = None, **settings: Any) -> Task:
    """The task of these rows, its index in ``folder/index``."""
    (folder / "rows.json").write_text(json.dumps(rows))
    config = config_of(folder, **settings)
    if warmup is None:
        labelled = disk.DiskQueries(disk.open_source(config, folder / "index"), "labelled")
        warmup = [{"id": query.id, "response": "r\n\n# Answer\n\n1"} for query in labelled[:5]]
    (folder / "warmup.jsonl").write_text("".join(json.dumps(each) + "\n" for each in warmup))
    return task.build(config, folder / "index", 0)


def config_of(folder: Path, **settings: Any) -> DataConfig:
    files = {"path": str(folder / "rows.json"), "warmup_file": str(folder / "warmup.jsonl")}
    counts = {"validation_queries": 10, "test_queries": 14, "labelled_queries": None, "unlabelled_queries": None}
    return DataConfig("mathv360k", **{**files, **counts, **settings})


def test_splits_never_share_an_image_and_ignore_the_files_order(tmp_path: Path) -> None:
    rows = good_rows(tmp_path)
    made = make(tmp_path, rows)
    sets = {name: getattr(made, name) for name in ("labelled", "unlabelled", "validation", "test")}
    assert len(made.validation) == 10 and len(made.test) == 14
    digests = {name: {image.digest for query in queries for image in query.images} for name, queries in sets.items()}
    assert sum(map(len, digests.values())) == len(set.union(*digests.values())) == GROUPS
    ids = [query.id for queries in sets.values() for query in queries]
    assert len(ids) == len(set(ids))
    left = GROUPS * PER_IMAGE - len(ids)
    assert left == len(made.skipped) and all("it has enough" in each.reason for each in made.skipped)
    assert 0.3 < len(digests["labelled"] | digests["validation"]) / GROUPS < 0.7
    order = {name: [query.id for query in queries] for name, queries in sets.items()}
    again = make(tmp_path, rows[::-1])
    assert {name: [query.id for query in getattr(again, name)] for name in sets} == order
    with pytest.raises(ValueError, match="was changed while it was in use"):
        list(made.labelled)


def test_the_labelled_share_is_of_pictures_and_half_by_default(tmp_path: Path) -> None:
    ids = [f"id-{i}" for i in range(2000)]
    assert [part_of(id, 0.5) for id in ids] == [key_of("half", id) & 1 for id in ids], "as before there was a share"
    labelled = {share: {id for id in ids if not part_of(id, share)} for share in (0.1, 0.5, 0.9, 1.0)}
    assert labelled[0.1] < labelled[0.5] < labelled[0.9] < labelled[1.0] == set(ids)
    assert all(abs(len(found) / 2000 - share) < 0.03 for share, found in labelled.items())
    rows = good_rows(tmp_path)
    half, most, whole = (make(tmp_path, rows, labelled_share=share) for share in (0.5, 0.9, 1.0))
    assert {query.id for query in half.labelled} < {query.id for query in (*most.labelled, *most.validation)}
    assert len(half.unlabelled) > len(most.unlabelled) and len(most.test) == len(whole.test) == 14
    assert not whole.unlabelled and len(whole.validation) == 10
    digests = [{q.images[0].digest for q in part} for part in (whole.labelled, whole.validation, whole.test)]
    assert sum(map(len, digests)) == len(set.union(*digests)) == GROUPS
    assert all(query.answer is not None for query in whole.test)
    with pytest.raises(
        ValueError, match="the unlabelled part of the file, from which they are set aside, has [0-9] us"
    ):
        make(tmp_path, rows, labelled_share=0.999)


def test_answers_of_the_unlabelled_half_are_hidden(tmp_path: Path) -> None:
    made = make(tmp_path, good_rows(tmp_path))
    assert {query.answer for query in made.unlabelled} == {None}
    assert {query.hidden_answer for query in made.unlabelled} == {"0", "1", "2"}
    for queries in (made.labelled, made.validation, made.test):
        assert all(query.answer == query.id[-1] and query.hidden_answer is None for query in queries)
    assert [query for query, _ in made.warmup] == list(made.labelled[:5])


def test_what_is_left_out_is_named_with_its_row(tmp_path: Path) -> None:
    rows: list[Any] = good_rows(tmp_path)
    images = tmp_path / "GEOS/images"
    (images / "cut.png").write_bytes(picture(500)[:50])
    (images / "lies.png").write_bytes(lying_png(9000, 9000))
    (images / "short.png").write_bytes(lying_png(900, 900))
    rows += [
        row("id-0-0", "GEOS/images/1a.png", "another"),  # 181
        row("cut", "GEOS/images/cut.png"),
        row("lies", "GEOS/images/lies.png"),
        row("short", "GEOS/images/short.png"),
        row("missing", "GEOS/images/none.png"),
        row("twice", "GEOS/images/5b.png", "  Question   1", "1"),  # the same as id-5-1
        row("against", "GEOS/images/6a.png", "question 2", "other"),  # contradicts id-6-2
        {"id": "odd"},
    ]
    made = make(tmp_path, rows)
    found = {each.what: each.reason for each in made.skipped if "it has enough" not in each.reason}
    assert {name.split()[1]: reason.split(":")[0] for name, reason in found.items()} == {
        "181": "id", "182": "GEOS/images/cut.png", "183": "GEOS/images/lies.png", "184": "GEOS/images/short.png",
        "185": "GEOS/images/none.png", "186": "answer", "187": "answer", "21": "answer", "188": "conversations",
    }  # fmt: skip
    assert "9000 x 9000 pixels" in found["row 183 (id lies)"]
    assert "there is no such file" in found["row 185 (id missing)"]
    assert "differently" in found["row 187 (id against)"] and "differently" in found["row 21 (id id-6-2)"]
    assert all(each.where == str(tmp_path / "rows.json") for each in made.skipped)
    kept = make(tmp_path, rows, conflicts="first")
    assert "row 21 (id id-6-2)" not in {each.what for each in kept.skipped if "differently" in each.reason}
    with pytest.raises(ValueError, match=r"row 21 \(id id-6-2\) cannot be used .* data.bad_rows is 'refuse'"):
        make(tmp_path, rows, bad_rows="refuse")
    assert len(make(tmp_path, rows[: GROUPS * PER_IMAGE], bad_rows="refuse").test) == 14


def lying_png(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds one row of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (1 + 3 * width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    made = make(tmp_path, [*good_rows(tmp_path), *[{"id": f"bad {n}"} for n in range(250)]])
    assert len(made.skipped) == disk.LISTED + 2
    assert all("conversations" in each.reason for each in made.skipped[: disk.LISTED])
    counted = [(each.what, each.reason[:29]) for each in made.skipped[disk.LISTED :]]
    left = GROUPS * PER_IMAGE - sum(map(len, (made.labelled, made.unlabelled, made.validation, made.test)))
    assert counted == [
        ("150 further rows", "there is no such field (the r"),
        (f"{left} further rows", "it has enough questions witho"),
    ]


def test_warmup_rows_that_leak_or_are_unknown_are_left_out(tmp_path: Path) -> None:
    rows = good_rows(tmp_path)
    made = make(tmp_path, rows)
    good = "r\n\n# Answer\n\n1"
    labelled, test, hidden = made.labelled[0].id, made.test[0].id, made.unlabelled[0].id
    warmup: list[Any] = [{"id": id, "response": good} for id in (labelled, test, hidden, "none", labelled)]
    digest = made.labelled[0].images[0].digest
    warmup += [{"id": labelled, "response": "no marker"}, {"id": labelled}, 7]
    warmup += [{"id": labelled, "response": good, "images": [image]} for image in (digest, "another")]
    warmup += [{"id": labelled, "response": f"\ud83d{good}"}]
    made = make(tmp_path, rows, warmup)
    assert [(query.id, text) for query, text in made.warmup] == [(labelled, good)] * 3
    reasons = [each.reason for each in made.skipped if each.where.endswith("warmup.jsonl")]
    words = ("test split", "unlabelled split", "no usable query", "'# Answer'", "texts", "texts", "image", "half a")
    assert all(word in reason for reason, word in zip(reasons, words, strict=True)), reasons


def test_too_many_questions_to_set_aside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.test_queries is 200, and the unlabelled part .* has \d+ usable"):
        make(tmp_path, good_rows(tmp_path), test_queries=200)
    with pytest.raises(ValueError, match="data.path is not set"):
        task.build(DataConfig("mathv360k"), tmp_path, 0)


def test_the_index_follows_the_file(tmp_path: Path) -> None:
    rows = good_rows(tmp_path)
    make(tmp_path, rows)
    index, source = tmp_path / "index/rows.sqlite", tmp_path / "rows.json"
    built = index.stat().st_ino
    disk.open_source(config_of(tmp_path), index.parent)
    os.utime(source, (1, 1))  # another time, the same bytes
    disk.open_source(config_of(tmp_path), index.parent)
    assert index.stat().st_ino == built
    source.write_text(json.dumps(rows).replace("question 1", "question 9", 1))  # the same size
    assert asks(make_again(tmp_path), "question 9") and index.stat().st_ino != built
    (tmp_path / "index/rows.sqlite").write_bytes(b"damaged")
    assert len(make_again(tmp_path).test) == 14


def make_again(folder: Path) -> Task:
    return task.build(config_of(folder), folder / "index", 0)


def asks(made: Task, words: str) -> bool:
    sets = (made.labelled, made.unlabelled, made.validation, made.test)
    return any(words in query.question for queries in sets for query in queries)


# -------------------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000])
def test_a_permutation_has_every_number_once_and_depends_on_its_key(n: int) -> None:
    orders = [[Permutation(n, seed, "x")[i] for i in range(n)] for seed in range(3)]
    for order in orders:
        assert sorted(order) == list(range(n))
    assert n < 10 or len(set(map(tuple, orders))) == 3
    with pytest.raises(IndexError):
        Permutation(n)[n]


def test_permutations_are_even_enough() -> None:
    """Where the number 0 lands over many keys: a chi-square test of 10 cells."""
    cells = Counter(next(i for i in range(10) if Permutation(10, seed)[i] == 0) for seed in range(1000))
    assert sum((cells[i] - 100) ** 2 / 100 for i in range(10)) < 30  # beyond it with probability 0.0004


def test_an_order_resumes_exactly_and_survives_pickling(tmp_path: Path) -> None:
    made = make(tmp_path, good_rows(tmp_path))
    order = shuffled(made.labelled, 3, "labelled", 0)
    ids = [query.id for query in order]
    assert sorted(ids) == sorted(query.id for query in made.labelled) and ids != [q.id for q in made.labelled]
    copy = pickle.loads(pickle.dumps(made))
    assert [query.id for query in shuffled(copy.labelled, 3, "labelled", 0)[20:]] == ids[20:]
    assert [query.id for query in shuffled(made.labelled, 4, "labelled", 0)] != ids
    both = Joined(order[5:7], made.test)
    assert [query.id for query in both[1:4]] == [ids[6], made.test[0].id, made.test[1].id]
    assert both[-1] == made.test[-1] and len(both) == 16


def test_lists_are_ordered_by_id_alone() -> None:
    queries = [Query(str(i), "q", (), "1") for i in range(20)]
    assert shuffled(queries, 0) == shuffled(queries[::-1], 0) != queries


# -------------------------------------------------------------------------------------------------------------- memory

MEMORY = """
import resource, sys
from pathlib import Path
from mstar_mega.config import DataConfig
from mstar_mega.data import disk
from mstar_mega.data.order import shuffled

path, rows = Path(sys.argv[1]), int(sys.argv[2])
with open(path, "w") as file:
    for i in range(rows):
        file.write('{"id": "%d", "image": null, "conversations": [{"from": "human", "value": "Question: what is %d?"}, '
                   '{"from": "gpt", "value": "The answer is %d"}]}\\n' % (i, i, i))
config = DataConfig("mathv360k", str(path), images=str(path.parent), validation_queries=10, test_queries=10)
source = disk.open_source(config, path.parent / "index")
order = shuffled(disk.DiskQueries(source, "labelled"), 0, "labelled", 0)
for position in range(0, len(order), max(1, len(order) // 500)):
    assert order[position].answer == order[position].id
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, len(order))
"""


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """From 10,000 to 200,000 rows, built and read in a process of its own."""
    resident: dict[int, int] = {}
    for rows in (10_000, 210_000):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / f"{rows}.jsonl"), str(rows)]
        (tmp_path / "index/rows.sqlite").unlink(missing_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        resident[rows], queries = map(int, done.stdout.split())
        assert 0.48 * rows < queries < 0.52 * rows
    assert resident[210_000] < resident[10_000] + 8_000_000, resident


def test_the_settings_name_exactly_the_sets_that_can_be_built() -> None:
    names, other = typing.get_args(typing.get_type_hints(DataConfig)["name"])
    assert other is str, "or a reader of the user's own"
    assert set(typing.get_args(names)) == set(task.BUILDERS) == set(TRAINING_SETS)


def test_the_digits_task_has_no_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.labelled_queries is null: the digits task has no end"):
        task.build(DataConfig(labelled_queries=None), tmp_path, 0)


def test_a_limit_that_cuts_a_set_is_said(tmp_path: Path) -> None:
    whole = make(tmp_path, good_rows(tmp_path))
    assert whole.cut == {}
    config = config_of(tmp_path, labelled_queries=7, unlabelled_queries=900, warmup_examples=3)
    cut = {"data.labelled_queries": (7, len(whole.labelled)), "data.warmup_examples": (3, 5)}
    assert task.build(config, tmp_path / "index", 0).cut == cut


def test_an_id_with_half_a_character_names_no_query(tmp_path: Path) -> None:
    made = make(tmp_path, good_rows(tmp_path), [{"id": "q\ud83d", "response": "r\n\n# Answer\n\n1"}, {"id": "\ud83d"}])
    reasons = [each.reason for each in made.skipped if each.where.endswith("warmup.jsonl")]
    assert len(made.warmup) == 0 and len(reasons) == 2
    assert "no usable query with this id" in reasons[0] and "texts id and response" in reasons[1]


def test_without_a_warmup_file_the_task_says_what_is_missing(tmp_path: Path) -> None:
    make(tmp_path, good_rows(tmp_path))
    made = task.build(config_of(tmp_path, warmup_file=None), tmp_path / "index", 0)
    assert len(made.warmup) == 0 and made.skipped[-1].where == "data.warmup_file"
