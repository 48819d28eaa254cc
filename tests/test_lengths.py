"""Prompts that are too long: measured without images, left out before anything is sampled, and named."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, events_of
from PIL import Image
from test_data_sets import config_of, good_rows, make, row
from tiny_families import NAMES, make_model_directory

from mstar_mega import cli
from mstar_mega.config import Config, GenerationConfig
from mstar_mega.data.lengths import limits_of, without_too_long
from mstar_mega.data.order import Without
from mstar_mega.data.types import ImageRef, Query, Task
from mstar_mega.models.description import family_from_hf
from mstar_mega.models.families.base import Family
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.recipe.directory import build_task

LONG = "seven " * 600


@pytest.mark.parametrize("name", ["digits", *NAMES])
def test_a_prompt_is_measured_without_its_images(name: str, tmp_path: Path) -> None:
    family: Family = InternVL2("digits")
    if name != "digits":
        family = family_from_hf(make_model_directory(name, tmp_path / "hf"))
    sizes = [(28, 28), (200, 31), (30, 190), (97, 97), (1, 60), (56, 112)]
    for images in ([], *([size] for size in sizes), sizes[:3]):
        refs = []
        for width, height in images:
            path = tmp_path / f"{width}x{height}.png"
            Image.new("RGB", (width, height)).save(path)
            refs.append(ImageRef(str(path), ""))
        question = "  which is the largest?\nA. seven \n"
        prompt = family.prompt(Query("q", question, tuple(refs), None))
        assert family.prompt_length(question, images) == len(prompt.tokens)


def long_rows(folder: Path, task: Task) -> list[dict[str, Any]]:
    """The good rows, some of each set's with a question of thousands of tokens."""
    rows = good_rows(folder)
    long = {queries[1].id for queries in (task.labelled, task.unlabelled, task.validation, task.test)}
    for each in rows:
        if each["id"] in long:
            each["conversations"][0]["value"] += LONG
    return rows


def limited(folder: Path, task: Task, **settings: Any) -> Task:
    data = config_of(folder, **{"max_prompt_tokens": 1000, **settings})
    return without_too_long(task, InternVL2("digits"), Config(data=data), None)


def test_long_prompts_are_left_out_of_every_set_and_named(tmp_path: Path) -> None:
    short = make(tmp_path, good_rows(tmp_path))
    whole = make(tmp_path, long_rows(tmp_path, short))
    kept = limited(tmp_path, whole)
    for name in ("labelled", "unlabelled", "validation", "test"):
        before, after = (list(getattr(task, name)) for task in (whole, kept))
        assert after == [before[0], *before[2:]], "the others stay in their places"
    assert [query.id for query, _ in kept.warmup] == [
        query.id for query, _ in whole.warmup if len(query.question) < 999
    ]
    named = kept.skipped[len(whole.skipped) :]
    assert len(named) == 5 and named[0].what == f"the example of {named[1].what}"
    length = InternVL2("digits").prompt_length(whole.labelled[1].question, [(8, 8)])
    assert named[1].what.endswith(f"(id {whole.labelled[1].id})") and named[1].where == str(tmp_path / "rows.json")
    assert named[1].reason == f"prompt: it has {length} tokens, more than 1000 (data.max_prompt_tokens)"
    assert limited(tmp_path, whole, max_prompt_tokens=length).skipped == whole.skipped, "this many may be"
    with pytest.raises(ValueError, match="cannot be used .prompt: it has .* data.bad_rows is 'refuse'"):
        limited(tmp_path, whole, bad_rows="refuse")
    many = limited(tmp_path, whole, max_prompt_tokens=10)
    assert len(many.labelled) == 0 and len(many.skipped) < 5 * 101 + len(whole.skipped)


def test_written_out_responses_count_with_their_prompt(tmp_path: Path) -> None:
    rows = good_rows(tmp_path)
    ids = [query.id for query in make(tmp_path, rows).labelled[:3]]
    warmup = [
        {"id": id, "response": f"{text}\n\n# Answer\n\n1"} for id, text in zip(ids, ("a", LONG, "b"), strict=True)
    ]
    task = make(tmp_path, rows, warmup)
    kept = limited(tmp_path, task)
    assert [query.id for query, _ in kept.warmup] == [ids[0], ids[2]] and len(kept.labelled) == len(task.labelled)
    (skipped,) = kept.skipped[len(task.skipped) :]
    assert "more than 1512" in skipped.reason and skipped.where == str(tmp_path / "warmup.jsonl")


def test_the_models_context_is_a_limit() -> None:
    config = Config(generation=GenerationConfig(max_new_tokens=500))
    assert limits_of(config, None).prompt == limits_of(config, 20_000).prompt == 16_384
    assert limits_of(config, 8192).prompt == 7692 and limits_of(config, 8192).example == 8192
    assert "the model's context of 8192 less generation.max_new_tokens, 500" in limits_of(config, 8192).why
    with pytest.raises(ValueError, match="max_new_tokens is 500, and the model's context has 500 tokens"):
        limits_of(config, 500)


