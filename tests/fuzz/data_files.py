"""Targets that users bring: rows, benchmark files, settings."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import yaml
from PIL import Image
from report_runs import write_image

from fuzz.mutate import DEEP, STEERING, as_text, mutated
from fuzz.spoiling import Command, Random, spoil_bytes
from mstar_mega.config import Config
from mstar_mega.settings import dump


def make_rows(folder: Path) -> None:
    rows = []
    for number in range(12):
        image = f"TabMWP/images/{number % 6}.png"
        write_image(folder / "images" / image)
        human = f"Hint: count.\nQuestion: what is {number} + 1?"
        gold = str(number + 1)
        if number % 2:
            human, gold = human + "\nChoices:\n(A) 1\n(B) 2", "B"
        turns = [{"from": "human", "value": f"<image>{human}"}, {"from": "gpt", "value": f"The answer is {gold}"}]
        rows.append({"id": f"q{number}", "image": image, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))


def spoil_rows(folder: Path, random: Random) -> list[Command]:
    path = folder / "rows.json"
    if random.random() < 0.85:
        path.write_text(as_text(mutated(json.loads(path.read_text()), random), random), errors="surrogatepass")
    else:
        spoil_bytes(path, random)
    small = ["--data.images", str(folder / "images"), "--data.validation_queries", "2", "--data.test_queries", "2"]
    return [["data", "check", str(path), *small], ["data", "show", str(path), "q1", *small]]


_ROW = {
    "index": 1, "question": "how many?", "hint": "", "A": "one", "B": "two", "answer": "A", "category": "counting",
    "l2-category": "logic", "split": "dev", "image": "",
}  # fmt: skip
_PROBLEM = {
    "pid": "1", "question": "q?", "image": "0.png", "choices": ["x", "y"], "unit": None, "precision": None,
    "answer": "x", "question_type": "multi_choice", "answer_type": "text", "query": "q?",
    "metadata": {
        "category": "any", "context": "any", "grade": "any", "language": "english", "skills": ["logic"],
        "source": "any", "task": "any", "split": "testmini",
    },
}  # fmt: skip
_M3COT = {
    "id": "1", "question": "q?", "choices": ["None", "nan"], "context": "", "answer": "B", "domain": "science",
    "topic": "theory", "category": "any", "image": None, "rationale": "so",
}  # fmt: skip


def make_benchmarks(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    answers = [{"id": str(number), "response": "The answer is A"} for number in (1, 2)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def spoil_benchmark(folder: Path, random: Random) -> list[Command]:
    kind = random.choice(("tsv", "mathvista", "m3cot", "parquet", "predictions"))
    predictions = folder / "predictions.jsonl"
    if kind == "predictions":
        lines = predictions.read_text().splitlines()
        lines[0] = as_text(mutated(json.loads(lines[0]), random), random)
        predictions.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    if kind in ("tsv", "predictions"):
        data, name = folder / "set.tsv", random.choice(("mmbench", "mmstar", "ai2d"))
        rows = [_ROW, {**_ROW, "index": 2}]
        if kind == "tsv":
            found = mutated(rows, random)
            rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
        table = io.StringIO()
        writer = csv.DictWriter(table, list(_ROW), delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows([{key: str(value) for key, value in row.items()} for row in rows])
        data.write_text(table.getvalue(), errors="surrogatepass")
        if random.random() < 0.3:
            spoil_bytes(data, random)
    elif kind == "mathvista":
        data, name = folder / "set.json", "mathvista"
        data.write_text(as_text(mutated({"1": _PROBLEM, "2": {**_PROBLEM, "choices": "{[]: 1}"}}, random), random))
    elif kind == "m3cot":
        data, name = folder / "set.jsonl", "m3cot"
        data.write_text(as_text(mutated(_M3COT, random), random) + "\n", errors="surrogatepass")
    else:
        data, name = folder / "set.parquet", "mathvista"
        _write_parquet(data, random)
    out = str(folder / "scores.json")
    return [["score", "--benchmark", name, "--data", str(data), "--predictions", str(predictions), "--out", out]]


def _write_parquet(path: Path, random: Random) -> None:
    import pyarrow
    from pyarrow import parquet

    try:
        parquet.write_table(pyarrow.Table.from_pylist([mutated(_PROBLEM, random)]), path)
    except (pyarrow.ArrowException, TypeError, AttributeError, ValueError, OverflowError):
        parquet.write_table(pyarrow.Table.from_pylist([_PROBLEM]), path)
    if random.random() < 0.5:
        spoil_bytes(path, random)


def make_settings(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(dump(Config()))


_LAUGHS = "seed: [&a [1,1,1,1,1,1,1,1,1,1], " + ", ".join(
    f"&{name} [{','.join([f'*{before}'] * 10)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
) + "]\n"  # fmt: skip


def spoil_settings(folder: Path, random: Random) -> list[Command]:
    path = folder / "run/config.yaml"
    way = random.random()
    if way < 0.6:
        tree = mutated(yaml.safe_load(path.read_text()), random)
        path.write_text(yaml.safe_dump(tree, explicit_end=True), errors="surrogatepass")
    elif way < 0.8:
        spoil_bytes(path, random)
    else:
        texts = (
            _LAUGHS, "seed: &a [*a]\n", "seed: " + DEEP, "{" * 20_000, "".join(f"k{i}: 1\n" for i in range(10_000)),
            "? [a]\n: 1\n", "seed: !!python/object/apply:os.mkdir [ran]\n", f"seed: {json.dumps(STEERING)}\n",
            "seed: 2001-99-99\n", "- " * 5000, "seed: 0o9\n", "a: " + "9" * 5000 + "\n", "<<: *x\n",
            "seed: !!binary x\n",
        )  # fmt: skip
        path.write_text(random.choice(texts) + "...\n")
    gpus = ["--gpus", "1", "--memory", "1GB"]
    return [["plan", "--config", str(path), *gpus], ["report", str(folder / "run")], ["evaluate", str(folder / "run")]]
