"""Causal, prefix and decode attention against full attention, head by head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, randn, relative_error
from torch import Tensor

from mstar_mega.kernels import attend
from mstar_mega.kernels.prefix_attention import _prefix_reference, causal_attention, prefix_attention
from mstar_mega.models.attention import GroupPlan

INF = float("inf")


def full_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """The definition, head by head: q [T, Hq, D], k and v [S, Hk, D], allowed bool [T, S] -> [T, Hq, D]."""
    share = q.size(1) // k.size(1)
    heads = []
    for h in range(q.size(1)):
        scores = (q[:, h] @ k[:, h // share].T * scale).masked_fill(~allowed, -INF)
        heads.append(scores.softmax(dim=-1) @ v[:, h // share])
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (6, 2), (5, 1)])
def test_causal_attention(heads: int, kv_heads: int) -> None:
    q, k, v = (randn(2, 7, h, 6, seed=s) for s, h in enumerate((heads, kv_heads, kv_heads)))
    out = causal_attention(q, k, v, 0.4)
    causal = torch.ones(7, 7, dtype=torch.bool, device=DEVICE).tril()
    for g in range(2):
        expected = full_attention(q[g].double(), k[g].double(), v[g].double(), causal, 0.4)
        torch.testing.assert_close(out[g].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "P", "R", "heads", "kv_heads"), [(3, 7, 5, 4, 2), (1, 1, 1, 2, 2), (2, 9, 1, 6, 2), (5, 3, 4, 3, 1)]
)
def test_prefix_attention_is_full_attention_of_every_continuation(
    backend: str, n: int, P: int, R: int, heads: int, kv_heads: int
) -> None:
    G, D, scale = 3, 6, 0.41
    prefix_length = [P, max(1, P - 2), 1]
    own_length = [[R - (g + j) % R for j in range(n)] for g in range(G)]
    shapes = [(G, n, R, heads, D), *[(G, kv_heads, P, D)] * 2, *[(G, n, kv_heads, R, D)] * 2]
    q, kp, vp, ko, vo = inputs = [randn(*shape, seed=s).requires_grad_() for s, shape in enumerate(shapes)]
    prefix_bias = torch.zeros(G, P)
    for g, length in enumerate(prefix_length):
        prefix_bias[g, length:] = -INF
    own_bias = torch.zeros(R, R).masked_fill_(~torch.ones(R, R, dtype=torch.bool).tril(), -INF)[None, None]
    out = prefix_attention(q, kp, vp, prefix_bias, ko, vo, own_bias, scale)
    upstream = randn(*out.shape, seed=99)
    for g in range(G):
        for j in range(n):
            upstream[g, j, own_length[g][j] :] = 0.0  # padding rows hold garbage that nothing reads
    gradients = torch.autograd.grad((out * upstream).sum(), inputs)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, kp, vp, ko, vo = exact
    total = torch.zeros((), dtype=torch.float64)
    for g in range(G):
        p = prefix_length[g]
        for j in range(n):
            r = own_length[g][j]
            k = torch.cat([kp[g, :, :p], ko[g, j, :, :r]], dim=1).transpose(0, 1)
            v = torch.cat([vp[g, :, :p], vo[g, j, :, :r]], dim=1).transpose(0, 1)
            allowed = torch.arange(p + r) <= p + torch.arange(r)[:, None]
            expected = full_attention(q[g, j, :r], k, v, allowed, scale)
            torch.testing.assert_close(out[g, j, :r].double(), expected, rtol=0, atol=2e-6)
            total = total + (expected * upstream[g, j, :r]).sum()
    for got, wanted in zip(gradients, torch.autograd.grad(total, exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


def test_long_prefixes_in_splits_and_low_precision(backend: str) -> None:
    # 600 prefix tokens are cut into parts, and 70 rows of a key head into tiles.
    G, n, R, P, heads, kv_heads, D, scale = 1, 5, 7, 600, 4, 2, 16, 0.25
    shapes = [(G, n, R, heads, D), *[(G, kv_heads, P, D)] * 2, *[(G, n, kv_heads, R, D)] * 2]
    inputs = [randn(*shape, seed=s).bfloat16().requires_grad_() for s, shape in enumerate(shapes)]
    prefix_bias, upstream = torch.zeros(G, P), randn(*shapes[0], seed=9)
    prefix_bias[0, 590:] = -INF
    own_bias = torch.zeros(R, R).masked_fill_(~torch.ones(R, R, dtype=torch.bool).tril(), -INF)[None, None]

    q, kp, vp, ko, vo = inputs
    out = prefix_attention(q, kp, vp, prefix_bias, ko, vo, own_bias, scale)
    fast = [out, *torch.autograd.grad((out.float() * upstream).sum(), inputs)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    q, kp, vp, ko, vo = exact
    whole = _prefix_reference(q, kp, vp, prefix_bias, ko, vo, own_bias, scale)
    wanted = [whole, *torch.autograd.grad((whole * upstream).sum(), exact)]
    for a, b in zip(fast, wanted, strict=True):
        assert a.dtype == torch.bfloat16 and relative_error(a, b) < 2e-2


def test_what_compiled_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attend.fits(torch.empty(1, 2, 128)) == attend.INTERPRETED
    monkeypatch.setattr(attend, "INTERPRETED", False)
    for dtype, channels, taken in (
        (torch.bfloat16, 128, True),
        (torch.float16, 96, True),
        (torch.bfloat16, 129, False),  # their tiles need more shared memory than there is
        (torch.float32, 64, False),
    ):
        assert attend.fits(torch.empty(1, 2, channels, dtype=dtype)) == taken


def test_no_number_of_samples_is_too_large_for_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device counts to 65,535 in all dimensions of a grid but the first."""
    grids: dict[str, list[tuple[int, ...]]] = {}

    class Launched:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.setdefault(self.name, []).append(grid)
            return lambda *arguments, **options: None

    names = ("attend_kernel", "merge_kernel", "attend_dq_kernel", "attend_dkv_kernel")
    for name in names:
        monkeypatch.setattr(attend, name, Launched(name))
    B, Hq, Hk, L, D = 70_000, 4, 2, 130, 16
    q = torch.empty(B, Hq, D, device="meta", dtype=torch.bfloat16)
    kv = torch.empty(B, Hk, L, D, device="meta", dtype=torch.bfloat16)
    part = attend.Part(kv, kv, torch.empty(B, 1, 1, L, device="meta"), 1)
    out, lse = attend.forward(q, [part], 0.25)
    attend.backward(q, [part], out, lse, out, 0.25)
    assert set(grids) == set(names)
    assert all(size <= 65_535 for launched in grids.values() for grid in launched for size in grid[1:])
    assert grids["attend_kernel"] == [(B * Hk, 1)] and grids["attend_dkv_kernel"] == [(3 * B * Hk,)]


@pytest.mark.parametrize("R", [1, 13, 16])
def test_causal_rows_of_a_training_plan_begin_at_64_bytes(R: int) -> None:
    prompts, responses = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3, R, dtype=torch.int64)
    plan = GroupPlan(prompts, prompts == 0, responses, responses == 0, torch.arange(2 + 3 * R))
    assert plan._own_bias.stride(2) % 16 == 0
    expected = torch.zeros(R, R).masked_fill(torch.ones(R, R).triu(1) > 0, -INF)
    assert torch.equal(plan._own_bias[0, 0], expected)
