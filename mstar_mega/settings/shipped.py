"""The configs that come with the program: ``--config digits`` by name, ``mstar init digits`` copies one."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"
"""In a checkout a link to ``examples/configs``."""


@functools.cache
def shipped_names() -> tuple[str, ...]:
    """Their names: file names without ``.yaml``."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def shipped(name: str) -> Path:
    """The file of a shipped config. Raises ValueError with the names that there are."""
    if name in shipped_names():
        return FOLDER / f"{name}.yaml"
    raise ValueError(f"there is no config '{name}'; {_advice(name)}")


def config_file(text: str) -> Path:
    """What ``--config`` means: a file, or else the name of a shipped config. Raises ValueError where it is neither."""
    path = Path(text)
    if path.exists():
        return path
    if text in shipped_names():
        return shipped(text)
    stem = path.stem if path.suffix in (".yaml", ".yml") else text
    if stem in shipped_names():
        # The path of a checkout, given where there is none.
        advice = f"did you mean --config {stem}?"
        raise ValueError(f"cannot read the settings file {text}: No such file or directory; {advice}")
    if path.suffix or len(path.parts) > 1:
        raise ValueError(f"cannot read the settings file {text}: No such file or directory")
    raise ValueError(f"--config {text}: there is no such file, and no config of that name; {_advice(text)}")


def first_comment(name: str) -> str:
    """What a shipped config says about itself, in its first sentence."""
    lines: list[str] = []
    for line in shipped(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    text = " ".join(lines)
    for mark in (". ", ": "):
        text = text.partition(mark)[0]
    return text.removesuffix(".")


def _advice(name: str) -> str:
    near = difflib.get_close_matches(name, shipped_names(), n=1)
    meant = f"did you mean '{near[0]}'? If not, " if near else ""
    return f"{meant}there are {', '.join(shipped_names())}"
