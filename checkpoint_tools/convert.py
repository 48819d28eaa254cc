"""Checkpoints between Hugging Face and megatron-core, tensor by tensor: every source used once, every target filled.

``mstar convert hf-to-megatron --hf DIR --out DIR`` and ``mstar convert megatron-to-hf --checkpoint DIR --out DIR``,
alone or under torchrun, whose ranks share the work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mstar_mega.checkpoint_tools.hf_files import HFWeights, HFWriter, TensorInfo, finish_shards
from mstar_mega.checkpoint_tools.maps import ModelMap, map_of
from mstar_mega.checkpoint_tools.megatron_files import MegatronWeights, MegatronWriter, Parameter, write_index
from mstar_mega.checkpoint_tools.model_card import CARD, ORIGINAL, model_card
from mstar_mega.checkpoint_tools.named import write_model_files
from mstar_mega.checkpoint_tools.native import to_native
from mstar_mega.checkpoint_tools.native_files import REPLACED, native_files
from mstar_mega.checkpoint_tools.refusals import (
    check_layout,
    check_parameters,
    check_sources,
    check_tokenizer,
    must_be_free,
)
from mstar_mega.checkpoint_tools.runs import newest_policy, run_config
from mstar_mega.config import ParallelConfig
from mstar_mega.models.copying import copy_model_files, model_files
from mstar_mega.models.description import MODEL_FILES, read_config
from mstar_mega.models.mapping import Mapping, head_of
from mstar_mega.platform import distributed
from mstar_mega.platform.distributed import FailedTogether, broadcast_object, on_main, together
from mstar_mega.platform.files import sync_tree
from mstar_mega.platform.inputs import must_be_inside
from mstar_mega.platform.terminal import say
from mstar_mega.training.checkpoint import write_checkpoint, write_plain_state
from mstar_mega.training.manifest import verify_checkpoint

SHARD_BYTES = 10**9
"""Largest shard written for Hugging Face: the only one held in memory."""
HEAD_KEY = "mstar_head"
"""In config.json of an exported PRM: which score head it has."""
Export = Callable[[dict[str, Any], ModelMap, Path], tuple[dict[str, Any], ModelMap]]
"""Config and map of the original's layout, and where the tokenizer is -> those of another layout."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    out: Path
    family: str
    head: str
    tensors: int
    """Hugging Face tensors read or written."""
    parameters: int
    values: int
    bytes: int
    dtypes: tuple[str, ...]
    seconds: float
    copies: tuple[str, ...] = ()
    """Tied tensors that were stored beside, or instead of, the one that they are a copy of."""

    def __str__(self) -> str:
        tied = f"; {', '.join(self.copies)}: the same as the embedding, kept once" if self.copies else ""
        rate = self.bytes / 1e9 / max(self.seconds, 1e-9)
        return (
            f"{self.out}: {self.family}, {self.head} head, {self.tensors} Hugging Face tensors <-> {self.parameters} "
            f"parameters, {self.values:,} values, {', '.join(self.dtypes)}, {self.bytes / 1e9:.2f} GB in "
            f"{self.seconds:.1f} s ({rate:.2f} GB/s){tied}"
        )


