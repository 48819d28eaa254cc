"""The benchmarks by name: the one place that lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mstar_mega.config import BenchmarkConfig
from mstar_mega.evaluation import ai2d, m3cot, mathvista, mmbench, mmstar
from mstar_mega.evaluation.files import Cells
from mstar_mega.evaluation.load import Loaded, load
from mstar_mega.evaluation.problem import Problem, Reading, Rules


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read and scored."""

    name: str
    read: Callable[[Cells], Problem]
    read_response: Callable[[Problem, str, Rules], Reading]
    read_extraction: Callable[[Problem, str | None, Rules], Reading]
    adjust: Callable[[Problem, BenchmarkConfig], Problem] | None = None
    """A problem as the settings' version of the benchmark has it."""
    is_reduced: Callable[[Problem], bool] | None = None
    """Whether the paper's reduced set keeps a problem; None: there is no such set."""


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mathvista", mathvista.read, mathvista.read_response, mathvista.read_extraction, mathvista.adjust),
        Benchmark("m3cot", m3cot.read, m3cot.read_response, m3cot.read_extraction, m3cot.adjust),
        Benchmark("mmstar", mmstar.read, mmstar.read_response, mmstar.read_extraction, None, mmstar.is_reduced),
        Benchmark("mmbench", mmbench.read, mmbench.read_response, mmbench.read_extraction, None, mmbench.is_reduced),
        Benchmark("ai2d", ai2d.read, ai2d.read_response, ai2d.read_extraction),
    )
}


def find(name: str) -> Benchmark:
    """The benchmark of that name. Raises ValueError that lists them."""
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark '{name}': choose one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def load_problems(benchmark: Benchmark, path: Path, settings: BenchmarkConfig) -> Loaded:
    """The problems of a file, the reduced set's where the settings want that. Raises ValueError as ``load``."""
    loaded = load(path, benchmark.read, settings)
    if benchmark.adjust is not None:
        loaded = replace(loaded, problems=[benchmark.adjust(problem, settings) for problem in loaded.problems])
    if not settings.reduced:
        return loaded
    if benchmark.is_reduced is None:
        raise ValueError(f"{benchmark.name} has no reduced set: leave out --reduced")
    kept: Sequence[Problem] = [problem for problem in loaded.problems if benchmark.is_reduced(problem)]
    left_out = [problem.id for problem in loaded.problems if not benchmark.is_reduced(problem)]
    if not kept:
        raise ValueError(f"{path}: no problem belongs to the reduced set of {benchmark.name}")
    return replace(loaded, problems=kept, left_out=[*loaded.left_out, *left_out])
