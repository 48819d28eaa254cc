"""What fits: memory by part for a layout, and the layout to take on so many GPUs.

mstar plan --config FILE ... --gpus 8 --memory 80GB --NAME VALUE ...
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

from mstar_mega import settings
from mstar_mega.checkpoint_tools.maps import ModelMap, map_of
from mstar_mega.checkpoint_tools.memory import Layout, RankMemory, auto_slots, is_possible, own_prm, rank_memory
from mstar_mega.checkpoint_tools.published import PUBLISHED
from mstar_mega.config import Config, ParallelConfig
from mstar_mega.models.description import MODEL_FILES, read_config
from mstar_mega.models.mapping import head_of
from mstar_mega.platform.terminal import say
from mstar_mega.recipe.method import needs_prm
from mstar_mega.settings.rules import validate
from mstar_mega.training.manifest import read_index

USABLE = 0.9
"""Share of a GPU's memory to plan for; the rest is the driver's, the libraries' and what fragments."""
_LARGEST_TENSOR = 8
"""Tensor ranks talk in every layer: they belong on one node."""
_STAGES = ("warmup", "prm", "evolve")
_SHARED = "--parallel.distributed_optimizer true"
_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LEAST_MEMORY = 10**9
"""No GPU that trains has less: such an amount has the wrong unit."""


@dataclass(frozen=True)
class Choice:
    """A layout, its settings (the group parallel) and what it needs."""

    layout: Layout
    parallel: ParallelConfig
    stages: list[RankMemory]

    @property
    def largest(self) -> RankMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    def __str__(self) -> str:
        layout = self.layout
        return (
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}, "
            f"micro-batches of {layout.microbatch_tokens} tokens"
        )

    def fits(self, memory: int) -> bool:
        """On GPUs of so many bytes."""
        return self.largest.total <= memory * USABLE


def bytes_of(text: str) -> int:
    """``80GB`` or ``79.6GiB``. Raises ValueError for anything else, a number without unit and less than 1 GB too."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found and not found[2]:
        raise ValueError(f"--memory {text!r} has no unit; write for example 80GB or 79GiB")
    if not found or found[2].upper() not in _UNITS:
        raise ValueError(f"--memory {text!r} is not an amount of memory; write for example 80GB or 79GiB")
    amount = int(float(found[1]) * _UNITS[found[2].upper()])
    if amount < _LEAST_MEMORY:
        raise ValueError(f"--memory {text!r} is less than 1 GB; write for example 80GB or 79GiB")
    return amount


def model_of(config: Config) -> tuple[ModelMap, str]:
    """The policy of the settings and where its sizes come from. Raises ValueError where they are not known."""
    family = config.model.family
    if config.model.checkpoint is not None and (folder := Path(config.model.checkpoint) / MODEL_FILES).is_dir():
        model, where = map_of(read_config(folder), "vocabulary", folder / "config.json"), str(folder)
    elif config.model.checkpoint is not None and family in PUBLISHED:
        where = f"as published ({config.model.checkpoint} is not there yet)"
        model = map_of(PUBLISHED[family], "vocabulary", Path("config.json"))
    else:
        raise ValueError(
            f"model.checkpoint is {config.model.checkpoint} and model.family {family}: set model.checkpoint to a "
            f"converted checkpoint, or to where it will be for one of {', '.join(PUBLISHED)}"
        )
    if model.family != family:
        raise ValueError(f"model.checkpoint {config.model.checkpoint} is of family {model.family}, not {family}")
    return model, where


def prm_of(config: Config) -> ModelMap | None:
    """The PRM of ``prm.checkpoint``; None where it is made from the policy, or none is needed.

    Raises ValueError where it is not there.
    """
    return _outside(config.prm.checkpoint) if config.prm.checkpoint is not None and needs_prm(config) else None


@lru_cache(maxsize=4)
def _outside(path: str) -> ModelMap:
    folder = Path(path) / MODEL_FILES
    if folder.is_dir():
        return map_of(read_config(folder), head_of(read_index(Path(path)).tensors), folder / "config.json")
    if not (Path(path) / settings.CONFIG_FILE).is_file():
        raise ValueError(
            f"prm.checkpoint {path} is neither a converted checkpoint nor a run directory: it is not there"
        )
    run = settings.load(path)
    return own_prm(model_of(run)[0], run)


def settings_tokens(config: Config) -> int:
    """The settings' bound of a micro-batch: that of the stage which has the highest."""
    return max(stage.optimizer.microbatch_tokens for stage in (config.warmup, config.prm, config.evolve))


