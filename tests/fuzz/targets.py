"""What is mutated, and what reads it. A target copies a good directory, spoils one file in it, and says what to run."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forging
from hf_directories import make_checkpoint
from report_runs import make_run, write_rollouts
from tiny_families import make_model_directory

from fuzz.data_files import make_benchmarks, make_rows, make_settings, spoil_benchmark, spoil_rows, spoil_settings
from fuzz.mutate import DEEP, as_text, flipped, mutated
from fuzz.spoiling import Command, Random, spoil_bytes, spoil_json

FAMILIES = ("internvl2", "phi3_5_vision", "minicpm_v2_5")


@dataclass(frozen=True)
class Target:
    """One kind of file."""

    make: Callable[[Path], None]
    """A good directory."""
    spoil: Callable[[Path, Random], list[Command]]
    """Spoils a copy of it; returns what to do with it then."""
    cases: int
    """In the tests: a minute for all targets."""


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
    spoil_json(hf / "config.json", random)
    return [_inspect(hf), *([_convert(hf)] if random.random() < 0.3 else [])]


def spoil_weight_map(folder: Path, random: Random) -> list[Command]:
    hf = folder / FAMILIES[0]
    spoil_json(hf / "model.safetensors.index.json", random)
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
        spoil_bytes(shard, random)
    return [_inspect(hf), _convert(hf)]


def _make_tokenizers(folder: Path) -> None:
    for family in FAMILIES:
        make_model_directory(family, folder / family)


def spoil_parts(file: Path, random: Random) -> None:
    """Its few settings rather than one of the thousands of pieces."""
    content = json.loads(file.read_text())
    named = [name for name in content if name not in ("model", "added_tokens")]
    few = {name: content[name] for name in named} | {
        "model": {name: value for name, value in content["model"].items() if name not in ("vocab", "merges")}
    }
    found = mutated(few, random)
    if isinstance(found, dict):
        model = found.get("model")
        content |= found | {"model": content["model"] | (model if isinstance(model, dict) else {})}
    file.write_text(as_text(content, random), errors="surrogatepass")


def spoil_tokenizer(folder: Path, random: Random) -> list[Command]:
    from mstar_mega.models.description import family_from_hf

    hf = folder / random.choice(FAMILIES)
    file = random.choice([path for path in hf.iterdir() if path.name.startswith(("tokenizer", "added"))])
    if file.name == "tokenizer.json" and random.random() < 0.4:
        spoil_parts(file, random)
    elif file.suffix == ".json":
        spoil_json(file, random)
    else:
        spoil_bytes(file, random)
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
    spoil_json(checkpoint / forging.INDEX, random)
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
        spoil_bytes(checkpoint / forging.MANIFEST, random)
    return _open(checkpoint)


def spoil_piece(folder: Path, random: Random) -> list[Command]:
    checkpoint = folder / "there"
    spoil_bytes(checkpoint / random.choice(("__0_0.distcp", "__0_0.distcp", "common.pt", "metadata.json")), random)
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
        spoil_json(directory / "selected.json", random)
    return _report(folder / "run")


# --------------------------------------------------------------------------------------------------------- data, YAML


TARGETS: dict[str, Target] = {
    "config": Target(_make_hf, spoil_config, 60),
    "weight_map": Target(_make_hf, spoil_weight_map, 12),
    "safetensors": Target(_make_hf, spoil_safetensors, 12),
    "tokenizer": Target(_make_tokenizers, spoil_tokenizer, 40),
    "index": Target(_make_checkpoint, spoil_index, 12),
    "torch_index": Target(_make_checkpoint, spoil_torch_index, 12),
    "manifest": Target(_make_checkpoint, spoil_manifest, 12),
    "piece": Target(_make_checkpoint, spoil_piece, 8),
    "metrics": Target(_make_run, spoil_metrics, 3),
    "rollouts": Target(_make_rollouts, spoil_rollouts, 20),
    "rows": Target(make_rows, spoil_rows, 5),
    "benchmark": Target(make_benchmarks, spoil_benchmark, 40),
    "settings": Target(make_settings, spoil_settings, 5),
}


def copy_of(good: Path, work: Path) -> Path:
    """A fresh copy to spoil."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copytree(good, work / "given", symlinks=True)
    return work / "given"
