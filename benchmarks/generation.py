"""This project's engine against transformers' ``generate``: same InternVL, same weights, same work.

    .venv/bin/python benchmarks/generation.py

16 samples for each of several prompts with a few hundred image tokens; float32 on the CPU, temperature 1, no top-k or
top-p, random weights. Two workloads: ``fixed`` draws the same number of tokens for every sample; ``geometric`` ends
each sample at the first of a set of stop tokens, which random weights draw at a nearly constant rate. Only tokens up to
and including the stop token count.

transformers runs in its best way: one call per prompt, one call for all prompts, and one call with a static cache are
tried in a first round, and the fastest meets this engine in the measured rounds. The two take turns in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from environment import environment, write_result
from peer import IMAGE_TOKEN, Sizes, build_ours, build_theirs, largest_difference, make_prompts, their_inputs
from products import Products
from torch import Tensor

from mstar_mega.config import GenerationConfig, ParallelConfig
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.lmm import LMM, LanguageSize, VisionSize
from mstar_mega.models.packing import Prompt
from mstar_mega.platform import distributed

SIZES = Sizes(
    VisionSize(image_size=448, patch_size=14, hidden=128, ffn=512, layers=4, heads=4),
    LanguageSize(
        hidden=256, ffn=704, layers=6, heads=8, kv_heads=4, head_dim=32, vocab=2048, rope_theta=10_000.0
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What both programs are asked to do."""

    name: str
    prompts: int
    samples: int
    text_tokens: int
    max_new_tokens: int
    stop_ids: int
    """How many vocabulary ids end a sample; 0: only the length does."""
    slots: int
    """Samples that this engine decodes at once."""

    @property
    def stop_tokens(self) -> list[int]:
        return list(range(SIZES.language.vocab - self.stop_ids, SIZES.language.vocab))


@dataclass
class Vocabulary:
    """What the engine asks of a policy family."""

    stop_tokens: frozenset[int]
    banned_tokens: list[int]


@dataclass
class Round:
    """One timed run."""

    tokens: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        return self.tokens / self.cpu_seconds


def timed(run: Callable[[], int]) -> Round:
    """Run once; ``run`` returns how many tokens it drew."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    return Round(tokens, time.perf_counter() - wall, time.process_time() - cpu)


def our_run(model: LMM, prompts: list[Prompt], work: Workload) -> Callable[[], int]:
    """This project's engine."""
    settings = GenerationConfig(max_new_tokens=work.max_new_tokens, slots=work.slots)
    # No vocabulary has the id -1: the engine wants to know what stops a sample.
    stop = frozenset(work.stop_tokens or [-1])
    engine = Engine(model, Vocabulary(stop, [IMAGE_TOKEN]), settings, seed=0)

    def run() -> int:
        # Fresh random numbers in every round, as the other side has.
        start = engine.tokens_decoded
        requests = [
            Request(prompt, [SampleSpec(key_of(start, i, j)) for j in range(work.samples)])
            for i, prompt in enumerate(prompts)
        ]
        return sum(len(sample.tokens) for samples in engine.generate(requests, 1.0) for sample in samples)

    return run


def their_runs(model: Any, prompts: list[Prompt], work: Workload) -> dict[str, Callable[[], int]]:
    """transformers' ``generate`` in the ways one would use it."""
    model.generation_config.eos_token_id = work.stop_tokens or None

    def call(some: list[Prompt], **options: Any) -> int:
        inputs = their_inputs(some)
        with torch.no_grad():
            output = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=work.samples,
                max_new_tokens=work.max_new_tokens,
                pad_token_id=0,
                **options,
            )
        return useful_tokens(output[:, inputs["input_ids"].size(1) :], work.stop_tokens)

    return {
        "one call per prompt": lambda: sum(call([prompt]) for prompt in prompts),
        "one call": lambda: call(prompts),
        "one call, static cache": lambda: call(prompts, cache_implementation="static"),
    }


def useful_tokens(drawn: Tensor, stop_tokens: list[int]) -> int:
    """Tokens of int64 [rows, length] up to and including each row's first stop token."""
    stopped = torch.isin(drawn, torch.tensor(stop_tokens, dtype=torch.int64)).cumsum(dim=1)
    before = (stopped == 0).sum(dim=1)
    return int((before + (stopped[:, -1] > 0)).sum())


