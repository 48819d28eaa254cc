"""What it costs to scatter a query's responses over optimizer steps (optimizer.shuffle responses against queries).

    .venv/bin/python benchmarks/shuffle.py runs/digits          # a run directory with at least one iteration

The responses of the run's iteration are selected again by two rules, cut into steps both ways, and trained on: steps of
both ways take turns, each with about as many responses. A response whose query has no other in its step computes its
prompt alone; where all of a query's responses are together they share it. Prompts are made beforehand, images included,
as training has them decoded ahead. Selected responses, not weights, decide the cost: the policy's are random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from environment import environment, write_result

from mstar_mega import settings
from mstar_mega.config import Config, OptimizerConfig, SelectionConfig, SelectionRule
from mstar_mega.data.records import read_groups
from mstar_mega.data.types import Group, Query
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.build import build_family, build_model
from mstar_mega.models.packing import Prompt
from mstar_mega.platform import distributed
from mstar_mega.recipe.generate import iteration_directory
from mstar_mega.rewards.selection import choose_responses
from mstar_mega.training.batches import Batch, Examples, TrainGroup, split_into_epochs
from mstar_mega.training.trainer import Trainer

Way = Literal["responses", "queries"]
WAYS: tuple[Way, ...] = get_args(Way)


def examples_of(groups: Sequence[Group], selection: SelectionConfig, seed: int) -> Examples:
    """What a rule selects of them, as training reads it."""
    chosen = choose_responses(groups, selection, key_of(seed, "select"))
    pairs = zip(groups, chosen, strict=True)
    return Examples.of([TrainGroup(group.query, [r.tokens for r in of]) for group, of in pairs if of])


def spread(batches: Sequence[Batch], count: int) -> list[Batch]:
    """At most so many of them, evenly over all."""
    count = min(count, len(batches))
    return [batches[i * len(batches) // count] for i in range(count)]


def measure(trainer: Trainer, examples: Examples, steps: int) -> dict[str, Any]:
    """Both ways on the same responses: medians over steps, per response, and the ratio of these medians."""
    ways: dict[Way, list[Batch]] = {}
    for way in WAYS:
        optimizer = replace(trainer.config, shuffle=way)
        ways[way] = spread(split_into_epochs(examples, optimizer, 1, ("shuffle",)), steps)
    trainer.step(ways["responses"][0])  # the first step of a process pays for what the others find ready
    found: dict[Way, dict[str, list[float]]] = {way: {"seconds": [], "tokens": [], "queries": []} for way in WAYS}
    for turn in zip(*ways.values(), strict=True):
        for way, batch in zip(ways, turn, strict=True):
            started = time.process_time()
            stats = trainer.step(batch)
            found[way]["seconds"].append((time.process_time() - started) / stats.responses)
            found[way]["tokens"].append(stats.computed_tokens / stats.responses)
            found[way]["queries"].append(stats.queries)
    medians = {way: {name: statistics.median(values) for name, values in of.items()} for way, of in found.items()}
    scattered, together = (medians[way] for way in WAYS)
    return {
        "selected_queries": len(examples),
        "selected_responses": examples.responses,
        "steps_timed": len(ways["responses"]),
        "shuffle": {
            way: {
                "computed_tokens_per_response": round(of["tokens"], 2),
                "milliseconds_per_response": round(1000 * of["seconds"], 3),
                "queries_per_step": of["queries"],
            }
            for way, of in medians.items()
        },
        "ratio_of_tokens": round(scattered["tokens"] / together["tokens"], 3),
        "ratio_of_time": round(scattered["seconds"] / together["seconds"], 3),
    }


def load(run: Path, iteration: int) -> tuple[Config, list[Group]]:
    """A run's settings and the groups of one iteration. Raises ValueError where there are none."""
    config = settings.load(run)
    blocks = sorted((run / "rollouts" / iteration_directory(iteration)).glob("block_*.jsonl"))
    groups = [group for block in blocks for group in read_groups(block)]
    if not groups:
        raise ValueError(f"{run} has no responses of iteration {iteration}: give the directory of a run that has")
    return config, groups


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--iteration", type=int, default=1)
    parser.add_argument("--rules", nargs="+", default=["top_k", "all_correct"], choices=get_args(SelectionRule))
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of each way and rule")
    parser.add_argument("--out", default=None, help="directory of the JSON result (default: benchmarks/results)")
    options = parser.parse_args()
    config, groups = load(options.run, options.iteration)
    config.parallel.tensor = config.parallel.pipeline = 1
    distributed.initialize(config.parallel, config.seed)
    family = build_family(config)
    prompts = {group.query.id: family.prompt(group.query) for group in groups}

    def prompt_of(query: Query) -> Prompt:
        return prompts[query.id]

    optimizer: OptimizerConfig = config.evolve.optimizer
    trainer = Trainer(build_model(config, family), optimizer, prompt_of, total_steps=1000)
    rules = {}
    for rule in options.rules:
        examples = examples_of(groups, replace(config.selection, rule=rule), config.seed)
        rules[rule] = measure(trainer, examples, options.steps)
        print(f"{rule}: {rules[rule]}", flush=True)
    result = {
        "settings": {"model": asdict(config.model), "batch_size": optimizer.batch_size, "steps": options.steps,
                     "microbatch_tokens": optimizer.microbatch_tokens, "selection": asdict(config.selection)},
        **environment(),
        "prompt_tokens": round(statistics.mean(len(prompt.tokens) for prompt in prompts.values()), 2),
        "rules": rules,
    }  # fmt: skip
    print(f"written: {write_result('shuffle_cpu', result, options.out)}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
