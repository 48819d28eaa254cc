"""What is mutated, and what reads it. A target copies a good directory, spoils one file in it, and says what to run."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forging
import yaml
from hf_directories import make_checkpoint
from PIL import Image
from report_runs import make_run, write_image, write_rollouts
from tiny_families import make_model_directory

from fuzz.mutate import DEEP, STEERING, as_text, flipped, mutated
from mstar_mega.config import Config
from mstar_mega.settings import dump

Random = random.Random
FAMILIES = ("internvl2", "phi3_5_vision", "minicpm_v2_5")
Command = list[str] | Callable[[], Any]
"""Arguments of ``mstar``, or a function that may raise ValueError or OSError."""


@dataclass(frozen=True)
class Target:
    """One kind of file."""

    make: Callable[[Path], None]
    """A good directory."""
    spoil: Callable[[Path, Random], list[Command]]
    """Spoils a copy of it; returns what to do with it then."""
    cases: int
    """In the tests: a minute for all targets."""


def _json_file(path: Path, random: Random) -> None:
    path.write_text(as_text(mutated(json.loads(path.read_text()), random), random), errors="surrogatepass")


def _bytes_of(path: Path, random: Random) -> None:
    path.write_bytes(flipped(path.read_bytes(), random))


# -------------------------------------------------------------------------------------------- Hugging Face directories


def _make_hf(folder: Path) -> None:
    for family in FAMILIES:
        make_checkpoint(folder / family, family, shards=2)


def _inspect(folder: Path) -> Command:
    return ["inspect", str(folder)]


def _convert(folder: Path) -> Command:
    from mstar_mega.checkpoint_tools.convert import hf_to_megatron

    return lambda: hf_to_megatron(folder, folder.parent / "out")


def spoil_config(folder: Path, random: Random) -> list[Command]:
    hf = folder / random.choice(FAMILIES)
    _json_file(hf / "config.json", random)
    return [_inspect(hf), *([_convert(hf)] if random.random() < 0.3 else [])]


def spoil_weight_map(folder: Path, random: Random) -> list[Command]:
    hf = folder / FAMILIES[0]
    _json_file(hf / "model.safetensors.index.json", random)
    return [_inspect(hf), _convert(hf)]


def spoil_safetensors(folder: Path, random: Random) -> list[Command]:
    hf = folder / FAMILIES[0]
    shard = hf / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    if random.random() < 0.8:
        text = as_text(mutated(header, random), random).encode(errors="surrogatepass")
        length = random.choice((len(text), len(text), len(text), 0, 2**40, 2**63, len(text) + 1))
        shard.write_bytes(length.to_bytes(8, "little") + text + body)
    else:
        _bytes_of(shard, random)
    return [_inspect(hf), _convert(hf)]


def _make_tokenizers(folder: Path) -> None:
    for family in FAMILIES:
        make_model_directory(family, folder / family)


def spoil_tokenizer(folder: Path, random: Random) -> list[Command]:
    from mstar_mega.models.description import family_from_hf

    hf = folder / random.choice(FAMILIES)
    file = random.choice([path for path in hf.iterdir() if path.name.startswith(("tokenizer", "added"))])
    if file.suffix == ".json":
        _json_file(file, random)
    else:
        _bytes_of(file, random)
    return [lambda: family_from_hf(hf)]


# --------------------------------------------------------------------------------------------- checkpoints of our own


def _make_checkpoint(folder: Path) -> None:
    from mstar_mega.checkpoint_tools.convert import hf_to_megatron

    make_checkpoint(folder.parent / "made_hf", "internvl2")
    hf_to_megatron(folder.parent / "made_hf", folder / "there")


def _open(folder: Path) -> list[Command]:
    from mstar_mega.checkpoint_tools.convert import megatron_to_hf
    from mstar_mega.checkpoint_tools.verify import open_checkpoint
    from mstar_mega.config import ModelConfig, ParallelConfig

    def load() -> None:
        open_checkpoint(folder, ParallelConfig(), ModelConfig(precision="float32"))

    return [_inspect(folder), lambda: megatron_to_hf(folder, folder.parent / "out"), load]


def spoil_index(folder: Path, random: Random) -> list[Command]:
    checkpoint = folder / "there"
    _json_file(checkpoint / forging.INDEX, random)
    forging.seal(checkpoint)
    return _open(checkpoint)


def spoil_torch_index(folder: Path, random: Random) -> list[Command]:
    checkpoint = folder / "there"
    content = (checkpoint / forging.TORCH_INDEX).read_bytes()
    if random.random() < 0.6:
        index = pickle.loads(content)
        entry = random.choice(list(index.state_dict_metadata.values()))
        place = random.choice(list(index.storage_data.values()))
        value: Any = mutated([0], random)
        name, owner = random.choice(
            [("size", entry), ("chunks", entry), ("properties", entry), ("offset", place), ("length", place),
             ("relative_path", place), ("state_dict_metadata", index), ("storage_data", index), ("storage_meta", index)]
        )  # fmt: skip
        setattr(owner, name, value[0] if isinstance(value, list) and value else value)
        content = pickle.dumps(index)
    else:
        content = flipped(content, random)
    forging.put_torch_index(checkpoint, content)
    return _open(checkpoint)


def spoil_manifest(folder: Path, random: Random) -> list[Command]:
    checkpoint = folder / "there"
    body = json.loads((checkpoint / forging.MANIFEST).read_text())
    body["common"] = {
        "conversion": {"tensor": 1, "pipeline": 1}, "stage": "evolve",
        "position": {"iteration": 1, "step": 2, "total_steps": 3, "temperature": 1.0},
    }  # fmt: skip
    del body["sha256"]
    forging.write_manifest(checkpoint, mutated(body, random))
    if random.random() < 0.1:
        _bytes_of(checkpoint / forging.MANIFEST, random)
    return _open(checkpoint)


def spoil_piece(folder: Path, random: Random) -> list[Command]:
    checkpoint = folder / "there"
    _bytes_of(checkpoint / random.choice(("__0_0.distcp", "__0_0.distcp", "common.pt", "metadata.json")), random)
    forging.seal(checkpoint)
    return _open(checkpoint)


# ---------------------------------------------------------------------------------------------------------------- runs


def _make_run(folder: Path) -> None:
    make_run(folder / "run", iterations=1, queries=3)


def _report(folder: Path) -> list[Command]:
    from mstar_mega.report.summary import write_summary

    return [["report", str(folder)], lambda: write_summary(folder)]


def spoil_metrics(folder: Path, random: Random) -> list[Command]:
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines()
    for _ in range(random.choice((1, 2, 6))):
        at = random.randrange(len(lines))
        try:
            lines[at] = as_text(mutated(json.loads(lines[at]), random), random)
        except ValueError:
            lines[at] = DEEP
    path.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    return _report(folder / "run")


def _make_rollouts(folder: Path) -> None:
    """Without events there is nothing to draw, which would take all the time."""
    (folder / "run").mkdir()
    write_rollouts(folder / "run", 1, 3)


def spoil_rollouts(folder: Path, random: Random) -> list[Command]:
    directory = folder / "run/rollouts/iteration_0001"
    block = directory / "block_00000.jsonl"
    header, *groups = block.read_text().split("\n")[:-1]
    if random.random() < 0.7:
        at = random.randrange(len(groups))
        groups[at] = as_text(mutated(json.loads(groups[at]), random), random).replace("\n", " ")
        body = "".join(f"{group}\n" for group in groups).encode(errors="surrogatepass")
        known = {**json.loads(header), "sha256": hashlib.sha256(body).hexdigest()}
        if random.random() < 0.2:
            known = mutated(known, random)
        block.write_bytes(json.dumps(known).encode() + b"\n" + body)
    else:
        _json_file(directory / "selected.json", random)
    return _report(folder / "run")


# --------------------------------------------------------------------------------------------------------- data, YAML


def _make_rows(folder: Path) -> None:
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
        _bytes_of(path, random)
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


def _make_benchmarks(folder: Path) -> None:
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
            _bytes_of(data, random)
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
        _bytes_of(path, random)


def _make_settings(folder: Path) -> None:
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
        _bytes_of(path, random)
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


TARGETS: dict[str, Target] = {
    "config": Target(_make_hf, spoil_config, 80),
    "weight_map": Target(_make_hf, spoil_weight_map, 20),
    "safetensors": Target(_make_hf, spoil_safetensors, 20),
    "tokenizer": Target(_make_tokenizers, spoil_tokenizer, 40),
    "index": Target(_make_checkpoint, spoil_index, 20),
    "torch_index": Target(_make_checkpoint, spoil_torch_index, 20),
    "manifest": Target(_make_checkpoint, spoil_manifest, 20),
    "piece": Target(_make_checkpoint, spoil_piece, 15),
    "metrics": Target(_make_run, spoil_metrics, 6),
    "rollouts": Target(_make_rollouts, spoil_rollouts, 25),
    "rows": Target(_make_rows, spoil_rows, 6),
    "benchmark": Target(_make_benchmarks, spoil_benchmark, 40),
    "settings": Target(_make_settings, spoil_settings, 6),
}


def copy_of(good: Path, work: Path) -> Path:
    """A fresh copy to spoil."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copytree(good, work / "given", symlinks=True)
    return work / "given"