@pytest.mark.parametrize("name", NAMES)
def test_families_know_their_context(name: str, tmp_path: Path) -> None:
    family = family_from_hf(make_model_directory(name, tmp_path / "hf"), with_tokenizer=False)
    assert family.language.context == (1024 if name == "internvl2" else 512), "dynamic NTK doubles it"


def test_a_sequence_without_some_items() -> None:
    items = list("abcdefgh")
    for left_out in ((), (0,), (7,), (2, 3), (7, 0, 4), range(8)):
        wanted = [item for i, item in enumerate(items) if i not in left_out]
        found = Without(items, left_out)
        assert list(found) == wanted and len(found) == len(wanted) and list(found[1:3]) == wanted[1:3]
        with pytest.raises(IndexError):
            found[len(wanted)]
    assert Without(items, (7, 6))[-1] == "f"


def test_check_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = good_rows(tmp_path)
    rows[3]["conversations"][0]["value"] += LONG * 10
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    small = ("--data.validation_queries", "10", "--data.test_queries", "14", "--out", str(tmp_path / "out.json"))
    arguments = ["data", "check", str(tmp_path / "rows.json"), *small]
    assert cli.main([*arguments, "--data.max_prompt_tokens", "4000"]) == 0
    said = capsys.readouterr().out
    assert "1 prompts have more than 4000 tokens and are left out in training: row 4 (id id-1-0) " in said
    cost, _ = json.loads((tmp_path / "out.json").read_text())["costs"]
    assert cost["too_long"]["count"] == 1 and cost["limit"] == 4000
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("1 prompts have more than 7680 tokens") == 1, "MiniCPM's context is the published ones' smallest"


def test_a_job_goes_on_without_them(tmp_path: Path) -> None:
    rows = good_rows(tmp_path)
    task = make(tmp_path, rows)
    long = task.labelled[0].id
    for each in rows:
        if each["id"] == long:
            each["conversations"][0]["value"] += LONG
    task = make(tmp_path, rows, [{"id": query.id, "response": "r\n\n# Answer\n\n1"} for query in task.labelled[:9]])
    settings = {
        "name": "mathv360k", "path": tmp_path / "rows.json", "warmup_file": tmp_path / "warmup.jsonl",
        "max_prompt_tokens": 800, "validation_queries": 10, "test_queries": 14, "warmup_examples": "null",
        "labelled_queries": 5, "unlabelled_queries": 5,
    }  # fmt: skip
    job = Job(
        tmp_path / "run", 1, *(part for name, value in settings.items() for part in (f"--data.{name}", str(value))),
        *("--generation.max_new_tokens", "8", "--warmup.epochs", "1"), command="warmup",
    )  # fmt: skip
    assert job.wait() == 0, job.output
    assert f"NOTE: data.labelled_queries takes 5 of {len(task.labelled)}; null: all" in job.output
    assert "unlabelled_queries takes" not in job.output, "nothing uses them"
    skipped = [event for event in events_of(tmp_path / "run") if event["event"] == "skipped"]
    reasons = [event["what"] for event in skipped if "more than 800" in event["reason"]]
    assert len(reasons) == 2 and all(f"(id {long})" in what for what in reasons)


def test_a_set_of_which_nothing_is_left_stops_at_the_start(tmp_path: Path) -> None:
    make(tmp_path, [*good_rows(tmp_path), row("last", "GEOS/images/0a.png")])
    config = Config(data=replace(config_of(tmp_path), max_prompt_tokens=5))
    with pytest.raises(ValueError, match=r"no query of the warm-up set can be used .*more than 5 \(data.max_prompt"):
        build_task(config, tmp_path, InternVL2("digits"))


def test_a_useless_warmup_file_is_refused_for_its_own_reasons(tmp_path: Path) -> None:
    warmup: list[Any] = [{"id": f"{name}-{'x' * 150}", "response": name} for name in ("one", "two")]
    warmup += [*warmup, {"id": 3}, "text", {"id": "id-0-0", "response": "\ud800"}, {"id": "id-1-0", "response": "r"}]
    rows = [*good_rows(tmp_path), *(row(f"lost {i}", f"GEOS/images/lost{i}.png") for i in range(9))]
    make(tmp_path, rows, warmup=warmup)
    config = Config(data=config_of(tmp_path))
    with pytest.raises(ValueError, match="no query of the warm-up set can be used") as refusal:
        build_task(config, tmp_path, InternVL2("digits"))
    said, file = str(refusal.value), str(tmp_path / "warmup.jsonl")
    assert "lost" not in said and "rows.json" not in said
    assert f"({file}: id: the training set has no usable query with this id; {file}: row: it is not an object" in said
    assert re.search(r"(\)|; and \d more reasons\))$", said), said
