"""README.md of an exported policy: what it is, how it was trained, what it scored, and with which versions."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from pathlib import Path, PurePath
from typing import Any

import yaml

from mstar_mega import __version__
from mstar_mega.config import Config
from mstar_mega.platform.terminal import one_line
from mstar_mega.report.run import load_run
from mstar_mega.report.summary import summarize
from mstar_mega.settings.tree import flatten

CARD = "README.md"
ORIGINAL = "README.original.md"
"""The base model's own card, where it has one."""
_PATHS = ("run.dir", "data.path", "data.images", "data.dir", "data.warmup_file", "model.checkpoint", "prm.checkpoint")
"""Settings whose folders are nobody else's business."""
_PLAIN = re.compile(r"[\w@%+=:,./\[\]-]*")
_NOT_SHOWN = ("run.", "parallel.", "kernels.", "report.", "benchmark.")


def model_card(checkpoint: Path, config: Config, layout: str) -> str:
    """The card of a policy whose checkpoint lies in a run directory. ``layout``: original or native."""
    run = load_run(checkpoint.absolute().parents[2])
    summary = summarize(run)
    head = {
        "library_name": "transformers" if layout == "native" else "mstar-mega",
        "pipeline_tag": "image-text-to-text",
        "tags": ["multimodal", "reasoning", "self-evolving", "mstar", config.model.family],
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {one_line(config.model.family)}, trained on its own answers",
        "",
        f"Written by mstar_mega {__version__} from `{_shown(checkpoint.name)}` of the run "
        f"`{_shown(checkpoint.absolute().parents[2].name)}`. The recipe is that of *Diving into Self-Evolving Training "
        "for Multimodal Reasoning* (arXiv 2412.17451).",
        "",
        "## Training",
        "",
        f"- method {config.evolve.method}, {_count(summary['responses_generated'])} responses generated, "
        f"{_count(summary['responses_selected'])} selected by `{_shown(config.selection.rule)}`",
        f"- data `{_shown(config.data.name)}`; seed {config.seed}",
        f"- base: {_base(config)}",
        "",
        "## Scores",
        "",
        "| greedy accuracy on the test queries | |",
        "|---|---|",
        f"| warm-up | {_percent(summary['accuracy']['warmup'])} |",
        f"| this run's newest | {_percent(summary['accuracy']['final'])} |",
        "",
        "## How to train it again",
        "",
        "```",
        f"mstar evolve {' '.join(_arguments(config)) or '(every setting at its default)'}",
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {_version(name)}" for name in ("torch", "megatron-core")) + ".",
        "",
        "Known limits, licence and intended use are for its author to add; the base model's licence applies as well.",
    ]
    return "\n".join(lines) + "\n"


def _base(config: Config) -> str:
    path = config.model.checkpoint
    return f"`{_shown(PurePath(path).name)}`" if path else f"random weights of size `{_shown(config.model.size)}`"


def _arguments(config: Config) -> list[str]:
    """The settings that are not the defaults; of paths the last part."""
    now, default = flatten(config), flatten(Config())
    return [
        f"--{name} {_argument(name, value)}"
        for name, value in now.items()
        if value != default[name] and not name.startswith(_NOT_SHOWN)
    ]


def _argument(name: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if name in _PATHS:
        return _shown(shlex.quote(PurePath(str(value)).name))
    text = str(value).replace(" ", "")
    return _shown(text if _PLAIN.fullmatch(text) else shlex.quote(text))  # it will be copied into a shell


def _shown(text: str) -> str:
    """Text of a run inside a line of markdown."""
    return one_line(text).replace("`", "'").replace("<", "&lt;")


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f}%"


def _count(value: int | None) -> str:
    return "no" if value is None else f"{value:,}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
