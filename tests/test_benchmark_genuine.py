"""Benchmark files as they are distributed: prompts, options, layouts and images are the authors' own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from benchmark_rows import load, png
from published import BENCHMARKS, VECTORS, lines, needs_data
from pyarrow import parquet

from mstar_mega.config import BenchmarkConfig
from mstar_mega.evaluation.asking import ask, prompt_text

pytestmark = needs_data


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


def test_mathvistas_json_and_tsv_hold_the_same_problems() -> None:
    first, second = (
        {p.id: p for p in load("mathvista", BENCHMARKS / "mathvista" / file).problems}
        for file in ("testmini.json", "MathVista_MINI_noimage.tsv")
    )
    for id, problem in first.items():
        other = second[id]
        for name in ("options", "answer", "answer_type", "precision", "groups"):
            assert getattr(problem, name) == getattr(other, name), (id, name)


def test_mmstars_two_layouts_ask_the_same() -> None:
    table = {problem.id: problem for problem in load("mmstar", BENCHMARKS / "mmstar/MMStar_noimage.tsv").problems}
    listed = load("mmstar", BENCHMARKS / "mmstar/mmstar_all_text.jsonl").problems
    same = [prompt_text("mmstar", p, False) == prompt_text("mmstar", table[p.id], False) for p in listed]
    assert sum(same) == 1148, "the others write their choices in lines"
    assert all(
        not p.options or p.options == table[p.id].options for p, is_same in zip(listed, same, strict=True) if is_same
    )
    assert len(load("mmstar", BENCHMARKS / "mmstar/MMStar_noimage.tsv", reduced=True).problems) == 1000


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


def test_ai2d_rows() -> None:
    problems = load("ai2d", BENCHMARKS / "ai2d/AI2D_rows_from_MMStar_noimage.tsv").problems
    assert len(problems) == 196 and prompt_text("ai2d", problems[0], False).endswith("from the options above.")


def test_m3cots_images_beside_its_jsonl(tmp_path: Path) -> None:
    problems = [
        problem
        for problem in load("m3cot", BENCHMARKS / "m3cot/test.jsonl").problems
        if (BENCHMARKS / f"m3cot/images/{problem.id}.png").exists()
    ][:20]
    asked = ask("m3cot", problems, BENCHMARKS / "m3cot/test.jsonl", tmp_path, BenchmarkConfig(), instruct=False)
    assert len(asked.queries) == 20 and not (tmp_path / "images").exists()


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
