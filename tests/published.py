"""Where the published outputs and genuine benchmark rows lie, if they do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "shared/data"
BENCHMARKS, RESULTS, VECTORS = DATA / "benchmarks", DATA / "published_results", DATA / "scoring_vectors"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the reference data are not beside the project")


def lines(path: Path) -> list[Any]:
    """The rows of JSON lines, also compressed."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
