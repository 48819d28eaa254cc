"""Scores at the ends of steps and sums over spans, against their definitions."""

from __future__ import annotations

import pytest
import torch
from tensors import randn

from mstar_mega.kernels.process_scores import span_sums, step_scores


def test_step_scores_are_the_logit_of_a_two_class_softmax() -> None:
    hidden, head = randn(9, 8).requires_grad_(), randn(2, 8, seed=1).requires_grad_()
    positions = torch.tensor([8, 0, 3, 3])
    scores = step_scores(hidden, positions, head)
    classes = torch.softmax(hidden.double()[positions] @ head.double().T, dim=1)
    torch.testing.assert_close(torch.sigmoid(scores).double(), classes[:, 0], rtol=1e-5, atol=1e-6)
    scores.sum().backward()
    assert hidden.grad is not None and head.grad is not None
    assert hidden.grad[[1, 2, 4, 5, 6, 7]].abs().max() == 0
    torch.testing.assert_close(hidden.grad[3], 2 * (head[0] - head[1]).detach(), msg="a position that occurs twice")
    torch.testing.assert_close(head.grad[0], hidden.detach()[positions].sum(0))
    torch.testing.assert_close(head.grad[1], -head.grad[0])
    low = step_scores(hidden.detach().bfloat16(), positions, head.detach().bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, scores.detach(), rtol=0.05, atol=0.1)


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
