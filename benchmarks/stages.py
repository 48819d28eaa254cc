"""Tokens per second of generating, scoring and training, and images per second of the vision tower.

    .venv/bin/python benchmarks/stages.py
    OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 benchmarks/stages.py [--tensor 2 | --pipeline 2]

Each stage is the project's own code on a policy with random weights and the built-in task's images. Every model copy
does a full share of the work, so with two copies the rates are those of the whole job. A response has a fixed number of
tokens, because random weights stop anywhere.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from environment import environment, write_result

from mstar_mega.config import Config
from mstar_mega.data.digits import task as digits
from mstar_mega.data.types import Group, Query, Response, Step
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.build import build_family, build_model
from mstar_mega.models.families.base import Family
from mstar_mega.models.inference import inference
from mstar_mega.models.lmm import LMM
from mstar_mega.platform import distributed
from mstar_mega.platform.distributed import barrier, broadcast_object
from mstar_mega.platform.memory import peak_memory_bytes
from mstar_mega.rewards.process import score_groups
from mstar_mega.rewards.reader import PRM, Reader
from mstar_mega.training.batches import TrainGroup
from mstar_mega.training.trainer import Trainer

TRAINED_PER_QUERY = 2
STEPS_PER_RESPONSE = 4


class Endless:
    """A vocabulary in which nothing ends a response."""

    def __init__(self, family: Family) -> None:
        self.stop_tokens = frozenset({-1})
        self.banned_tokens = family.banned_tokens


def generate_stage(model: LMM, family: Family, queries: Sequence[Query], config: Config) -> Callable[[], int]:
    """Sampling; counts drawn tokens."""
    engine = Engine(model, Endless(family), config.generation, config.seed)
    samples = config.evolve.responses
    requests = [Request(family.prompt(q), [SampleSpec(key_of(q.id, i)) for i in range(samples)]) for q in queries]
    return lambda: sum(len(sample.tokens) for row in engine.generate(requests, 1.0) for sample in row)


def score_stage(prm: LMM, family: Family, queries: Sequence[Query], config: Config) -> Callable[[], int]:
    """Process scores; counts response tokens."""
    length = config.generation.max_new_tokens
    ends = [length * (i + 1) // STEPS_PER_RESPONSE for i in range(STEPS_PER_RESPONSE)]
    steps = [Step(start, end, "") for start, end in zip([0, *ends], ends, strict=False)]
    tokens = plain_tokens(family, length)
    groups = [Group(q, [Response(i, tokens, "", steps=steps) for i in range(config.evolve.responses)]) for q in queries]

    def run() -> int:
        score_groups(PRM(prm, Reader(family.prompt)), groups, config.prm.reduction, config.generation.prefill_tokens)
        return len(groups) * config.evolve.responses * length

    return run


def train_stage(model: LMM, family: Family, queries: Sequence[Query], config: Config) -> Callable[[], int]:
    """One optimizer step; counts response tokens, this model copy's share."""
    trainer = Trainer(model, config.evolve.optimizer, family.prompt, total_steps=1000)
    tokens = plain_tokens(family, config.generation.max_new_tokens)
    groups = [TrainGroup(query, [tokens] * TRAINED_PER_QUERY) for query in queries]
    # The trainer wants the whole job's batch and takes every copy's share of it.
    copies = distributed.layout().data_size
    return lambda: trainer.step(groups * copies).tokens // copies


def vision_stage(model: LMM, family: Family, queries: Sequence[Query]) -> Callable[[], int]:
    """Vision tower and connector; counts images. Ranks without them wait."""
    pixels = [pixels for q in queries if (pixels := family.prompt(q).pixels) is not None]

    def run() -> int:
        if model.pre_process:
            with inference(model):
                model.connector(model.vision(torch.cat(pixels)))
        return len(pixels)

    return run


def plain_tokens(family: Family, length: int) -> list[int]:
    """``length`` token ids that may be drawn."""
    allowed = sorted({*range(family.language.vocab)} - {*family.banned_tokens})
    return [allowed[i % len(allowed)] for i in range(length)]


def rate(run: Callable[[], int], repetitions: int) -> dict[str, Any]:
    """Units per second of the whole job: median over repetitions, after one that does not count."""
    run()
    rates = []
    for _ in range(repetitions):
        barrier()
        started = time.perf_counter()
        units = run() * distributed.layout().data_size
        barrier()
        rates.append(round(units / (time.perf_counter() - started), 1))
    return {"median": statistics.median(rates), "all": rates}


def build_queries(config: Config, count: int) -> Sequence[Query]:
    """Labelled queries of the built-in task; their images live in a temporary directory while this runs."""
    config.data.labelled_queries = count
    config.data.warmup_examples = config.data.unlabelled_queries = 0
    config.data.validation_queries = config.data.test_queries = 1
    main = distributed.layout().is_main
    directory = broadcast_object(tempfile.mkdtemp(prefix="mstar_stages_") if main else "")
    task = broadcast_object(digits.build(config.data, Path(directory), config.seed) if main else None)
    assert task is not None
    return task.labelled


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="digits", help="a size of the internvl2 family")
    parser.add_argument("--queries", type=int, default=64, help="per model copy")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--sequence", action="store_true")
    parser.add_argument("--out", default=None, help="directory of the JSON result (default: benchmarks/results)")
    options = parser.parse_args()
    config = Config()
    config.model.size = options.size
    parallel = config.parallel
    parallel.tensor, parallel.pipeline, parallel.sequence = options.tensor, options.pipeline, options.sequence
    config.generation.max_new_tokens = options.response_tokens
    config.evolve.responses = options.samples
    distributed.initialize(parallel, config.seed)
    place = distributed.layout()
    queries = build_queries(config, options.queries)
    family = build_family(config)
    policy, prm = build_model(config, family), build_model(config, family, head=config.prm.head)
    stages = {
        "generate": ("tokens", generate_stage(policy, family, queries, config)),
        "score": ("tokens", score_stage(prm, family, queries, config)),
        "vision": ("images", vision_stage(policy, family, queries)),
        "train": ("tokens", train_stage(policy, family, queries, config)),
    }
    rates = {}
    for name, (unit, run) in stages.items():
        rates[name] = {"unit": f"{unit} per second", **rate(run, options.repetitions)}
        if place.is_main:
            print(f"{name:9s} {rates[name]['median']:10.1f} {unit}/s", flush=True)
    memory = sum(distributed.all_gather_objects(peak_memory_bytes(), torch.distributed.group.WORLD))
    if place.is_main:
        result = {
            "processes": place.world_size,
            "settings": vars(options),
            **environment(),
            "parallel": {**asdict(parallel), "data": place.data_size},
            "prompt_tokens": statistics.mean(len(family.prompt(query).tokens) for query in queries),
            "rates": rates,
            "peak_memory_bytes": memory,
        }
        name = f"stages_{options.size}_t{place.tensor_size}p{place.pipeline_size}d{place.data_size}"
        print(f"peak memory of all processes: {memory / 2**20:.0f} MiB")
        print(f"written: {write_result(name, result, options.out)}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