def choices(model: ModelMap, config: Config, gpus: int, tokens: int, shared: bool | None = None) -> list[Choice]:
    """Every layout that uses all GPUs, the least cut first, for micro-batches of so many tokens.

    ``shared``: with a distributed optimizer or without (None: as in the settings). Sequence parallelism is the
    settings', but off where the tensor size is 1.
    """
    found = []
    outside = prm_of(config)
    models = [model] if outside is None else [model, outside]
    for tensor in range(1, min(gpus, _LARGEST_TENSOR) + 1):
        for pipeline in range(1, gpus // tensor + 1):
            first = config.parallel.first_stage_layers if pipeline > 1 else None
            if gpus % (tensor * pipeline) or not all(is_possible(one, tensor, pipeline, first) for one in models):
                continue
            parallel = ParallelConfig(
                tensor=tensor,
                pipeline=pipeline,
                first_stage_layers=first,
                sequence=config.parallel.sequence and tensor > 1,
                distributed_optimizer=config.parallel.distributed_optimizer if shared is None else shared,
            )
            layout = Layout(tensor, pipeline, tokens, gpus // (tensor * pipeline))
            stages = rank_memory(model, replace(config, parallel=parallel), layout, outside)
            found.append(Choice(layout, parallel, stages))
    # Of equal cuts the one with fewer stages: a pipeline idles at both ends of a step.
    return sorted(found, key=lambda choice: (-choice.layout.data, choice.layout.pipeline))


def both_ways(model: ModelMap, config: Config, gpus: int, tokens: int) -> list[tuple[Choice, Choice | None]]:
    """:func:`choices` by the settings, each beside itself with a distributed optimizer.

    None where that is no other: the settings have it already, or there is one copy of the model.
    """
    own = choices(model, config, gpus, tokens)
    if config.parallel.distributed_optimizer:
        return [(choice, None) for choice in own]
    shared = choices(model, config, gpus, tokens, shared=True)
    return [(one, other if one.layout.data > 1 else None) for one, other in zip(own, shared, strict=True)]


def recommend(model: ModelMap, config: Config, gpus: int, memory: int) -> Choice | None:
    """The least cut layout that fits, with the largest micro-batch that still does; None where nothing fits.

    A cut that fits only with a distributed optimizer gets one. Micro-batches from 1/8 to 4 times the settings' are
    tried, but a smaller one only where the settings' fits nowhere.
    """
    wanted = settings_tokens(config)
    for size in (wanted, wanted // 2, wanted // 4, wanted // 8):
        for ways in both_ways(model, config, gpus, size):
            for choice in ways:
                if choice is None or not choice.fits(memory):
                    continue
                return _with_larger_batches(choice, model, config, gpus, memory) if size == wanted else choice
    return None


def _with_larger_batches(choice: Choice, model: ModelMap, config: Config, gpus: int, memory: int) -> Choice:
    """The same layout with micro-batches of 4 or 2 times the size where they fit."""
    for times in (4, 2):
        tokens = times * choice.layout.microbatch_tokens
        for other in choices(model, config, gpus, tokens, choice.parallel.distributed_optimizer):
            if other.parallel == choice.parallel and other.fits(memory):
                return other
    return choice


def table(choice: Choice) -> str:
    """Memory by part and stage, in GB."""
    names = [name for name, _ in choice.stages[0].parts()]
    rows = [["GB per rank", *(f"stage {number}" for number in range(len(choice.stages)))]]
    for number, name in enumerate(names):
        values = [list(stage.parts())[number][1] for stage in choice.stages]
        rows.append([name.replace("_", " "), *(f"{value / 1e9:.2f}" for value in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(["", first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def report(config: Config, gpus: int, memory: int) -> tuple[str, bool]:
    """What ``mstar plan`` prints, and whether any layout fits."""
    model, where = model_of(config)
    values = sum(prod(source.shape) for mapping in model.mappings for source in mapping.sources)
    tokens = settings_tokens(config)
    usable = memory * USABLE / 1e9
    lines = [
        f"{model.family}, sizes {where}: {values:,} parameters in {config.model.precision}",
        f"{gpus} GPUs of {memory / 1e9:.1f} GB, of which {usable:.1f} GB are planned for",
    ]
    everything = both_ways(model, config, gpus, tokens)
    cut = (config.parallel.tensor, config.parallel.pipeline)
    own = [ways for ways in everything if (ways[0].layout.tensor, ways[0].layout.pipeline) == cut]
    if own:
        mine, shared = own[0]
        lines += ["", f"The settings: {mine}, {_verdict(mine, memory)}", table(mine)]
        if shared is not None:
            lines.append(f"  with {_SHARED}: {_verdict(shared, memory)}")
    else:
        lines += [
            "",
            f"The settings' tensor {cut[0]} x pipeline {cut[1]} is not possible for this model on {gpus} GPUs",
        ]
    best = recommend(model, config, gpus, memory)
    if best is None:
        lines += ["", "Nothing fits: use more GPUs, or lower generation.slots and the micro-batch"]
    else:
        optimizer = ", distributed optimizer" if best.parallel.distributed_optimizer else ""
        lines += ["", f"Recommended: {best}{optimizer}", table(best), "", f"  {_arguments(best, config.parallel)}"]
        if config.generation.slots == "auto":
            slots = auto_slots(model, config, best.layout, best.stages, int(memory * USABLE))
            lines += ["", f"generation.slots auto: {slots} slots in this layout"]
    lines += ["", f"All layouts, with micro-batches of {tokens} tokens:"]
    lines += [_row(*ways, memory) for ways in everything]
    if any(shared is not None for _, shared in everything):
        lines += ["", f"Shared: with {_SHARED}."]
    lines += ["", "Activations, cache and prefill are upper bounds from the sizes, not measurements."]
    return "\n".join(lines), best is not None


def _row(choice: Choice, shared: Choice | None, memory: int) -> str:
    beside = "" if shared is None else f"; shared {_verdict(shared, memory)}"
    return f"  {choice}: {_verdict(choice, memory)}{beside}"


def _verdict(choice: Choice, memory: int) -> str:
    return f"{choice.largest.total / 1e9:.1f} GB, {'fits' if choice.fits(memory) else 'does not fit'}"


def _arguments(choice: Choice, settings_own: ParallelConfig) -> str:
    """The settings that make a job of the choice; of sequence and optimizer only what differs from the settings."""
    layout, parallel = choice.layout, choice.parallel
    words = [f"--parallel.tensor {layout.tensor} --parallel.pipeline {layout.pipeline}"]
    if settings_own.sequence and not parallel.sequence:
        words.append("--parallel.sequence false")
    if parallel.distributed_optimizer and not settings_own.distributed_optimizer:
        words.append(_SHARED)
    words += [f"--{stage}.optimizer.microbatch_tokens {layout.microbatch_tokens}" for stage in _STAGES]
    return " ".join(words)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``mstar plan``; all others are settings."""
    parser.usage = "mstar plan --gpus N --memory AMOUNT [--config FILE ...] [--NAME VALUE ...]"
    parser.epilog = "--config and --NAME VALUE are the settings of the run ('mstar evolve --help' lists them)."
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the job, all nodes together")
    parser.add_argument("--memory", required=True, metavar="AMOUNT", help="memory of one GPU, for example 80GB")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """``mstar plan``, with the settings of ``overrides``. Raises SystemExit, with code 1, where nothing fits."""
    if options.gpus < 1:
        raise ValueError(f"--gpus is {options.gpus}: it must be at least 1")
    memory = bytes_of(options.memory)
    config = settings.parse(overrides, prog="mstar plan")
    validate(config)
    text, any_fits = report(config, options.gpus, memory)
    say(text)
    if not any_fits:
        raise SystemExit(1)
