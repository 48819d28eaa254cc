"""Kernels against what else computes the same, at the three policies' shapes: time, memory, ratio to the floor.

    .venv/bin/python benchmarks/kernels.py [--quick] [--compile] [--only TEXT] [--seconds N] [--out DIRECTORY]

The floor is what the device's own measured rates allow: operations of the definition over the rate of a large matrix
product, or bytes over the rate of a copy, whichever is longer. Other implementations (torch.compile, Liger-Kernel,
Apple's cut cross-entropy, megatron-core) take part where they are installed; one that fails is reported with its error.
On the CPU sizes are reduced, and the numbers are about plain PyTorch: Triton's kernels need a GPU.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import kernel_contests
import torch
from environment import environment, write_result
from kernel_contests import CUDA, DEVICE, DTYPE, Contest, NotMeasured, contests, make, targets
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mstar_mega import kernels

# -- measuring -------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], repetitions: int) -> float:
    """Median of a few runs, after one that does not count. CUDA: with a cold L2 cache. CPU: processor time, which other
    work on the machine disturbs less."""
    run()
    cold = torch.empty(64 * 2**20, dtype=torch.int8, device=DEVICE) if CUDA else None
    taken = []
    for _ in range(repetitions):
        if cold is not None:
            cold.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.process_time()
            run()
            taken.append((time.process_time() - started) / torch.get_num_threads())
    return statistics.median(taken)


def device_rates() -> dict[str, float]:
    """Operations per second of a large matrix product, and bytes per second (read and written) of a large copy."""
    side = 8192 if CUDA else 1024
    a, b = make(side, side), make(side, side, seed=1)
    source = torch.empty(2**30 if CUDA else 2**26, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return {
        "matrix_operations_per_second": 2 * side**3 / seconds(lambda: torch.mm(a, b), 7),
        "copy_bytes_per_second": 2 * source.numel() / seconds(lambda: target.copy_(source), 7),
    }


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes allocated at once beyond what was there before."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events: Any = seen.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(
    contest: Contest, entry: Callable[..., Tensor], rates: dict[str, float], repetitions: int
) -> dict[str, Any]:
    """Milliseconds, peak memory, and the ratio to the floor, of one entry."""
    inputs = [x.requires_grad_(contest.backward) for x in contest.inputs()]

    def forward() -> Tensor:
        with torch.set_grad_enabled(contest.backward):
            return entry(*inputs)

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    result = {"forward_ms": 1e3 * seconds(forward, repetitions)}
    total = result["forward_ms"]
    if contest.backward:
        total = result["forward_backward_ms"] = 1e3 * seconds(both, repetitions)
    result["peak_mib"] = peak_bytes(both if contest.backward else forward) / 2**20
    floor = contest.operations / rates["matrix_operations_per_second"]
    floor = 1e3 * max(floor, contest.traffic / rates["copy_bytes_per_second"])
    result["ratio_to_floor"] = total / floor
    return {name: round(value, 4) for name, value in result.items()}


def attempt(contest: Contest, name: str, rates: dict[str, float], repetitions: int) -> dict[str, Any]:
    """:func:`measure` one entry, or say why there is nothing to measure."""
    try:
        return measure(contest, contest.entries[name], rates, repetitions)
    except NotMeasured as reason:
        return {"left_out": str(reason)}
    except Exception as error:  # another library's failure must not end the comparison
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def in_order(chosen: list[Contest]) -> list[tuple[Contest, str]]:
    """Contests and their entries' names. Compilers come last: they take longest, and are the first to go without where
    time is short."""
    entries = [(contest, name) for contest in chosen for name in contest.entries]
    return sorted(entries, key=lambda entry: entry[1] == "torch.compile")


def counted_operations() -> dict[str, float]:
    """Matrix products of the linear kernels, in units of N H V: what is not computed cannot cost time."""
    N, H, V = 64, 32, 512
    x, w = (t.cpu().float().requires_grad_() for t in (make(N, H), make(V, H, seed=1)))
    frozen, target = w.detach(), targets(N, V).cpu()
    half = torch.where(torch.arange(N, device="cpu") % 2 == 0, target, -100)
    upstream = (torch.arange(N, device="cpu") % 4 == 0).float()
    runs: dict[str, Callable[[], Any]] = {
        "SFT loss": lambda: kernels.linear_cross_entropy(x, w, target).backward(),
        "SFT loss, half of the rows ignored": lambda: kernels.linear_cross_entropy(x, w, half).backward(),
        "SFT loss, frozen head": lambda: kernels.linear_cross_entropy(x, frozen, target).backward(),
        "log-probs": lambda: kernels.linear_logprob(x, w, target).sum().backward(),
        "log-probs, a quarter has a gradient": lambda: kernels.linear_logprob(x, w, target).backward(upstream),
        "log-probs, frozen head": lambda: kernels.linear_logprob(x, frozen, target).sum().backward(),
        "definition": lambda: F.cross_entropy(F.linear(x, w), target).backward(),
    }
    counts = {}
    with kernels.forced_backend("torch"):
        for name, run in runs.items():
            with FlopCounterMode(display=False) as counter:
                run()
            counts[name] = counter.get_total_flops() / (N * H * V)
    return counts


def _versions() -> dict[str, str]:
    found = {}
    for name in ("triton", "liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repetitions")
    parser.add_argument("--compile", action="store_true", help="torch.compile takes part")
    parser.add_argument("--only", default="", help="contests whose name contains this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no entry after this long")
    parser.add_argument("--out", default=None, help="directory of the JSON result (default: benchmarks/results)")
    options = parser.parse_args()
    kernel_contests.COMPILE = options.compile
    tokens, shrink = (8192, 1) if CUDA else (512, 16)
    tokens = tokens // 2 if options.quick else tokens
    repetitions = 5 if options.quick else 11
    started = time.monotonic()
    rates = device_rates()
    print(", ".join(f"{name} {value:.3e}" for name, value in rates.items()), flush=True)
    counts = counted_operations()
    print("operations in units of N H V: " + ", ".join(f"{name} {count:g}" for name, count in counts.items()))
    results: dict[str, dict[str, Any]] = {}
    where = environment()
    where["versions"] |= _versions()
    result = {
        **where, "backend": kernels.backend(), "tokens": tokens, "sizes_divided_by": shrink, "dtype": str(DTYPE),
        "rates": rates, "operations_in_NHV": counts, "results": results,
    }  # fmt: skip
    chosen = [contest for contest in contests(tokens, shrink) if options.only in contest.name]
    if not chosen:
        raise SystemExit(f"no contest's name contains {options.only!r}")
    for contest, name in in_order(chosen):
        if time.monotonic() - started > options.seconds:
            found: dict[str, Any] = {"left_out": f"--seconds {options.seconds:g} were over"}
        else:
            found = attempt(contest, name, rates, repetitions)
        results.setdefault(contest.name, {})[name] = found
        print(f"{contest.name}: {name}: {', '.join(f'{k} {v}' for k, v in found.items())}", flush=True)
        # Written again after each, so that what there is stays, should this be interrupted.
        path = write_result("kernels_gpu" if CUDA else "kernels_cpu", result, options.out)
    print(f"written: {path}")
    failed = [name for entries in results.values() for name, r in entries.items() if "error" in r and "mstar" in name]
    if failed:
        raise SystemExit(f"{len(failed)} of our own kernels failed: see the errors above")


if __name__ == "__main__":
    main()
