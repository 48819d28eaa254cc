"""Scores at the ends of steps and sums over spans, against their definitions."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, randn, relative_error

from mstar_mega.kernels.process_scores import reduce_steps, span_sums, step_scores
from mstar_mega.rewards.steps import reduce_scores


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_scores_are_a_two_class_softmax(backend: str, dtype: torch.dtype) -> None:
    hidden, head = randn(9, 37).to(dtype).requires_grad_(), (randn(2, 37, seed=1) / 6).to(dtype).requires_grad_()
    positions = torch.tensor([8, 0, 3, 3])
    scores = step_scores(hidden, positions, head)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    classes = torch.softmax(exact[0][positions] @ exact[1].T, dim=1)[:, 0]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), classes, rtol=1e-5, atol=1e-6)
    logits = step_scores(hidden, positions, head, as_logit=True)
    torch.testing.assert_close(torch.sigmoid(logits), scores)
    upstream = randn(4, seed=2)
    wanted = torch.autograd.grad(classes, exact, upstream.double())
    for got, expected in zip(torch.autograd.grad(scores, (hidden, head), upstream), wanted, strict=True):
        assert got.dtype == dtype
        assert (
            relative_error(got, expected) < {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        )


def test_step_scores_of_nothing_and_mistakes(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert step_scores(randn(3, 8), none, randn(2, 8)).shape == (0,)
    with pytest.raises(ValueError, match="head_weight"):
        step_scores(randn(3, 8), none, randn(3, 8))
    with pytest.raises(ValueError, match="int64"):
        step_scores(randn(3, 8), none.int(), randn(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["min", "prod", "mean", "last"])
def test_reduced_steps_are_those_of_a_loop(backend: str, how: Any, dtype: torch.dtype) -> None:
    counts = [3, 0, 1, 70, 129, 0]
    scores = randn(sum(counts), seed=3).to(dtype).sigmoid()
    scores[3 + 0] = 0.0
    offsets = torch.tensor([0, *accumulate(counts)])
    reduced = reduce_steps(scores, offsets, how)
    assert reduced.dtype == dtype
    for part, got in zip(scores.split(counts), reduced.tolist(), strict=True):
        expected = reduce_scores(part.tolist(), how)
        assert math.isnan(got) if expected is None else got == pytest.approx(expected, rel=1e-5, abs=1e-30)
    scores[5] = math.nan
    spoilt = reduce_steps(scores, offsets, how).tolist()
    assert math.isnan(spoilt[3]) or how == "last"
    assert spoilt[4] == reduced[4]
    assert reduce_steps(scores[:0], torch.zeros(2, dtype=torch.int64), how).isnan().all()
    with pytest.raises(ValueError, match="min, prod, mean or last"):
        reduce_steps(scores, offsets, "max")  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "spans"), [(1, 3), (13, 7), (257, 101), (4099, 33)])
def test_span_sums_and_their_gradient_against_a_loop(length: int, spans: int) -> None:
    values = randn(length, seed=length)
    values = values.sign() * (values.abs() + 0.1)
    assert values.abs().min() > 0, "a zero would hide a value that is left out"
    ends = torch.randint(0, length + 1, (2, spans), generator=torch.Generator().manual_seed(spans)).sort(dim=0).values
    ends[:, 0] = torch.tensor([0, length])  # overlaps every other span
    ends[:, 1], ends[:, 2] = 0, length  # empty, at either end
    start, end = ends
    upstream = randn(spans, seed=7)

    x = values.clone().requires_grad_()
    sums = span_sums(x, start, end)
    assert sums.dtype == torch.float32 and sums.shape == (spans,)
    (sums * upstream).sum().backward()

    exact = values.double().requires_grad_()
    expected = torch.stack([exact[a:b].sum() for a, b in zip(start.tolist(), end.tolist(), strict=True)])
    (expected * upstream.double()).sum().backward()

    # One rounding to float32, whatever the length.
    torch.testing.assert_close(sums.double(), expected.detach(), rtol=1e-7, atol=1e-10)
    assert sums[start == end].abs().max() == 0
    assert x.grad is not None and exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)


def test_span_sums_of_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert span_sums(randn(5), none, none).shape == (0,)
    empty = torch.zeros(0).requires_grad_()
    sums = span_sums(empty, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert sums.tolist() == [0, 0]
    sums.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0,)
