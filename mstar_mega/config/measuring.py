"""Settings of measures, benchmarks and the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class EvaluationConfig:
    """Accuracy and exploration measures, on validation and test queries."""

    k: int = 16
    """K of Pass@K (temperature 1)."""
    reward_k: int = 2
    """K of Reward-Pass@K."""
    every: int = 1
    """Iterations between validation measurements; 0: only at the start and the end."""
    test_every: int = 1
    """Iterations between measurements of test accuracy; 0: only of the warm-up policy and at the end."""


@dataclass
class BenchmarkConfig:
    """How the predictions on a benchmark are scored (`mstar score`, `mstar evaluate --benchmark`)."""

    rules: Literal["official", "vlmevalkit", "reward"] = "official"
    """official: the benchmark's own authors' rules; vlmevalkit: that toolkit's; reward: extraction and comparison of
    the answer reward in training."""
    integers: Literal["today", "2023"] = "today"
    """MathVista's integer rule: today "18.0" is 18, in the files published in 2023 it is no answer."""
    gold: Literal["file", "table"] = "file"
    """M3CoT: table takes A for social-commonsense-1274, as its published table does and its files do not."""
    ignore_empty: bool = False
    """MathVista: an empty extraction is no answer, instead of the choice with the fewest edits."""
    reduced: bool = False
    """Without the perception categories: MMStar-R, MMBench-R."""
    marker: bool = False
    """Show the rules only what follows a response's last '# Answer' heading, where it has one."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What becomes of unusable rows of the benchmark's file; left out ones are counted and listed."""
    predictions: Literal["count", "refuse"] = "count"
    """What becomes of missing (wrong), repeated (the first counts) and unknown (ignored) predictions: counted and
    listed, or refused."""
    without_image: Literal["refuse", "ask"] = "refuse"
    """Questions whose image cannot be had when a policy is asked: refused, or asked without it and counted."""
    responses: int = 1
    """Responses per question; 1: greedy."""
    temperature: float = 1.0
    """Of more than one response."""


@dataclass
class ReportConfig:
    """What a person looks at."""

    samples_per_iteration: int = 12
    """Queries per iteration in the report's browser."""
