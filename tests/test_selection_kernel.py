"""The k best correct responses of many queries against sorting them one by one."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randint, randn

from mstar_mega.kernels import select_topk

SIZES = [8, 0, 1, 700, 16]


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_correct_responses_in_order(backend: str, k: int, dtype: torch.dtype) -> None:
    total = sum(SIZES)
    score = randint(-3, 3, (total,), seed=1).to(dtype)  # many ties
    score[2], score[3], score[4] = float("nan"), float("-inf"), float("inf")
    correct = randn(total, seed=2) > 0
    correct[:5], correct[9:709:2], correct[709:] = True, False, False
    offsets = torch.tensor([0, *torch.tensor(SIZES).cumsum(0).tolist()])
    best = select_topk(score, correct, offsets, k)
    values, right = score.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")).tolist(), correct
    for query, (begin, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist(), strict=False)):
        candidates = [i for i in range(begin, end) if right[i]]
        expected = sorted(candidates, key=lambda i: (-values[i], i))[:k]
        assert best.index[query].tolist() == expected + [-1] * (k - len(expected))
        assert best.count[query] == len(expected) and best.correct[query] == len(candidates)


def test_no_query_and_mistakes(backend: str) -> None:
    nothing = torch.zeros(0)
    assert select_topk(nothing, nothing.bool(), torch.zeros(1, dtype=torch.int64), 2).index.shape == (0, 2)
    offsets = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="at least 1"):
        select_topk(torch.zeros(2), torch.ones(2, dtype=torch.bool), offsets, 0)
    with pytest.raises(ValueError, match="bool"):
        select_topk(torch.zeros(2), torch.ones(2), offsets, 1)
    with pytest.raises(ValueError, match="offsets"):
        select_topk(torch.zeros(2), torch.ones(2, dtype=torch.bool), offsets.float(), 1)
