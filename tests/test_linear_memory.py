"""Log-probs and the SFT loss hold no more than their budget: chunks of rows, not whole logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import randn
from torch.profiler import ProfilerActivity, profile

from mstar_mega.kernels import dispatch, forced_backend, linear_cross_entropy, linear_logprob
from mstar_mega.kernels.linear_head import _SMALL, Head
from mstar_mega.kernels.linear_logprob import linear_logprob_reference


def peak_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """(most bytes allocated at once, largest single allocation) on the CPU while ``run`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak, largest = max(peak, now), max(largest, event.nbytes())
    del kept
    return peak, largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_budget(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    N, H, V = 1024, 16, 3000
    budget = 2**20
    monkeypatch.setattr(dispatch, "_chunk_bytes", budget)
    hidden, weight = randn(N, H).cpu().to(dtype).requires_grad_(), randn(V, H).cpu().to(dtype).requires_grad_()
    target = torch.randint(0, V, (N,))
    # Gradients in their own dtype and in float32, widened weights, and some numbers per row.
    besides = 4 * (4 * V * H) + 4 * (4 * N * H) + 64 * N
    with forced_backend("torch"):
        for run in (
            lambda: linear_cross_entropy(hidden, weight, target).backward(),
            lambda: linear_logprob(hidden, weight, target).sum().backward(),
        ):
            peak, largest = peak_bytes(run)
            assert peak < budget + besides, (peak, budget + besides)
            assert largest <= budget
        whole, _ = peak_bytes(lambda: linear_logprob_reference(hidden, weight, target)[0].sum().backward())
        assert whole > 4 * (budget + besides), "the definition needs the logits, or this test measures nothing"


@pytest.mark.parametrize("V", [512, 16_032, 128_256])
@pytest.mark.parametrize("budget", [2**20, 2**30, 2**50])
def test_chunks_are_a_quarter_of_the_rows_or_small(V: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_chunk_bytes", budget)
    for triton in (False, True):
        head = Head(torch.empty(V, 0), None, 1.0, V, None, triton)
        row = V * (8 if triton else 12)
        for rows in (0, 1, 7, 341, 1000, 8191):
            cuts = list(head.chunks(rows))
            assert [i for cut in cuts for i in range(rows)[cut]] == list(range(rows))
            sizes = [cut.stop - cut.start for cut in cuts]
            assert max(sizes, default=0) <= max(1, budget // row)
            assert max(sizes, default=0) <= max(-(-rows // 4), _SMALL // row)
            assert all(size >= max(1, max(sizes) - 1) for size in sizes), "no chunk is much smaller than the others"
            assert len(sizes) <= 4 or budget < 2**50