def hf_to_megatron(hf: Path, out: Path, tensor: int = 1, pipeline: int = 1) -> Converted:
    """Write ``out``, a checkpoint that any layout loads and that is cut into files as ``tensor`` x ``pipeline`` reads
    them. Collective.

    Raises ValueError, before anything is written, where the weights are not exactly those of the model in config.json.
    """
    started = time.monotonic()
    must_be_free(out)
    config = read_config(hf)
    model = map_of(config, config.get(HEAD_KEY, "vocabulary"), hf / "config.json")
    weights = HFWeights(hf, model.tied)
    check_sources(hf, model, weights)
    model_files(hf)
    check_tokenizer(hf)
    check_layout(model, tensor, pipeline)
    sizes = [sum(weights.tensors[source.name].bytes for source in mapping.sources) for mapping in model.mappings]
    mine = _share(model.mappings, sizes)

    def write(directory: Path) -> None:
        def write_mine() -> Any:
            writer = MegatronWriter(directory, tensor, pipeline, model.layers, dist.get_rank())
            for mapping in mine:
                writer.add(mapping, _ours(mapping, weights))
            writer.close()
            return writer.stored

        stored = [piece for part in together("convert", write_mine) for piece in part]

        def complete() -> None:
            write_index(directory, stored)
            write_plain_state(directory, {})
            copy_model_files(hf, directory / MODEL_FILES)

        together("finish", on_main(complete))

    common = {
        "conversion": {"family": model.family, "head": model.head, "tensor": tensor, "pipeline": pipeline},
    }
    write_checkpoint(out, write, common)
    return replace(_summary(out, model, weights.tensors.values(), started), copies=tuple(weights.copies))


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    like: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    export: Export | None = None,
) -> Converted:
    """Write ``out``, a Hugging Face directory. Collective.

    ``like``: a Hugging Face directory or converted checkpoint with config and tokenizer, for a checkpoint that has none
    of its own because training wrote it. ``export`` changes config and map to another layout of the same model.
    Raises ValueError, before anything is written, where the checkpoint is not exactly the model of the config.
    """
    must_be_free(out)
    checkpoint = Path(broadcast_object(str(newest_policy(checkpoint))))
    verify_checkpoint(checkpoint)
    weights = MegatronWeights(checkpoint)
    made = Path(tempfile.mkdtemp(prefix="mstar_model_files_"))
    try:
        files = _model_files(checkpoint, like, made)
        return _to_hf(checkpoint, weights, files, out, shard_bytes, export)
    finally:
        shutil.rmtree(made)


def _to_hf(
    checkpoint: Path, weights: MegatronWeights, files: Path, out: Path, shard_bytes: int, export: Export | None
) -> Converted:
    started = time.monotonic()
    config = read_config(files)
    model_files(files)
    model = map_of(config, head_of(weights.parameters), files / "config.json")
    check_parameters(checkpoint, model, weights)
    config.pop(HEAD_KEY, None)
    if model.head != "vocabulary":
        config[HEAD_KEY] = model.head
    if files.parent != checkpoint:
        _note_dtype(config, weights)
    extra = native_files(files, dict(config)) if export is to_native else {}
    if export is not None:
        config, model = export(config, model, files)
    temporary = out.with_name(f".{out.name}.tmp")
    sizes = [torch.Size(mapping.shape).numel() for mapping in model.mappings]
    mine = _share(model.mappings, sizes)

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write_mine() -> Any:
        writer = HFWriter(temporary, shard_bytes, dist.get_rank())
        for mapping in mine:
            for source, part in zip(mapping.sources, mapping.to_hf(weights.read(mapping.name)), strict=True):
                writer.add(source.name, part)
        writer.flush()
        return writer.shards

    def complete() -> None:
        finish_shards(temporary, shards)
        copy_model_files(files, temporary)
        for name in REPLACED if extra else ():
            (temporary / name).unlink(missing_ok=True)
        for name, text in extra.items():
            (temporary / name).write_text(text, encoding="utf-8")
        trained = run_config(checkpoint)
        if trained is not None and model.head == "vocabulary":
            if (temporary / CARD).exists():
                (temporary / CARD).rename(temporary / ORIGINAL)
            card = model_card(checkpoint, trained, "native" if export is to_native else "original")
            (temporary / CARD).write_text(card, encoding="utf-8")
        if config != read_config(files):
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (temporary / "config.json").write_text(text, encoding="utf-8")
        sync_tree(temporary)
        temporary.rename(out)

    try:
        together("prepare", on_main(prepare))
        shards = [shard for part in together("convert", write_mine) for shard in part]
        together("finish", on_main(complete))
    except FailedTogether as error:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"{out} could not be written ({error}); nothing is left of it") from error
    return _summary(out, model, weights.parameters.values(), started)


def _ours(mapping: Mapping, weights: HFWeights) -> Tensor:
    tensors = [weights.read(source.name) for source in mapping.sources]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        names = ", ".join(
            f"{source.name} ({tensor.dtype})" for source, tensor in zip(mapping.sources, tensors, strict=True)
        )
        raise ValueError(f"{names}: these are one parameter here and must have one dtype")
    return mapping.to_ours(tensors)