def summary(rounds: list[Round]) -> dict[str, Any]:
    """One side's measured rounds, as they are written down."""
    return {
        "tokens": [r.tokens for r in rounds],
        "tokens_per_second": [round(r.rate, 1) for r in rounds],
        "tokens_per_cpu_second": [round(r.cpu_rate, 1) for r in rounds],
        "median": round(statistics.median(r.rate for r in rounds), 1),
        "median_cpu": round(statistics.median(r.cpu_rate for r in rounds), 1),
    }


def compare(ours: LMM, theirs: Any, work: Workload, rounds: int) -> dict[str, Any]:
    """Measure one workload and print what was found."""
    prompts = make_prompts(SIZES, work.prompts, tiles=1, text_tokens=work.text_tokens, seed=0)
    mine, others = our_run(ours, prompts, work), their_runs(theirs, prompts, work)
    mine()
    first = {name: timed(run) for name, run in others.items()}
    best = max(first, key=lambda name: first[name].cpu_rate)
    with Products() as products:
        recorded = mine()
    pairs, floors = [], []
    for _ in range(rounds):
        pairs.append((timed(mine), timed(others[best])))
        floors.append(products.seconds())
    # The recorded round drew other tokens than the timed ones: seconds for a token, on both sides.
    floor = statistics.median(floors) / recorded
    floor_ratio = round(statistics.median(pair[0].cpu_seconds / pair[0].tokens for pair in pairs) / floor, 2)
    rates = {who: summary([pair[i] for pair in pairs]) for i, who in enumerate(("ours", "transformers"))}
    ratio = round(rates["ours"]["median"] / rates["transformers"]["median"], 2)
    cpu_ratio = round(rates["ours"]["median_cpu"] / rates["transformers"]["median_cpu"], 2)
    print(f"\n{work}\n  prompts of {len(prompts[0].tokens)} tokens, {len(prompts[0].image_positions)} of them image")
    for name, round_ in first.items():
        print(f"  transformers, first round, {name:24s} {round_.rate:8.1f} tokens/s")
    for who, found in rates.items():
        print(f"  {who:12s} median: {found['median']:8.1f} tokens/s, {found['median_cpu']:8.1f} tokens/CPU second")
    print(f"  ratio of medians: {ratio} (of CPU time: {cpu_ratio})")
    print(f"  CPU time over that of the workload's own matrix products: {floor_ratio}", flush=True)
    return {
        **asdict(work),
        "prompt_tokens": len(prompts[0].tokens),
        "image_tokens": len(prompts[0].image_positions),
        "transformers_mode": best,
        "first_round_tokens_per_second": {name: round(round_.rate, 1) for name, round_ in first.items()},
        **rates,
        "ratio_of_medians": ratio,
        "ratio_of_medians_cpu_time": cpu_ratio,
        "floor_seconds": [round(seconds, 4) for seconds in floors],
        "floor_ratio": floor_ratio,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32, help="per sample; geometric: on average")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds per workload")
    parser.add_argument("--threads", type=int, default=1, help="of both programs; the job gives each process one")
    parser.add_argument("--out", default=None, help="directory of the JSON result (default: benchmarks/results)")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    distributed.initialize(ParallelConfig(), seed=0)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ours = build_ours(SIZES, seed=0)
    theirs = build_theirs(SIZES, ours)
    difference = largest_difference(ours, theirs, make_prompts(SIZES, 2, tiles=1, text_tokens=24, seed=1))
    print(f"largest difference of the two programs' logits: {difference:.1e}")
    assert difference < 1e-4, "the two programs do not compute the same function"
    common = {"prompts": options.prompts, "samples": options.samples, "text_tokens": 24}
    length = options.new_tokens
    stop_ids = round(SIZES.language.vocab / length)
    works = [
        Workload("fixed", max_new_tokens=length, stop_ids=0, slots=512, **common),
        Workload("geometric", max_new_tokens=3 * length, stop_ids=stop_ids, slots=64, **common),
    ]
    result = {
        "command": "python benchmarks/generation.py",
        "settings": vars(options),
        **environment(),
        "sizes": asdict(SIZES),
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "logit_difference": difference,
        "workloads": [compare(ours, theirs, work, options.rounds) for work in works],
    }
    print(f"\nwritten: {write_result('generation_cpu', result, options.out)}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
