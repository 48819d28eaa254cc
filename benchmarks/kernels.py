"""Kernels against what else computes the same, at the three policies' shapes: time, memory, ratio to the floor.

    .venv/bin/python benchmarks/kernels.py [--quick] [--compile] [--only TEXT] [--out DIRECTORY]

The floor is what the device's own measured rates allow: operations of the definition over the rate of a large matrix
product, or bytes over the rate of a copy, whichever is longer. Other implementations (torch.compile, Liger-Kernel,
Apple's cut cross-entropy, megatron-core) take part where they are installed; one that fails is reported with its error.
On the CPU sizes are reduced, and the numbers are about plain PyTorch: Triton's kernels need a GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from environment import environment, write_result
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mstar_mega import kernels

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
POLICIES = {
    "MiniCPM-V-2.5": (4096, 128_256),
    "InternVL2-2B": (2048, 92_553),
    "Phi-3.5-vision": (3072, 32_064),
}
"""Hidden size and vocabulary."""


@dataclass
class Contest:
    """One computation and those who can do it; each makes a scalar or tensors from fresh inputs."""

    name: str
    inputs: Callable[[], list[Tensor]]
    entries: dict[str, Callable[..., Tensor]]
    operations: float
    """Of matrix products, forward and backward, as the definition needs them."""
    traffic: float
    """Bytes that must move, forward and backward."""
    backward: bool = True


def contests(tokens: int, shrink: int) -> list[Contest]:
    """Everything that is measured."""
    found = []
    for policy, (full_width, full_vocabulary) in POLICIES.items():
        width, vocabulary = full_width // shrink, -(-full_vocabulary // shrink // 128) * 128
        found += [
            _linear_loss(f"SFT loss from hidden states, {policy}", tokens, width, vocabulary),
            _linear_scoring(f"log-probs from hidden states, {policy}", tokens, width, vocabulary),
            _given_logits(f"log-probs from logits, {policy}", tokens, vocabulary),
            _sampling(f"sampling, {policy}", max(8, tokens // 32), vocabulary),
            _step_scores(f"step scores, {policy}", tokens, width, vocabulary),
            _norm(f"rms_norm, {policy}", tokens, width),
        ]
    return [*found, _selection(1024 // shrink), *_attention(shrink)]


def make(*shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = DTYPE) -> Tensor:
    """Seeded random numbers on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device=DEVICE)).to(dtype)


