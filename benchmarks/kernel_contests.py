"""What the kernel benchmark measures: each computation, and everyone who can do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mstar_mega import kernels
from mstar_mega.kernels import decode_attention as attention

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
    # The device by name: on a GPU megatron's contest makes it the default, and generators are bound to theirs.
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randint(0, vocabulary, (tokens,), generator=generator, device="cpu").to(DEVICE)


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
    for other, module, function in (
        ("torch linear_cross_entropy", "torch.nn.functional", "linear_cross_entropy"),
        ("Liger", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
        ("CCE", "cut_cross_entropy", "linear_cross_entropy"),
    ):
        entries[other] = _other(module, function, lambda call, x, w: call(x, w, target, reduction="sum"))
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
    entries["Liger"] = _other(
        "liger_kernel.transformers.functional", "liger_cross_entropy", lambda call, z: call(z, target, reduction="sum")
    )
    megatron = _megatron()
    # It writes over float32 logits.
    entries["megatron-core"] = lambda z: megatron(z[:, None].clone(), target[:, None]).sum()
    return Contest(name, lambda: [make(N, V, scale=3.0)], entries, 0.0, 3.0 * DTYPE.itemsize * N * V)


def _sampling(name: str, B: int, V: int) -> Contest:
    counters = torch.arange(B, device=DEVICE)

    def nucleus(z: Tensor) -> Tensor:
        """The usual way: sort the row, drop what comes after the mass, draw, and look up its log-probability."""
        ordered, ids = (z / 0.8).sort(dim=1, descending=True)
        p = torch.softmax(ordered, 1)
        kept = torch.where(p.cumsum(1) - p < 0.9, p, 0.0)
        place = torch.multinomial(kept, 1)
        return torch.stack([ids.gather(1, place), torch.log(kept.gather(1, place) / kept.sum(1, keepdim=True))])

    entries: dict[str, Callable[..., Tensor]] = {
        "mstar_mega": lambda z: kernels.sample_with_logprob(z, temperature=0.8, seed=1, counters=counters).token,
        "mstar_mega, top-k 50": lambda z: (
            kernels.sample_with_logprob(z, temperature=0.8, top_k=50, seed=1, counters=counters).token
        ),
        "mstar_mega, top-p 0.9": lambda z: (
            kernels.sample_with_logprob(z, temperature=0.8, top_p=0.9, seed=1, counters=counters).token
        ),
        "torch softmax, multinomial, log_softmax": lambda z: torch.log_softmax(z / 0.8, 1).gather(
            1, torch.multinomial(torch.softmax(z / 0.8, 1), 1)
        ),
        "torch sort, cumsum, multinomial, top-p 0.9": nucleus,
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


def _decoding(G: int, n: int, P: int, R: int, Hq: int, Hk: int, D: int) -> Callable[..., Tensor]:
    """Decode attention of G prompts with n slots each, by the kernels where they run."""
    B, groups = G * n, torch.arange(G * n, device=DEVICE)
    if not attention.fits(torch.empty(1, 1, D, dtype=DTYPE, device=DEVICE)):
        zeros = torch.zeros(G, P, device=DEVICE), torch.zeros(B, R, device=DEVICE)
        plain = attention.PlainReading(groups.view(G, n), groups, slice(0, G), P, zeros[0], slice(0, B), None, zeros[1])
        return lambda q, kp, vp, ko, vo: attention.decode_reference(q, kp, vp, ko, vo, plain, D**-0.5)
    items, cuts = attention.work_items([(g * P, P, P) for g in range(G)], [n] * G, Hq // Hk, Hk, parts=8)
    lists = (groups, [R] * B, groups, [cuts[b // n] for b in range(B)], items, [len(items)])
    reading = attention.Reading(*(torch.as_tensor(x, device=DEVICE) for x in lists))
    scratch = torch.empty(8, B, Hq, D, device=DEVICE), torch.empty(8, B, Hq, device=DEVICE)

    def run(q: Tensor, kp: Tensor, vp: Tensor, ko: Tensor, vo: Tensor) -> Tensor:
        out = torch.empty_like(q)
        return attention.decode_attention(q, kp.view(-1), vp.view(-1), ko, vo, reading, D**-0.5, *scratch, out)

    return run


def _attention(shrink: int) -> list[Contest]:
    G, n, P, R, Hq, Hk, D = (8, 16, 2048, 512, 32, 8, 128) if shrink == 1 else (2, 8, 256, 64, 4, 2, 32)
    prefix = lambda: [make(G, Hk, P, D, seed=s) for s in (1, 2)]  # noqa: E731
    B = G * n
    decode_attention = _decoding(G, n, P, R, Hq, Hk, D)

    def unshared(q: Tensor, kp: Tensor, vp: Tensor, ko: Tensor, vo: Tensor) -> Tensor:
        k, v = (torch.cat([a.repeat_interleave(n, 0), b], dim=2) for a, b in ((kp, ko), (vp, vo)))
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    decode = Contest(
        f"decode attention, {G} prompts of {P} tokens, {n} samples of {R}",
        lambda: [make(B, Hq, D), *prefix(), make(B, Hk, R, D, seed=3), make(B, Hk, R, D, seed=4)],
        {
            "mstar_mega": decode_attention,
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


def _other(module: str, name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run`` with a function of another library, or the reason why it does not take part."""

    def compete(*inputs: Tensor) -> Tensor:
        if not CUDA and not module.startswith("torch."):
            raise NotMeasured("its kernels need CUDA")
        try:
            function = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise NotMeasured(f"not installed: {error}") from error
        return run(function, *inputs)

    return compete


def _megatron() -> Any:
    """megatron's vocabulary-parallel cross-entropy over a group of this one process."""
    from mstar_mega.config import ParallelConfig
    from mstar_mega.platform import distributed

    distributed.initialize(ParallelConfig(), 0)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy
