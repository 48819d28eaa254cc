"""Milliseconds and tokens per second of a decode step at InternVL2-2B's size, against the device's own copy rate.

    .venv/bin/python benchmarks/step_speed.py [--seconds 100] [--out DIRECTORY]

Random weights in bfloat16; prompts of 1, 7 and 13 tiles (256 tokens each and a text of 74), 16 samples each, every slot
with 150 own tokens at the start. The floor is the time to read, at the rate of copying one large tensor, the weights
once, each prompt's keys and values once and each sample's once. On a machine without a GPU it takes the same steps on a
narrow model, for a rehearsal: the figures mean nothing there.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from decode_step import NARROW, SAMPLES, VISION
from environment import environment, write_result

from mstar_mega.config import GenerationConfig, ParallelConfig
from mstar_mega.generation.engine import Request, SampleSpec
from mstar_mega.generation.replay import replay_for
from mstar_mega.generation.scheduler import Schedule, Terms
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.inference import inference
from mstar_mega.models.lmm import LMM, transformer_config
from mstar_mega.models.packing import Prompt
from mstar_mega.models.sizes import LanguageSize
from mstar_mega.platform import distributed

WIDE = replace(NARROW, hidden=2048, ffn=8192, head_dim=128, vocab=92553)
"""InternVL2-2B."""
OWN, LIMIT = 150, 512


def build(size: LanguageSize) -> LMM:
    """Random weights, drawn on the device."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = transformer_config(size, dtype=dtype)
    model = LMM(VISION, size, config).to(dtype=dtype, device=distributed.device())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
    return model.eval()


def started(model: LMM, slots: int, prompt: int) -> Schedule:
    """A stream whose slots all run, none of whose samples ends by itself."""
    config = GenerationConfig(max_new_tokens=LIMIT, slots=slots)
    terms = Terms(config, 1.0, frozenset(), [5, 6], 0, 1, lambda: replay_for(distributed.device()))
    requests = [
        Request(Prompt([10 + i] * prompt, [], None), [SampleSpec(key_of(i, j)) for j in range(SAMPLES)])
        for i in range(slots // SAMPLES)
    ]
    schedule = Schedule(model, terms, iter(requests), slots, prompt)
    with inference(model):
        while len(schedule.running) < slots:
            schedule._pull()
            schedule._admit()
        while schedule.pending:
            schedule._collect()
    schedule.runner.slots.length[:slots] = OWN
    for running in schedule.running.values():
        running.own = OWN
    return schedule


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(schedule: Schedule, steps: int) -> float:
    """Seconds of so many steps, tokens read back one step late."""
    wait()
    start = time.perf_counter()
    with inference(schedule.model):
        for _ in range(steps):
            schedule._step()
            if len(schedule.pending) > 1:
                schedule._collect()
        while schedule.pending:
            schedule._collect()
    wait()
    return time.perf_counter() - start


def copy_rate() -> float:
    """Bytes a second that copying a large tensor reads and writes."""
    size = 2**30 if torch.cuda.is_available() else 2**24
    source = torch.zeros(size, dtype=torch.uint8, device=distributed.device())
    to = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        wait()
        start = time.perf_counter()
        to.copy_(source)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def bytes_needed(model: LMM, slots: int, prompt: int, own: float) -> float:
    """What a step must read."""
    size, width = model.size, next(model.parameters()).element_size()
    weights = sum(p.numel() for name, p in model.language.named_parameters() if "embedding" not in name)
    token = 2 * size.layers * size.kv_heads * size.head_dim
    return (weights + token * (slots // SAMPLES * prompt + slots * own)) * width


def busy(schedule: Schedule) -> dict[str, Any]:
    """Kernels of one step and the share of its time that the GPU works."""
    if not torch.cuda.is_available():
        return {}
    from torch.profiler import ProfilerActivity, profile

    steps = 5
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds = run(schedule, steps)
    kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    at_work = sum(event.time_range.elapsed_us() for event in kernels) * 1e-6
    return {"kernels_per_step": len(kernels) / steps, "busy_share": round(at_work / seconds, 3)}


def measure(model: LMM, slots: int, prompt: int, rate: float, steps: int) -> dict[str, Any]:
    """One row of the result."""
    schedule = started(model, slots, prompt)
    run(schedule, 3)
    seconds = run(schedule, steps) / steps
    floor = bytes_needed(model, slots, prompt, OWN + 3 + steps / 2) / rate
    return {
        "slots": slots,
        "prompt_tokens": prompt,
        "ms_per_step": round(1e3 * seconds, 3),
        "floor_ms": round(1e3 * floor, 3),
        "ratio_to_floor": round(seconds / floor, 2),
        "tokens_per_second": round(slots / seconds, 1),
        **busy(schedule),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100.0, help="no row is begun after so many")
    parser.add_argument("--steps", type=int, default=40, help="of a row")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 7, 13])
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--out", default=None, help="directory of the JSON result (default: benchmarks/results)")
    options = parser.parse_args()
    begun = time.monotonic()
    distributed.initialize(ParallelConfig(), seed=0)
    on_gpu = torch.cuda.is_available()
    model, rate = build(WIDE if on_gpu else replace(NARROW, layers=2)), copy_rate()
    rows: list[dict[str, Any]] = []
    for tiles in options.tiles:
        for slots in options.slots:
            if time.monotonic() - begun > options.seconds:
                continue
            rows.append({"tiles": tiles, **measure(model, slots, 256 * tiles + 74, rate, options.steps)})
            print(rows[-1], flush=True)
    result = {
        "command": "python benchmarks/step_speed.py",
        "settings": vars(options),
        **environment(),
        "rehearsal": not on_gpu,
        "copy_bytes_per_second": rate,
        "rows": rows,
    }
    print(f"written: {write_result('step_speed_gpu' if on_gpu else 'step_speed_cpu', result, options.out)}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
