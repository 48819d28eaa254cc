"""A decode step's launches, host time and bytes.

    .venv/bin/python benchmarks/decode_step.py [--out FILE.json]

InternVL2-2B's 24 layers at a width of 64, so that the host is what is measured; without a GPU kernels are stood in for
by nothing, and matrix products are tiny. ``host_ms`` is a step of the written-out layers with the draw
(``models/decoder.py``, ``kernels/draw.py``) as it is launched anew; a recorded step is one launch. ``modules_host_ms``
is the same layers as megatron's modules, with the draw operation by operation, in the same process, taking turns.
``bytes_read_over_needed``: what attention reads by its own lists of work, over every prompt's and every slot's keys and
values once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from environment import environment, write_result
from launches import Watch, kernels_watched
from torch import Tensor

from mstar_mega.config import GenerationConfig, ParallelConfig
from mstar_mega.generation import drawing, runner
from mstar_mega.generation.engine import Request, SampleSpec
from mstar_mega.generation.replay import Straight
from mstar_mega.generation.runner import _PARTS
from mstar_mega.generation.scheduler import Schedule, Terms
from mstar_mega.kernels import decode_attention, decode_layer, dispatch
from mstar_mega.kernels.decode_attention import work_items
from mstar_mega.kernels.noise import counters, key_of, mix
from mstar_mega.models.inference import inference
from mstar_mega.models.initialization import initialize_weights
from mstar_mega.models.lmm import LMM, transformer_config
from mstar_mega.models.packing import Prompt
from mstar_mega.models.sizes import DynamicNTK, LanguageSize, VisionSize
from mstar_mega.platform import distributed

SAMPLES = 16
PROMPT = 48
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
"""On the CPU bfloat16 would be widened by copies that a GPU does not make."""
VISION = VisionSize(image_size=28, patch_size=14, hidden=32, ffn=64, layers=1, heads=2)
NARROW = LanguageSize(
    hidden=64, ffn=128, layers=24, heads=16, kv_heads=8, head_dim=16, vocab=512, rope_theta=1e6,
    rope_scaling=DynamicNTK(2.0, 32768),
)  # fmt: skip
"""InternVL2-2B but for its widths."""


@contextmanager
def kernels_chosen() -> Iterator[None]:
    """Let the functions of a step take their kernels, also where nothing can run them."""
    real = dispatch.uses_triton
    fits, runner.fits = runner.fits, lambda q: True
    users = (decode_attention, decode_layer, drawing)
    for user in users:
        user.uses_triton = lambda kernel, tensor: True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        runner.fits = fits
        for user in users:
            user.uses_triton = real  # type: ignore[attr-defined]


def build(layers: int) -> LMM:
    """The model with random weights."""
    size = replace(NARROW, layers=layers)
    config = transformer_config(
        size, dtype=DTYPE
    )  # fmt: skip
    model = LMM(VISION, size, config)
    initialize_weights(model, 0)
    return model.to(dtype=DTYPE, device=distributed.device()).eval()


def started(model: LMM, slots: int) -> Schedule:
    """A stream whose slots all run and never end."""
    terms = Terms(GenerationConfig(max_new_tokens=4096, slots=slots), 1.0, frozenset(), [5, 6], 0, 0, Straight)
    requests = [
        Request(Prompt([10] * PROMPT, [], None), [SampleSpec(key_of(i, j)) for j in range(SAMPLES)])
        for i in range(max(1, slots // SAMPLES))
    ]
    schedule = Schedule(model, terms, iter(requests), slots, PROMPT)
    schedule._pull()
    with inference(model):
        while schedule.queue:
            schedule._admit()
            schedule._collect()
        entries = [schedule.cache.entries[r.work.request] for r in schedule.running.values()]  # type: ignore[union-attr]
        schedule.runner.run_over(list(schedule.running), entries)
    return schedule


def written_out(schedule: Schedule) -> Callable[[], None]:
    """One step as the engine launches it."""
    steps = schedule.runner
    return steps._steps[steps._bucket]


@dataclass
class _Stands:
    """An attention plan that launches what a decode step's attention needs, and computes nothing."""

    cache: Tensor
    place: Tensor
    nothing: Callable[..., None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.cache[self.place] = k
        self.cache[self.place] = v
        for _ in range(3):  # two parts and their merge
            self.nothing(q, k, v, scale, layer)
        return q.clone()


def modules(model: LMM, slots: int) -> Callable[[], None]:
    """The same step by megatron's modules, the draw's bookkeeping operation by operation."""
    device = distributed.device()
    size = model.size
    cache = torch.zeros(slots, size.kv_heads, size.head_dim, dtype=DTYPE, device=device)
    place = torch.arange(slots, device=device)
    tokens, positions, keys = (torch.ones(slots, dtype=torch.int64, device=device) for _ in range(3))
    banned = torch.tensor([5, 6], device=device)
    plan = _Stands(cache, place, lambda *arguments: None)

    def step() -> None:
        hidden = model.trunk(model.embed_tokens(tokens), positions, plan)
        logits = model.logits(hidden)
        here = torch.where((banned >= 0) & (banned < size.padded_vocab), banned, size.padded_vocab)
        allowed = torch.ones(size.padded_vocab + 1, dtype=torch.uint8, device=device).index_fill_(0, here, 0)[:-1]
        mix(counters(keys, positions) + 3)
        parts = torch.empty(2, slots, 1, device=device)
        best = parts[0].amax(dim=1)
        token = torch.where(parts[0] == best[:, None], place[:, None], 1 << 40).amin(dim=1)
        chosen = torch.where(token[:, None] == place[:, None], parts[1], float("-inf")).amax(dim=1)
        log_prob = chosen - torch.log((parts[1] * torch.exp(parts[0] - best[:, None])).sum(1))
        drawn = torch.stack([token.double(), log_prob.double()])
        tokens[place] = drawn[0].long().remainder_(size.vocab)
        drawn.tolist()
        assert logits.size(0) == slots and allowed.numel()

    return step


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Processor time of one step."""
    start = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - start) / repeats


def host_times(slots: int, rounds: int, repeats: int) -> dict[str, Any]:
    """Both ways in one process, taking turns."""
    model = build(NARROW.layers)
    ours, theirs = written_out(started(model, slots)), modules(model, slots)
    with inference(model):
        seconds(ours, 2), seconds(theirs, 2)
        pairs = [(seconds(ours, repeats), seconds(theirs, repeats)) for _ in range(rounds)]
    host, of_modules = (1e3 * statistics.median(pair[i] for pair in pairs) for i in range(2))
    return {
        "slots": slots,
        "host_ms": round(host, 3),
        "modules_host_ms": round(of_modules, 3),
        "ratio": round(of_modules / host, 2),
        "pairs_ms": [[round(1e3 * each, 3) for each in pair] for pair in pairs],
    }


def launches() -> dict[str, Any]:
    """Of one step, kernels as one each; refuses, with an AssertionError, whatever asks the host or takes memory."""
    counts = {}
    for layers in (1, 3):
        schedule = started(build(layers), SAMPLES)
        step = written_out(schedule)
        with inference(schedule.model), Watch(strict=True) as watch:
            step()
        counts[layers] = len(watch.seen)
    per_layer = (counts[3] - counts[1]) / 2
    return {
        "launches_per_layer": per_layer,
        "launches_outside_layers": counts[1] - per_layer,
        "launches_of_24_layers": counts[1] + 23 * per_layer,
        "syncs_per_step": 0,  # the strict watch has seen none; tokens are read back while the next step runs
    }


def bytes_read(slots: int, seed: int = 0) -> dict[str, Any]:
    """Attention's bytes of a layer at InternVL2-2B's real sizes, from the lists that the kernels go through."""
    generator = torch.Generator().manual_seed(seed)
    heads, key_heads, channels, width = 16, 8, 128, 2
    groups = max(1, slots // SAMPLES)
    tiles = torch.randint(1, 14, (groups,), generator=generator).tolist()
    lengths = [256 * n + 74 for n in tiles]
    own = torch.randint(1, 513, (slots,), generator=generator).tolist()
    running = [SAMPLES * slots // (groups * SAMPLES)] * groups
    starts = [sum(lengths[:i]) for i in range(groups)]
    prompts = [(start, length, length) for start, length in zip(starts, lengths, strict=True)]
    work, cuts = work_items(prompts, running, heads // key_heads, key_heads, _PARTS)
    token = 2 * key_heads * channels * width
    prefix = sum(item[3] - item[2] for item in work) * token
    # Each part of a prompt is written and read once in float32, for every row.
    parts = sum(count * cut for count, cut in zip(running, cuts, strict=True)) * heads * (channels + 1) * 4 * 2
    needed = (sum(lengths) + sum(own)) * token
    return {
        "slots": slots,
        "prompt_tokens": lengths,
        "read": prefix + sum(own) * token + parts,
        "needed": needed,
        "ratio": round((prefix + sum(own) * token + parts) / needed, 4),
        "keys_and_values_alone": round((prefix + sum(own) * token) / needed, 4),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=None, help="result (default: benchmarks/results/decode_step_*.json)"
    )
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5, help="steps of a round")
    options = parser.parse_args()
    distributed.initialize(ParallelConfig(), seed=0)
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = {"command": "python benchmarks/decode_step.py", **environment()}
    with kernels_watched(run=on_gpu), kernels_chosen():
        result |= launches()
        times = [host_times(slots, options.rounds, options.repeats) for slots in options.slots]
    result |= {name: times[0][name] for name in ("host_ms", "modules_host_ms")}
    result["host"] = times
    reads = [bytes_read(slots) for slots in (16, 64, 256, 512)]
    result["bytes_read_over_needed"] = max(read["ratio"] for read in reads)
    result["bytes"] = reads
    for name in ("launches_per_layer", "launches_outside_layers", "syncs_per_step", "bytes_read_over_needed"):
        print(f"{name}: {result[name]}")
    for each in times:
        print(
            f"{each['slots']} slots: host {each['host_ms']} ms, modules {each['modules_host_ms']} ms, {each['ratio']}x"
        )
    if options.out is None:
        print(f"written: {write_result('decode_step_gpu' if on_gpu else 'decode_step_cpu', result, None)}")
    else:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {options.out}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
