"""What top-p keeps: against sorted float64 probabilities, whole and cut over ranks, in PyTorch and in Triton."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, DEVICE, DTYPES, needs_interpreter, randn
from parallel import run_parallel
from torch import Tensor
from torch.distributed import get_rank, get_world_size, group

from mstar_mega.kernels import forced_backend, top_p
from mstar_mega.kernels.sampling import Sampled, sample_with_logprob
from mstar_mega.kernels.top_p import (
    _LOW,
    _definition,
    _ordered,
    _search,
    _steps_per_logit,
    _sums_sorted,
    _sums_triton,
    top_p_kept,
    weights,
)

ODD = 301


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's cost is per operation."""
    if DEVICE == "cpu":
        monkeypatch.setattr(top_p, "BLOCK", 2048)


def rows(columns: int = ODD, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of different shapes: a few likely ids, many ties, flat, both zeros, far below zero."""
    z = torch.stack([
        3 * randn(columns, seed=1),
        (2 * randn(columns, seed=2)).round(),
        0.01 * randn(columns, seed=3),
        torch.where(randn(columns, seed=4) > 0, 0.0, -0.0),
        2 * randn(columns, seed=5) - 200,
    ])  # fmt: skip
    return z.to(dtype)


CASES: dict[str, dict[str, Any]] = {
    "middle": {"top_p": 0.7},
    "hot": {"top_p": 0.9, "temperature": 2.5},
    "cold": {"top_p": 0.9, "temperature": 0.2},
    "tiny": {"top_p": 1e-9},
    "nearly all": {"top_p": 1 - 1e-7},
    "half, after top-k": {"top_p": 0.5, "top_k": 20},
    "banned, padded": {"top_p": 0.8, "banned": [0, 7, 8, 120, 290], "valid": 293},
}


def kept_ids(z: Tensor, settings: dict[str, Any], split: Any = None) -> list[set[int]]:
    """Ids that stay, row by row, as the draw reads ``Kept``."""
    valid, allowed = settings.get("valid", z.size(1)), torch.ones(z.size(1), dtype=torch.uint8, device=z.device)
    allowed[settings.get("banned", [])] = 0
    floor = None
    if "top_k" in settings:
        floor = z.float().topk(settings["top_k"], dim=1).values[:, -1].contiguous()
    kept = top_p_kept(
        z, top_p=settings["top_p"], temperature=settings.get("temperature", 1.0), allowed=allowed, floor=floor,
        valid=valid, split=split, group=None,
    )  # fmt: skip
    found = []
    for row, low, ties in zip(z.float().tolist(), kept.floor.tolist(), kept.ties.tolist(), strict=True):
        usable = [i for i in range(valid) if allowed[i]]
        span = z.size(1) if split is None else split[1]
        equal: list[int] = []
        for part, left in enumerate(ties):
            equal += [i for i in usable if row[i] == low and part * span <= i < (part + 1) * span][:left]
        found.append({i for i in usable if row[i] > low} | set(equal))
    return found


def expected_ids(z: Tensor, settings: dict[str, Any]) -> list[set[int]]:
    """By sorting probabilities in float64."""
    found = []
    for row in z.double().tolist():
        ids = [i for i in range(settings.get("valid", len(row))) if i not in settings.get("banned", [])]
        ids.sort(key=lambda i: -row[i])  # stable: the lower id first
        if "top_k" in settings:
            last = row[ids[settings["top_k"] - 1]]
            ids = [i for i in ids if row[i] >= last]
        odds = [math.exp((row[i] - row[ids[0]]) / settings.get("temperature", 1.0)) for i in ids]
        needed, mass, kept = settings["top_p"] * math.fsum(odds), 0.0, set()
        for i, odd in zip(ids, odds, strict=True):
            if mass >= needed * (1 - 1e-12):
                break
            kept.add(i)
            mass += odd
        found.append(kept)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_definition_is_what_sorted_probabilities_give(case: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert kept_ids(rows(dtype=dtype), CASES[case]) == expected_ids(rows(dtype=dtype), CASES[case])


def test_the_edge_between_two_ids_is_exact_and_one_column_is_kept() -> None:
    equal = torch.zeros(3, 8, device=DEVICE)
    for share, ids in ((0.5, 4), (0.5 + 1e-12, 5), (0.5 - 1e-12, 4), (1e-300, 1), (1 - 2**-53, 8)):
        assert kept_ids(equal, {"top_p": share}) == [set(range(ids))] * 3
    assert kept_ids(equal[:, :1], {"top_p": 0.3}) == [{0}] * 3


@pytest.mark.parametrize("temperature", [1e-30, 0.3, 1.0, 40.0])
def test_weights_are_exponentials(temperature: float) -> None:
    z = torch.cat([16 * randn(4, 500, seed=7), torch.full((4, 1), -torch.inf, device=DEVICE)], dim=1)
    highest = z.amax(dim=1)
    got = weights(z, highest, _steps_per_logit(temperature, z)).double() / 2**40
    wanted = torch.exp((z - highest[:, None]).double() / temperature)
    assert (got.amax(dim=1) == 1).all() and (got[:, -1] == 0).all()
    error = 2e-8 + 2**-23 * (wanted.log().abs().clamp(max=60) + 1)  # and what float32 loses in the exponent
    assert ((got - wanted).abs() <= error * wanted + 2**-40).all()


# -- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_search_of_sorted_slices_ends_where_the_definition_does(dtype: torch.dtype) -> None:
    z = torch.cat([rows(dtype=dtype), rows(dtype=dtype).flip(1) * 0.3])
    z[-1] = -torch.inf
    full, scale = z.float(), _steps_per_logit(0.8, z)
    highest = full.amax(dim=1).nan_to_num(neginf=0.0)
    w = weights(full, highest, scale)
    for share in (1e-9, 0.3, 0.5, 0.95, 1 - 1e-7):
        found = _search(_sums_sorted(full, w), highest, scale, _LOW[dtype], share, False, None)
        wanted = _definition(full, w, share)
        assert torch.equal(found.floor, wanted.floor)
        assert torch.equal(found.ties[:-1], wanted.ties[:-1])  # a row without allowed ids has no ties


def test_triton_adds_up_the_same_integers() -> None:
    for dtype, place, top in ((torch.float32, 28, 0.0), (torch.float32, 20, 1.5), (torch.bfloat16, 16, -1.0)):
        z, scale = randn(2, 700, seed=8).to(dtype), _steps_per_logit(0.7, torch.zeros(2, 1, device=DEVICE))
        floor, allowed = torch.full((2,), -1.2, device=DEVICE), (randn(700, seed=9) > -1).to(torch.uint8)
        highest = z.float().amax(dim=1)
        found = _ordered(torch.full((2, 1), top, device=DEVICE)).squeeze(1) >> (place + 4)
        full = z[:, :690].float().masked_fill((allowed[:690] == 0) | (z[:, :690].float() < floor[:, None]), -torch.inf)
        wanted = _sums_sorted(full, weights(full, highest, scale))(found, place)
        with forced_backend(BACKENDS[1]):
            parts = _sums_triton(z, allowed, floor, highest, scale, 690, (2, 384))(found, place)
        assert parts.shape == (2, 2, 16) and wanted.sum() > 0
        assert torch.equal(parts.sum(dim=1, keepdim=True), wanted)


@pytest.mark.parametrize(
    ("case", "dtype", "chosen", "split"),
    [
        ("half, after top-k", torch.float32, [0, 1], (1, ODD)),
        ("banned, padded", torch.bfloat16, [1, 3, 4], (2, 160)),
        ("nearly all", torch.float16, [1], (3, 128)),
    ],
)
def test_triton_keeps_what_the_definition_keeps(case: str, dtype: torch.dtype, chosen: list[int], split: Any) -> None:
    z = rows(dtype=dtype)[chosen]
    with forced_backend(BACKENDS[1]):
        assert kept_ids(z, CASES[case], split) == expected_ids(z, CASES[case])


# -- drawing ---------------------------------------------------------------------------------------------------------


def draw(z: Tensor, over: Any = None, valid_vocab: int = 290, top_k: int = 0) -> Sampled:
    return sample_with_logprob(
        z, temperature=0.9, top_k=top_k, top_p=0.8, banned=torch.tensor([3, 100], device=z.device), seed=5,
        counters=torch.arange(z.size(0), device=z.device), valid_vocab=valid_vocab, group=over,
    )  # fmt: skip


def assert_same(got: Sampled, wanted: Sampled) -> None:
    assert torch.equal(got.token, wanted.token)
    for name in ("behaviour_log_prob", "log_prob", "mass"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=0, atol=1e-6)


DRAWS: list[dict[str, int]] = [{}, {"top_k": 30}, {"valid_vocab": 140}]  # the last: two of four ranks have no ids


def whole_logits() -> Tensor:
    """Four ranks share the columns; equal logits stand on all of them."""
    z = torch.cat([rows(304)[:4]] * 10)
    z[4:20] += 0.1 * randn(16, 304, seed=6)
    return z


def draw_shards(backend: str, count: int) -> list[Sampled]:
    """On each rank of a group."""
    z = whole_logits()[:count].chunk(get_world_size(), dim=1)[get_rank()]
    top_p.BLOCK = 2048
    with forced_backend(backend):
        return [draw(z, group.WORLD, **settings) for settings in DRAWS[-1 if backend == "interpreter" else 0 :]]


SHARDS = [(2, "torch", 40), (4, "torch", 40), pytest.param(2, "interpreter", 2, marks=needs_interpreter)]


@pytest.mark.parametrize(("size", "backend", "count"), SHARDS)
def test_a_draw_from_shards_is_the_draw_from_the_whole(size: int, backend: str, count: int) -> None:
    settings = DRAWS[-1 if backend == "interpreter" else 0 :]
    wanted = [draw(whole_logits()[:count].cpu(), **setting) for setting in settings]
    assert all(drawn.token.unique().numel() > min(count - 1, 9) for drawn in wanted)
    for rank in run_parallel(size, "test_top_p:draw_shards", backend, count):
        for got, whole in zip(rank, wanted, strict=True):
            assert_same(got, whole)


def test_triton_draws_what_plain_pytorch_draws() -> None:
    z = rows()[[0, 1, 3]].bfloat16()
    drawn = []
    for backend in BACKENDS:
        with forced_backend(backend):
            drawn.append(draw(z, top_k=30))
    assert_same(drawn[1], drawn[0])


def test_a_row_without_allowed_ids_leaves_the_others_alone() -> None:
    z = rows()
    z[2] = -torch.inf
    others = [0, 1, 3, 4]
    got, wanted = draw(z), draw(rows())
    assert got.token[others].tolist() == wanted.token[others].tolist()
