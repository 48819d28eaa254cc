"""Which implementation runs, how settings choose it, and that compiled kernels suit an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from kernel_cases import BACKENDS, DEVICE, randn, relative_error
from torch import Tensor

from mstar_mega import kernels
from mstar_mega.config import GenerationConfig, KernelsConfig, OptimizerConfig, SelectionConfig
from mstar_mega.data.types import Group, Query, Response, Step
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.kernels import dispatch
from mstar_mega.kernels.dispatch import KERNELS, uses_triton
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.lmm import LMM
from mstar_mega.models.mapping import Head
from mstar_mega.models.packing import Prompt
from mstar_mega.platform import distributed
from mstar_mega.rewards.process import score_groups
from mstar_mega.rewards.reader import PRM, Reader
from mstar_mega.rewards.selection import select
from mstar_mega.training.batches import TrainGroup, microbatches

HEADS: tuple[Head, Head] = ("vocabulary", "likelihood")


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    yield
    kernels.configure(KernelsConfig())
    torch.set_default_device(None)  # a job on a GPU sets one


def test_every_kernel_is_compiled_for_an_h100_within_its_limits() -> None:
    """Shared memory, spills, and matrix instructions where meant, at the production configurations; no GPU needed."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "mstar_mega.kernels.report", "--json"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["problems"] == []
    compiled = {case["kernel"] for case in result["compiled"]}
    folder = os.path.dirname(dispatch.__file__)
    sources = "".join(open(os.path.join(folder, name)).read() for name in os.listdir(folder) if name.endswith(".py"))
    launched = {text.rsplit(" ", 1)[-1] for text in sources.split("_kernel[(")[:-1]}
    assert {f"{name.strip()}_kernel" for name in launched} == compiled, "a kernel that is launched is not compiled here"
    fused = [case for case in result["compiled"] if case["kernel"] == "linear_stats_kernel"]
    assert fused and all(case["tma_loads"] and case["wgmma"] for case in fused)


def test_backends() -> None:
    with kernels.forced_backend(None):
        assert kernels.backend("cpu") == "torch"
        assert kernels.backend() == ("triton" if DEVICE == "cuda" else "torch")
        assert not uses_triton("norms", torch.zeros(1, device="cpu"))
    with kernels.forced_backend(BACKENDS[1]):
        assert kernels.backend() == BACKENDS[1] and uses_triton("norms", torch.zeros(1, device=DEVICE))
    with pytest.raises(ValueError, match="must be auto, triton, interpreter or torch"):
        kernels.force_backend("fast")
    impossible = "triton" if BACKENDS[1] == "interpreter" else "interpreter"
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        kernels.force_backend(impossible)


def test_settings_choose_backend_budget_and_switches() -> None:
    kernels.configure(KernelsConfig(backend="torch", chunk_mb=3, norms=False))
    assert kernels.backend() == "torch" and dispatch.chunk_bytes() == 3 * 2**20
    assert [name for name in KERNELS if not dispatch.is_on(name)] == ["norms"]
    kernels.configure(KernelsConfig(backend=BACKENDS[1], norms=False))  # type: ignore[arg-type]
    x = torch.zeros(1, device=DEVICE)
    assert uses_triton("attention", x) and not uses_triton("norms", x)
    with pytest.raises(ValueError, match="no kernel 'speed'"):
        dispatch.turn_off(["speed"])


def spread(x: Tensor) -> Tensor:
    """The same values, with something else between any two of them."""
    return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0].detach().requires_grad_(x.requires_grad)


def float_inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


OFFSETS = torch.tensor([0, 3, 3, 7], device=DEVICE)
TABLE = torch.tensor([[1, 2], [0, 0]], device=DEVICE)
STRIDED: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "linear_logprob": (
        lambda x, w, b, y: kernels.linear_logprob(x, w, y, bias=b),
        [*float_inputs((5, 8), (11, 8), (11,)), torch.arange(5, device=DEVICE)],
    ),
    "linear_logprob, low precision": (
        lambda x, w, b, y: kernels.linear_logprob(x.bfloat16(), w.bfloat16(), y, bias=b),
        [*float_inputs((5, 8), (11, 8), (11,)), torch.arange(5, device=DEVICE)],
    ),
    "linear_cross_entropy": (
        lambda x, w, y, c: kernels.linear_cross_entropy(x, w, y, row_weight=c),
        [*float_inputs((5, 8), (11, 8)), torch.arange(5, device=DEVICE), randn(5, seed=9)],
    ),
    "vocab_parallel_logprob": (
        kernels.vocab_parallel_logprob, [*float_inputs((5, 11)), torch.arange(5, device=DEVICE)],
    ),
    "sampling": (
        lambda z, c, b: kernels.sample_with_logprob(z, temperature=0.9, seed=1, counters=c, banned=b, top_k=5).token,
        [randn(5, 11), torch.arange(5, device=DEVICE), torch.tensor([2, 3], device=DEVICE)],
    ),
    "step_scores": (
        lambda x, w, at: kernels.step_scores(x, at, w),
        [*float_inputs((7, 8), (2, 8)), torch.tensor([1, 4, 6], device=DEVICE)],
    ),
    "reduce_steps": (kernels.reduce_steps, [randn(7), OFFSETS]),
    "selection": (lambda s, o, c: kernels.select_topk(s, c, o, 2).index, [randn(7), OFFSETS, randn(7, seed=1) > -0.5]),
    "rms_norm": (kernels.rms_norm, float_inputs((3, 8), (8,))),
    "layer_norm": (kernels.layer_norm, float_inputs((3, 8), (8,), (8,))),
    "prefix_attention": (
        lambda q, kp, vp, ko, vo, bp, bo: kernels.prefix_attention(q, kp, vp, bp, ko, vo, bo, 0.3),
        [
            *float_inputs((2, 3, 4, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 3, 2, 4, 8), (2, 3, 2, 4, 8)),
            0 * randn(2, 5), 0 * randn(2, 3, 4, 4),
        ],
    ),
}  # fmt: skip
"""Public functions of tensors alone."""


