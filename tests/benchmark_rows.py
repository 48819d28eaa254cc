"""Small benchmark files for tests, and how they are read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from mstar_mega.config import BenchmarkConfig
from mstar_mega.evaluation.benchmarks import find, load_problems
from mstar_mega.evaluation.load import Loaded


def load(name: str, path: Path, **settings: Any) -> Loaded:
    return load_problems(find(name), path, BenchmarkConfig(**settings))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def m3cot_row(id: str, **changes: Any) -> dict[str, Any]:
    row = {"id": id, "question": "q?", "choices": ["None", "nan"], "context": "", "answer": "B", "domain": "science"}
    return row | {"topic": "theory", "image": {"bytes": png(), "path": f"{id}.png"}} | changes


def write_m3cot(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row | {"image": None}) + "\n" for row in rows))
    return path