def _model_files(checkpoint: Path, like: Path | None, made: Path) -> Path:
    """Where config.json and the tokenizer are; those of a named size are written into ``made``."""
    own, config = checkpoint / MODEL_FILES, run_config(checkpoint)
    if like is None and own.is_dir():
        must_be_inside(checkpoint, own, "its files would be published with the model")
        return own
    if like is None and config is not None and config.model.checkpoint is not None:
        like = Path(config.model.checkpoint)
    if like is None and config is not None:
        write_model_files(config, made)
        return made
    if like is None:
        raise ValueError(
            f"{checkpoint} has no {MODEL_FILES}/ with config.json and tokenizer: training wrote it. Add --like "
            "DIR: the Hugging Face directory, or the converted checkpoint, that the run started from"
        )
    inner = like / MODEL_FILES
    return inner if inner.is_dir() else like


def _note_dtype(config: dict[str, Any], weights: MegatronWeights) -> None:
    """Let the config say in which dtype training left the weights."""
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in weights.parameters.values()}
    for key in ("torch_dtype", "dtype"):
        if key in config and len(dtypes) == 1:
            config[key] = next(iter(dtypes))


def _share(mappings: Sequence[Mapping], sizes: Sequence[int]) -> list[Mapping]:
    """This rank's part of the work: about as many bytes as any other's, in the map's order."""
    loads = [0] * dist.get_world_size()
    owner = {}
    for number in sorted(range(len(mappings)), key=lambda number: -sizes[number]):
        owner[number] = loads.index(min(loads))
        loads[owner[number]] += sizes[number]
    return [mapping for number, mapping in enumerate(mappings) if owner[number] == dist.get_rank()]


def _summary(out: Path, model: ModelMap, pieces: Collection[TensorInfo | Parameter], started: float) -> Converted:
    return Converted(
        out=out,
        family=model.family,
        head=model.head,
        tensors=sum(len(mapping.sources) for mapping in model.mappings),
        parameters=len(model.mappings),
        values=sum(torch.Size(source.shape).numel() for mapping in model.mappings for source in mapping.sources),
        bytes=sum(piece.bytes for piece in pieces),
        dtypes=tuple(sorted({str(piece.dtype).removeprefix("torch.") for piece in pieces})),
        seconds=time.monotonic() - started,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``mstar convert``."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="hf-to-megatron|megatron-to-hf")
    there = ways.add_parser("hf-to-megatron", help="Hugging Face directory -> checkpoint", allow_abbrev=False)
    there.add_argument("--hf", type=Path, required=True, metavar="DIR", help="config.json, tokenizer, safetensors")
    there.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint; must not exist")
    there.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks to cut for (default: %(default)s)")
    there.add_argument("--pipeline", type=int, default=1, help="pipeline stages to cut for (default: %(default)s)")
    back = ways.add_parser("megatron-to-hf", help="checkpoint -> Hugging Face directory", allow_abbrev=False)
    back.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a checkpoint or a run directory")
    back.add_argument("--out", type=Path, required=True, metavar="DIR", help="the directory; must not exist")
    back.add_argument("--like", type=Path, metavar="DIR", help="where a trained checkpoint's config and tokenizer are")
    back.add_argument(
        "--layout", choices=["original", "native"], default="original",
        help="native: transformers' own names, for families that have them (default: %(default)s)",
    )  # fmt: skip
    back.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="largest shard (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """``mstar convert``. Collective."""
    distributed.initialize(ParallelConfig(), 0)
    if options.way == "hf-to-megatron":
        done = hf_to_megatron(options.hf, options.out, options.tensor, options.pipeline)
    else:
        export = to_native if options.layout == "native" else None
        done = megatron_to_hf(options.checkpoint, options.out, options.like, options.shard_bytes, export)
    if dist.get_rank() == 0:
        say(done)
    distributed.shutdown()


if __name__ == "__main__":
    from mstar_mega.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