@pytest.mark.parametrize("name", STRIDED)
def test_inputs_may_lie_anywhere(backend: str, name: str) -> None:
    function, inputs = STRIDED[name]
    results = []
    for tensors in (inputs, [spread(x) for x in inputs]):
        out = function(*tensors)
        floats = [x for x in tensors if x.requires_grad]
        upstream = randn(1, *out.shape, seed=8)[0]
        upstream = upstream if tensors is inputs else spread(upstream)
        results.append([out, *(torch.autograd.grad(out, floats, upstream) if floats else ())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


# -- in the model ----------------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """What a piece of the recipe comes to."""

    tokens: list[list[int]]
    selected: list[list[int]]
    numbers: dict[str, list[float]]
    gradients: dict[str, Tensor]


def recipe_piece(policy: LMM, prm: LMM) -> Piece:
    """Generate, score, select, and the loss and gradients of an SFT step on what was selected."""
    prompts = {"with an image": tiny.prompt(0, 11, tiles=1), "without": tiny.prompt(1, 6)}
    requests = [Request(p, [SampleSpec(key_of(name, i)) for i in range(3)]) for name, p in prompts.items()]
    vocabulary: Any = SimpleNamespace(stop_tokens=frozenset(range(60, 130)), banned_tokens=[6, 7, 8])
    drawn = Engine(policy, vocabulary, GenerationConfig(max_new_tokens=5, top_k=200), 5).generate(requests, 0.9)
    groups = []
    for name, samples in zip(prompts, drawn, strict=True):
        ends = [sorted({(len(sample.tokens) + 1) // 2, len(sample.tokens)}) for sample in samples]
        responses = [
            Response(i, s.tokens, "", s.log_probs, steps=[Step(0, end, "") for end in e], correct=i < 2)
            for i, (s, e) in enumerate(zip(samples, ends, strict=True))
        ]
        groups.append(Group(Query(name, "?", (), None), responses))

    def prompt_of(query: Query) -> Prompt:
        return prompts[query.id]

    score_groups(PRM(prm, Reader(prompt_of)), groups, "min", 1000)
    selected = select(groups, SelectionConfig(rule="top_k", k=1), 0)
    chosen = [TrainGroup(g.query, [r.tokens for r in best]) for g, best in zip(groups, selected, strict=True)]
    (batch,) = microbatches(chosen, prompt_of, OptimizerConfig(microbatch_tokens=1000), 1)
    loss, _ = batch.loss(policy, tiny.hidden(policy, batch.packed))
    responses = [response for group in groups for response in group.responses]
    numbers = {
        "log-probs": [value for r in responses for value in r.log_probs],
        "step scores": [float(step.score or 0) for r in responses for step in r.steps],
        "scores": [float(r.score or 0) for r in responses],
        "loss": [float(loss.detach())],
    }
    return Piece(
        [r.tokens for r in responses], [[r.index for r in b] for b in selected], numbers, tiny.gradients(policy, loss)
    )


def test_no_setting_changes_what_the_recipe_does() -> None:
    """Triton's kernels together and each alone; each switch off and all; logits a row at a time (chunk_mb 0)."""
    policy, prm = (tiny.randomize(tiny.build(head=head)[0], seed=2 + i) for i, head in enumerate(HEADS))
    with torch.no_grad():
        prm.score_head.mul_(0.1)
    kernels.configure(KernelsConfig(backend="torch"))
    expected = recipe_piece(policy, prm)
    assert len({len(tokens) for tokens in expected.tokens}) > 1 and {i for best in expected.selected for i in best} == {
        0,
        1,
    }
    scores = expected.numbers["step scores"]
    assert max(scores) - min(scores) > 0.1, "the scores say something"
    all_off = dict.fromkeys(KERNELS, False)
    triton: Any = BACKENDS[1]
    configurations = [
        KernelsConfig(backend=triton),
        *(KernelsConfig(backend=triton, **{**all_off, name: True}) for name in KERNELS),
        *(KernelsConfig(**{name: False}) for name in KERNELS),  # type: ignore[arg-type]
        KernelsConfig(chunk_mb=0),
        KernelsConfig(**all_off),  # type: ignore[arg-type]
    ]
    for configuration in configurations:
        kernels.configure(configuration)
        piece = recipe_piece(policy, prm)
        assert piece.tokens == expected.tokens and piece.selected == expected.selected, configuration
        for name, values in piece.numbers.items():
            assert values == pytest.approx(expected.numbers[name], rel=1e-5, abs=2e-6), (name, configuration)
        for name, gradient in piece.gradients.items():
            assert relative_error(gradient, expected.gradients[name]) < 2e-5, (name, configuration)
    distributed.shutdown()