def targets(tokens: int, vocabulary: int) -> Tensor:
    """Seeded random ids."""
    return torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def _linear_loss(name: str, N: int, H: int, V: int) -> Contest:
    target = targets(N, V)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w).float(), target, reduction="sum")

    entries: dict[str, Callable[..., Tensor]] = {
        "mstar_mega": lambda x, w: kernels.linear_cross_entropy(x, w, target),
        "mstar_mega, through log-probs": lambda x, w: -kernels.linear_logprob(x, w, target).sum(),
        "torch eager": eager,
        "torch.compile": _compiled(eager),
    }
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is not None:
        entries["torch linear_cross_entropy"] = lambda x, w: fused(x, w, target, reduction="sum")
    liger = _optional("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    if CUDA and liger is not None:
        entries["Liger"] = lambda x, w: liger(x, w, target, reduction="sum")
    cut = _optional("cut_cross_entropy", "linear_cross_entropy")
    if CUDA and cut is not None:
        entries["CCE"] = lambda x, w: cut(x, w, target, reduction="sum")
    size = DTYPE.itemsize
    inputs = lambda: [make(N, H), make(V, H, scale=2 / H**0.5, seed=1)]  # noqa: E731
    return Contest(name, inputs, entries, 6.0 * N * H * V, 2.0 * size * (N + V) * H)


def _linear_scoring(name: str, N: int, H: int, V: int) -> Contest:
    target = targets(N, V)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return torch.log_softmax(F.linear(x, w).float(), dim=-1).gather(1, target[:, None])

    entries = {
        "mstar_mega": lambda x, w: kernels.linear_logprob(x, w, target),
        "torch eager": eager,
        "torch.compile": _compiled(eager),
    }
    inputs = lambda: [make(N, H), make(V, H, scale=2 / H**0.5, seed=1)]  # noqa: E731
    return Contest(name, inputs, entries, 2.0 * N * H * V, DTYPE.itemsize * float(N + V) * H, backward=False)


def _given_logits(name: str, N: int, V: int) -> Contest:
    target = targets(N, V)

    def eager(z: Tensor) -> Tensor:
        return torch.log_softmax(z.float(), dim=-1).gather(1, target[:, None]).sum()

    entries: dict[str, Callable[..., Tensor]] = {
        "mstar_mega": lambda z: kernels.vocab_parallel_logprob(z, target, inplace_backward=True).sum(),
        "torch eager": eager,
        "torch.compile": _compiled(eager),
    }
    liger = _optional("liger_kernel.transformers.functional", "liger_cross_entropy")
    if CUDA and liger is not None:
        entries["Liger"] = lambda z: liger(z, target, reduction="sum")
    megatron = _megatron()
    if megatron is not None:
        # It writes over float32 logits.
        entries["megatron-core"] = lambda z: megatron(z[:, None].clone(), target[:, None]).sum()
    return Contest(name, lambda: [make(N, V, scale=3.0)], entries, 0.0, 3.0 * DTYPE.itemsize * N * V)


def _sampling(name: str, B: int, V: int) -> Contest:
    counters = torch.arange(B, device=DEVICE)
    entries: dict[str, Callable[..., Tensor]] = {
        "mstar_mega": lambda z: kernels.sample_with_logprob(z, temperature=0.8, seed=1, counters=counters).token,
        "mstar_mega, top-k 50": lambda z: (
            kernels.sample_with_logprob(z, temperature=0.8, top_k=50, seed=1, counters=counters).token
        ),
        "torch softmax, multinomial, log_softmax": lambda z: torch.log_softmax(z / 0.8, 1).gather(
            1, torch.multinomial(torch.softmax(z / 0.8, 1), 1)
        ),
    }
    inputs = lambda: [make(B, V, scale=3.0, dtype=torch.float32)]  # noqa: E731
    return Contest(name, inputs, entries, 0.0, 4.0 * B * V, backward=False)


def _step_scores(name: str, N: int, H: int, V: int) -> Contest:
    positions = torch.arange(31, N, 32, device=DEVICE)
    head = make(2, H, seed=2)
    wide = make(V, H, scale=2 / H**0.5, seed=1)
    entries: dict[str, Callable[..., Tensor]] = {
        "mstar_mega": lambda x: kernels.step_scores(x, positions, head),
        "torch, vocabulary head and two columns": lambda x: torch.softmax(
            F.linear(x, wide)[positions][:, :2].float(), dim=1
        )[:, 0],
    }
    traffic = DTYPE.itemsize * float(positions.numel() + 2) * H
    return Contest(name, lambda: [make(N, H)], entries, 4.0 * positions.numel() * H, traffic, backward=False)


def _norm(name: str, N: int, H: int) -> Contest:
    def eager(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (H,), w, 1e-5)

    entries: dict[str, Callable[..., Tensor]] = {
        "mstar_mega": lambda x, w: kernels.rms_norm(x, w, 1e-5),
        "torch eager": eager,
        "torch.compile": _compiled(eager),
    }
    return Contest(name, lambda: [make(N, H), make(H, seed=1)], entries, 0.0, 5.0 * DTYPE.itemsize * N * H)


def _selection(queries: int) -> Contest:
    n = 16
    offsets = torch.arange(0, queries * n + 1, n, device=DEVICE)
    correct = make(queries * n, seed=1, dtype=torch.float32) > 0

    def loop(score: Tensor) -> Tensor:
        values, right = score.tolist(), correct.tolist()
        best = [
            sorted((i for i in range(q * n, (q + 1) * n) if right[i]), key=lambda i: (-values[i], i))[:2]
            for q in range(queries)
        ]
        return torch.tensor([len(row) for row in best])

    entries: dict[str, Callable[..., Tensor]] = {
        "mstar_mega": lambda score: kernels.select_topk(score, correct, offsets, 2).index,
        "Python": loop,
    }
    inputs = lambda: [make(queries * n, dtype=torch.float32)]  # noqa: E731
    return Contest(f"top 2 of 16, {queries} queries", inputs, entries, 0.0, 5.0 * queries * n, backward=False)


def _attention(shrink: int) -> list[Contest]:
    G, n, P, R, Hq, Hk, D = (8, 16, 2048, 512, 32, 8, 128) if shrink == 1 else (2, 8, 256, 64, 4, 2, 32)
    prefix = lambda: [make(G, Hk, P, D, seed=s) for s in (1, 2)]  # noqa: E731
    prefix_bias = torch.zeros(G, P, device=DEVICE)
    B = G * n
    table = torch.arange(B, device=DEVICE).view(G, n)
    place, own_bias = table.flatten(), torch.zeros(B, R, device=DEVICE)

    def unshared(q: Tensor, kp: Tensor, vp: Tensor, ko: Tensor, vo: Tensor) -> Tensor:
        k, v = (torch.cat([a.repeat_interleave(n, 0), b], dim=2) for a, b in ((kp, ko), (vp, vo)))
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    decode = Contest(
        f"decode attention, {G} prompts of {P} tokens, {n} samples of {R}",
        lambda: [make(B, Hq, D), *prefix(), make(B, Hk, R, D, seed=3), make(B, Hk, R, D, seed=4)],
        {
            "mstar_mega": lambda q, kp, vp, ko, vo: kernels.decode_attention(
                q, kp, vp, prefix_bias, ko, vo, own_bias, table, place, D**-0.5
            ),
            "torch, prefix copied to every sample": unshared,
        },
        4.0 * B * Hq * (P + R) * D,
        2.0 * DTYPE.itemsize * Hk * D * (G * P + B * R),
        backward=False,
    )
    g, few = (2, 4) if shrink == 1 else (1, 2)
    causal = torch.full((R, R), float("-inf"), device=DEVICE).triu(1)[None, None]
    bias = torch.zeros(g, P, device=DEVICE)

    def whole(q: Tensor, kp: Tensor, vp: Tensor, ko: Tensor, vo: Tensor) -> Tensor:
        k, v = (torch.cat([a.repeat_interleave(few, 0), b.flatten(0, 1)], dim=2) for a, b in ((kp, ko), (vp, vo)))
        mask = torch.cat([torch.zeros(R, P, device=DEVICE), causal[0, 0]], dim=1).to(q.dtype)
        return F.scaled_dot_product_attention(q.flatten(0, 1).transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)

    training = Contest(
        f"prefix attention in training, {g} prompts of {P} tokens, {few} responses of {R}",
        lambda: [
            make(g, few, R, Hq, D), make(g, Hk, P, D, seed=1), make(g, Hk, P, D, seed=2),
            make(g, few, Hk, R, D, seed=3), make(g, few, Hk, R, D, seed=4),
        ],
        {
            "mstar_mega": lambda q, kp, vp, ko, vo: kernels.prefix_attention(
                q, kp, vp, bias, ko, vo, causal, D**-0.5
            ),
            "torch, prefix copied to every response": whole,
        },
        14.0 * g * few * R * Hq * (P + R) * D,
        4.0 * DTYPE.itemsize * D * g * (few * R * Hq + Hk * (P + few * R)),
    )  # fmt: skip
    return [decode, training]


# -- others ----------------------------------------------------------------------------------------------------------

COMPILE = False


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled when first called; compilers take a while."""
    holder: list[Callable[..., Tensor]] = []

    def run(*inputs: Tensor) -> Tensor:
        if not COMPILE:
            raise NotMeasured("left out without --compile")
        if not holder:
            holder.append(torch.compile(function, dynamic=False))
        return holder[0](*inputs)

    return run


class NotMeasured(Exception):
    """This entry does not take part."""


def _optional(module: str, name: str) -> Any:
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError, RuntimeError):
        return None


def _megatron() -> Any:
    """megatron's vocabulary-parallel cross-entropy over a group of this one process."""
    from mstar_mega.config import ParallelConfig
    from mstar_mega.platform import distributed

    distributed.initialize(ParallelConfig(), 0)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy


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
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
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
    global COMPILE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repetitions")
    parser.add_argument("--compile", action="store_true", help="torch.compile takes part")
    parser.add_argument("--only", default="", help="contests whose name contains this")
    parser.add_argument("--out", default=None, help="directory of the JSON result (default: benchmarks/results)")
    options = parser.parse_args()
    COMPILE = options.compile
    tokens, shrink = (8192, 1) if CUDA else (512, 16)
    tokens = tokens // 2 if options.quick else tokens
    repetitions = 5 if options.quick else 11
    rates = device_rates()
    print(", ".join(f"{name} {value:.3e}" for name, value in rates.items()), flush=True)
    results: dict[str, dict[str, Any]] = {}
    for contest in contests(tokens, shrink):
        if options.only not in contest.name:
            continue
        print(contest.name, flush=True)
        for name, entry in contest.entries.items():
            try:
                result: dict[str, Any] = measure(contest, entry, rates, repetitions)
            except NotMeasured as reason:
                result = {"left_out": str(reason)}
            except Exception as error:  # another library's failure must not end the comparison
                result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            results.setdefault(contest.name, {})[name] = result
            print(f"   {name:44s} {'  '.join(f'{k} {v}' for k, v in result.items())}", flush=True)
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
    counts = counted_operations()
    print("operations in units of N H V: " + ", ".join(f"{name} {count:g}" for name, count in counts.items()))
    where = environment()
    where["versions"] |= _versions()
    result = {
        **where, "backend": kernels.backend(), "tokens": tokens, "sizes_divided_by": shrink, "dtype": str(DTYPE),
        "rates": rates, "operations_in_NHV": counts, "results": results,
    }  # fmt: skip
    print(f"written: {write_result('kernels_gpu' if CUDA else 'kernels_cpu', result, options.out)}")
    failed = [name for entries in results.values() for name, r in entries.items() if "error" in r and "mstar" in name]
    if failed:
        raise SystemExit(f"{len(failed)} of our own kernels failed: see the errors above")


if __name__ == "__main__":
    main()
