"""Log-probs and their gradients in float32 beside torch's own: how far each is from float64, near large logits too.

The logits are whole numbers of 1/32, so that no product rounds them, at 200 either: what is compared is what is made of
them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import needs_interpreter, randint, randn
from parallel import run_parallel
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank, get_world_size, group

from mstar_mega.kernels import forced_backend, linear_cross_entropy, linear_logprob
from mstar_mega.kernels.logprob import vocab_parallel_logprob

ROWS, WIDTH = 61, 20
Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, bias, targets) -> log-probabilities."""


def problem(V: int, shift: float) -> tuple[Tensor, ...]:
    """hidden, weight, bias, targets and upstream gradients."""
    hidden = (4 * randn(ROWS, WIDTH, seed=1)).round() / 4
    weight = (16 * randn(V, WIDTH, seed=2) / WIDTH**0.5).round() / 8
    target = randint(0, V, (ROWS,), seed=3)
    return hidden, weight, torch.full((V,), shift).to(hidden.device), target, randn(ROWS, seed=4)


def results(head: Head, V: int, shift: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Log-probs and the gradients of hidden, weight and bias."""
    *inputs, target, upstream = problem(V, shift)
    x, w, b = (t.to(dtype).requires_grad_() for t in inputs)
    log_prob = head(x, w, b, target)
    return [log_prob.detach(), *torch.autograd.grad((log_prob * upstream.to(dtype)).sum(), (x, w, b))]


def torchs_own(T: float) -> Head:
    def head(x: Tensor, w: Tensor, b: Tensor, target: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(x, w, b) / T
        return torch.log_softmax(logits, -1).gather(-1, target[:, None]).squeeze(-1)

    return head


def assert_as_exact_as_torch(ours: list[Tensor], V: int, shift: float, T: float) -> None:
    """Never more than twice as far from float64."""
    exact, theirs = results(torchs_own(T), V, shift, torch.float64), results(torchs_own(T), V, shift)
    for name, got, rival, wanted in zip(("values", "hidden", "weight", "bias"), ours, theirs, exact, strict=True):
        far, limit = ((t.double() - wanted).abs().max() for t in (got, rival))
        assert far <= 2 * limit, (name, float(far), float(limit))


@pytest.mark.parametrize(("V", "shift", "T"), [(301, 0.0, 1.0), (257, 200.0, 1.0), (301, -200.0, 0.7)])
def test_values_and_gradients_are_as_exact_as_torchs(backend: str, V: int, shift: float, T: float) -> None:
    def fused(x: Tensor, w: Tensor, b: Tensor, target: Tensor) -> Tensor:
        return linear_logprob(x, w, target, bias=b, temperature=T)

    def given(x: Tensor, w: Tensor, b: Tensor, target: Tensor) -> Tensor:
        return vocab_parallel_logprob(torch.nn.functional.linear(x, w, b), target, temperature=T)

    for head in (fused, given):
        assert_as_exact_as_torch(results(head, V, shift), V, shift, T)


def test_the_loss_and_its_gradients_are_as_exact_as_torchs(backend: str) -> None:
    *inputs, target, _ = problem(301, 200.0)

    def run(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, w, b = (t.to(dtype).requires_grad_() for t in inputs)
        value = loss(x, w, b)
        return [value.detach(), *torch.autograd.grad(value, (x, w, b))]

    def own(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w, b), target, reduction="sum")

    ours = run(lambda x, w, b: linear_cross_entropy(x, w, target, bias=b), torch.float32)
    for got, rival, wanted in zip(ours, run(own, torch.float32), run(own, torch.float64), strict=True):
        rounding = 2**-24 * wanted.abs().max()
        assert (got.double() - wanted).abs().max() <= 2 * (rival.double() - wanted).abs().max().clamp(min=rounding)


def sharded(V: int, shift: float, T: float, backend: str) -> list[Tensor]:
    """As :func:`results`; the vocabulary is cut over the group, gradients of weight and bias are this rank's."""
    size, rank = get_world_size(), get_rank()
    world: ProcessGroup | None = group.WORLD

    def head(x: Tensor, w: Tensor, b: Tensor, target: Tensor) -> Tensor:
        part = slice(rank * (V // size), (rank + 1) * (V // size))
        return linear_logprob(x, w[part], target, bias=b[part], temperature=T, vocab_start=part.start, group=world)

    with forced_backend(backend):
        return results(head, V, shift)


@pytest.mark.parametrize("which", ["torch", pytest.param("interpreter", marks=needs_interpreter)])
def test_so_they_are_over_tensor_parallel_ranks(which: str) -> None:
    V, shift, T = 303, 200.0, 0.7
    ranks = run_parallel(3, "test_logprob_accuracy:sharded", V, shift, T, which)
    for part in ranks:
        assert torch.equal(part[0], ranks[0][0]) and torch.equal(part[1], ranks[0][1])
    # A rank's gradients of weight and bias are zero outside its slice.
    whole = [*ranks[0][:2], *(torch.stack([part[i] for part in ranks]).sum(0) for i in (2, 3))]
    assert_as_exact_as_torch(whole, V, shift, T)
