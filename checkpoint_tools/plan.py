"""What fits: memory by part for a layout, and the layout to take on so many GPUs.

mstar plan --config FILE --gpus 8 --memory 80GB
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from mstar_mega import settings
from mstar_mega.checkpoint_tools.maps import ModelMap, map_of
from mstar_mega.checkpoint_tools.memory import Layout, RankMemory, is_possible, rank_memory
from mstar_mega.checkpoint_tools.published import PUBLISHED
from mstar_mega.config import Config
from mstar_mega.models.description import MODEL_FILES, read_config
from mstar_mega.settings_rules import validate

USABLE = 0.9
"""Share of a GPU's memory to plan for; the rest is the driver's, the libraries' and what fragments."""
_LARGEST_TENSOR = 8
"""Tensor ranks talk in every layer: they belong on one node."""
_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Choice:
    """A layout and what it needs."""

    layout: Layout
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


def bytes_of(text: str) -> int:
    """``80GB``, ``79.6GiB`` or plain bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS or not float(found[1]):
        raise ValueError(f"--memory {text!r} is not an amount of memory; write for example 80GB or 79GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


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


def choices(model: ModelMap, config: Config, gpus: int, tokens: int) -> list[Choice]:
    """Every layout that uses all GPUs, the least cut first, for micro-batches of so many tokens."""
    found = []
    for tensor in range(1, min(gpus, _LARGEST_TENSOR) + 1):
        for pipeline in range(1, gpus // tensor + 1):
            if gpus % (tensor * pipeline) or not is_possible(model, tensor, pipeline):
                continue
            layout = Layout(tensor, pipeline, tokens, gpus // (tensor * pipeline))
            found.append(Choice(layout, rank_memory(model, config, layout)))
    # Of equal cuts the one with fewer stages: a pipeline idles at both ends of a step.
    return sorted(found, key=lambda choice: (-choice.layout.data, choice.layout.pipeline))


def recommend(model: ModelMap, config: Config, gpus: int, memory: int) -> Choice | None:
    """The least cut layout that fits, with the largest micro-batch that still does; None where nothing fits.

    Micro-batches from 1/8 to 4 times the settings' are tried, but a smaller one only where the settings' fits nowhere.
    """
    wanted = config.evolve.optimizer.microbatch_tokens
    for size in (wanted, wanted // 2, wanted // 4, wanted // 8):
        for choice in choices(model, config, gpus, size):
            if choice.largest.total > memory * USABLE:
                continue
            if size < wanted:
                return choice
            same = (choice.layout.tensor, choice.layout.pipeline)
            for larger in (4 * wanted, 2 * wanted):
                for other in choices(model, config, gpus, larger):
                    cut = (other.layout.tensor, other.layout.pipeline)
                    if cut == same and other.largest.total <= memory * USABLE:
                        return other
            return choice
    return None


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


def report(config: Config, gpus: int, memory: int) -> str:
    """What ``mstar plan`` prints."""
    model, where = model_of(config)
    values = sum(prod(source.shape) for mapping in model.mappings for source in mapping.sources)
    tokens = config.evolve.optimizer.microbatch_tokens
    usable = memory * USABLE / 1e9
    lines = [
        f"{model.family}, sizes {where}: {values:,} parameters in {config.model.precision}",
        f"{gpus} GPUs of {memory / 1e9:.1f} GB, of which {usable:.1f} GB are planned for",
    ]
    everything = choices(model, config, gpus, tokens)
    cut = (config.parallel.tensor, config.parallel.pipeline)
    own = [choice for choice in everything if (choice.layout.tensor, choice.layout.pipeline) == cut]
    lines += ["", f"The settings: {own[0]}, {_verdict(own[0], memory)}", table(own[0])] if own else [
        "", f"The settings' tensor {cut[0]} x pipeline {cut[1]} is not possible for this model on {gpus} GPUs"
    ]  # fmt: skip
    if own and own[0].layout.data > 1 and not config.parallel.distributed_optimizer:
        parallel = replace(config.parallel, distributed_optimizer=True)
        shared = Choice(own[0].layout, rank_memory(model, replace(config, parallel=parallel), own[0].layout))
        lines.append(f"  with --parallel.distributed_optimizer true: {_verdict(shared, memory)}")
    best = recommend(model, config, gpus, memory)
    if best is None:
        lines += ["", "Nothing fits: use more GPUs, or lower generation.slots and the micro-batch"]
    else:
        lines += ["", f"Recommended: {best}", table(best), "", *_arguments(best)]
    lines += ["", f"All layouts, with micro-batches of {tokens} tokens:"]
    lines += [f"  {choice}: {_verdict(choice, memory)}" for choice in everything]
    lines += ["", "Activations, cache and prefill are upper bounds from the sizes, not measurements."]
    return "\n".join(lines)


def _verdict(choice: Choice, memory: int) -> str:
    needed = choice.largest.total
    return f"{needed / 1e9:.1f} GB, {'fits' if needed <= memory * USABLE else 'does not fit'}"


def _arguments(choice: Choice) -> Sequence[str]:
    layout = choice.layout
    return [
        f"  --parallel.tensor {layout.tensor} --parallel.pipeline {layout.pipeline} "
        + " ".join(
            f"--{stage}.optimizer.microbatch_tokens {layout.microbatch_tokens}" for stage in ("warmup", "prm", "evolve")
        )
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``mstar plan``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="settings of the run, as for mstar evolve")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the job, all nodes together")
    parser.add_argument("--memory", required=True, metavar="AMOUNT", help="memory of one GPU, for example 80GB")


def run(options: argparse.Namespace) -> None:
    """``mstar plan``."""
    if options.gpus < 1:
        raise ValueError(f"--gpus is {options.gpus}: it must be at least 1")
    config = settings.parse(["--config", options.config], prog="mstar plan")
    validate(config)
    print(report(config, options.gpus, bytes_of(options.memory)))
