"""What all targets share: a spoiled file, and what is to be done with it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.mutate import as_text, flipped, mutated

Random = random.Random
Command = list[str] | Callable[[], Any]
"""Arguments of ``mstar``, or a function that may raise ValueError or OSError."""


def spoil_json(path: Path, random: Random) -> None:
    path.write_text(as_text(mutated(json.loads(path.read_text()), random), random), errors="surrogatepass")


def spoil_bytes(path: Path, random: Random) -> None:
    path.write_bytes(flipped(path.read_bytes(), random))
