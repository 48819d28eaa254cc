"""Sampling against brute force and the softmax, whole and cut over the ranks of a gloo group."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, DEVICE, needs_interpreter
from parallel import run_parallel
from tensors import randn
from torch import Tensor
from torch.distributed import get_rank, get_world_size, group

from mstar_mega.kernels import forced_backend
from mstar_mega.kernels.noise import counters
from mstar_mega.kernels.sampling import Sampled, sample_with_logprob

VOCABULARY, ROWS = 64, 40
CASES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "greedy": {"temperature": 0.0},
    "banned": {"temperature": 1.0, "banned": torch.tensor([0, 17, 40])},
    "shard banned": {"temperature": 1.0, "banned": torch.arange(16, 32)},
    "top_k": {"temperature": 0.8, "top_k": 5},
    "top_p": {"temperature": 1.2, "top_p": 0.7},
    "all": {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "banned": torch.tensor([1, 2, 50]), "valid_vocab": 57},
    "padding": {"temperature": 1.0, "valid_vocab": 61},
    "padded shard": {"temperature": 1.0, "valid_vocab": 45},
    "greedy, padded shard": {"temperature": 0.0, "valid_vocab": 45, "banned": torch.tensor([44])},
}


def case_logits() -> Tensor:
    logits = 2 * randn(ROWS, VOCABULARY, seed=3)
    logits[:, 60:] += 8  # padding must not be drawn even where it is likely
    return logits


def sample_case(logits: Tensor, case: str, group: Any = None) -> Sampled:
    noise = counters(torch.arange(ROWS), torch.arange(ROWS) % 7)
    return sample_with_logprob(logits, seed=11, counters=noise, group=group, **CASES[case])


def sample_shards() -> dict[str, Sampled]:
    size, rank = get_world_size(), get_rank()
    return {case: sample_case(case_logits().chunk(size, dim=1)[rank], case, group.WORLD) for case in CASES}


@pytest.mark.parametrize("size", [2, 4])
def test_sampling_from_vocabulary_shards_equals_sampling_from_the_whole(size: int) -> None:
    for rank in run_parallel(size, "test_sampling:sample_shards"):
        for case, drawn in rank.items():
            whole = sample_case(case_logits(), case)
            assert torch.equal(drawn.token, whole.token), case
            assert drawn.token.dtype == torch.int64
            for name in ("behaviour_log_prob", "log_prob", "mass"):
                # Scaled logits reach 50, where float32 has steps of 4e-6.
                gap = (getattr(drawn, name) - getattr(whole, name)).abs().max()
                assert gap < 1e-5, (case, name, gap)


def survivors(logits: list[float], case: dict[str, Any]) -> dict[int, float]:
    """Ids that may be drawn and their probabilities, by brute force: ban, temperature, top-k, top-p."""
    end, banned = case.get("valid_vocab", len(logits)), set(case.get("banned", torch.empty(0)).tolist())
    temperature = case["temperature"] or 1.0
    weights = {i: math.exp(z / temperature) for i, z in enumerate(logits[:end]) if i not in banned}
    if case.get("top_k"):
        weights = dict(sorted(weights.items(), key=lambda item: -item[1])[: case["top_k"]])
    total = sum(weights.values())
    if case.get("top_p", 1.0) < 1:
        kept, mass = {}, 0.0
        for i, weight in sorted(weights.items(), key=lambda item: -item[1]):
            if mass >= case["top_p"]:
                break
            kept[i] = weight
            mass += weight / total
        weights, total = kept, sum(kept.values())
    return {i: weight / total for i, weight in weights.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_is_drawn_and_its_log_probs_against_brute_force(case: str) -> None:
    settings, draws = CASES[case], 3000
    for row in range(4):
        logits = case_logits()[row]
        noise = counters(torch.full((draws,), row), torch.arange(draws))
        drawn = sample_with_logprob(logits.expand(draws, -1), seed=1, counters=noise, **settings)
        allowed = survivors(logits.double().tolist(), settings)
        tokens = drawn.token.tolist()
        if settings["temperature"] == 0:
            assert set(tokens) == {max(allowed, key=lambda i: allowed[i])}
        else:
            assert set(tokens) <= set(allowed)
            likely = {i for i, p in allowed.items() if p > 0.01}
            assert likely <= set(tokens), "an id that must survive was never drawn"
        behaviour = torch.tensor([math.log(allowed[i]) for i in tokens])
        torch.testing.assert_close(drawn.behaviour_log_prob, behaviour, rtol=1e-5, atol=1e-5)
        everything = survivors(
            logits.double().tolist(),
            {"temperature": settings["temperature"], "valid_vocab": settings.get("valid_vocab", VOCABULARY)},
        )
        whole = torch.tensor([math.log(everything[i]) for i in tokens])
        torch.testing.assert_close(drawn.log_prob, whole, rtol=1e-5, atol=1e-5)
        mass = torch.full((draws,), sum(everything[i] for i in allowed))
        torch.testing.assert_close(drawn.mass, mass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    draws = 30_000
    logits = 1.5 * randn(40, seed=9)
    noise = counters(torch.arange(draws) % 300, torch.arange(draws) // 300)
    drawn = sample_with_logprob(logits.expand(draws, -1), temperature=temperature, seed=4, counters=noise)
    expected = torch.softmax(logits.double() / temperature, dim=0) * draws
    observed = torch.bincount(drawn.token, minlength=40).double()
    rare = expected < 8
    if rare.any():  # chi-square wants some hits in every cell
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    degrees = expected.numel() - 1
    assert statistic < degrees + 3.1 * math.sqrt(2 * degrees) + 6, (statistic, degrees)  # about 1 in 1000


def test_the_lowest_id_wins_a_greedy_tie_within_and_across_shards() -> None:
    for rank in [*run_parallel(2, "test_sampling:greedy_ties"), greedy_ties(whole=True)]:
        assert rank == [2, 5, 0, 1]


def greedy_ties(whole: bool = False) -> list[int]:
    logits = torch.zeros(4, 8)
    logits[0, [2, 6]] = 1.0  # one in each shard
    logits[1, [5, 7]] = 1.0  # both in the second
    logits[3, 0] = -1.0
    shard, over = (logits, None) if whole else (logits.chunk(2, dim=1)[get_rank()], group.WORLD)
    noise = torch.arange(4)
    return sample_with_logprob(shard, temperature=0.0, seed=0, counters=noise, group=over).token.tolist()


def test_seed_and_counter_are_the_whole_source_of_randomness() -> None:
    logits = randn(1, 300, seed=2).expand(64, -1)

    def draw(seed: int, first: int) -> Tensor:
        noise = counters(torch.arange(first, first + 64), torch.zeros(64, dtype=torch.int64))
        return sample_with_logprob(logits, temperature=1.0, seed=seed, counters=noise).token

    assert torch.equal(draw(0, 0), draw(0, 0))
    assert torch.equal(draw(0, 0)[8:], draw(0, 8)[:-8]), "a row's place in the batch changed its draw"
    assert (draw(0, 0) != draw(1, 0)).float().mean() > 0.8
    assert draw(0, 0).unique().numel() > 20


def test_sampling_reads_bfloat16_logits_exactly() -> None:
    logits = case_logits().bfloat16()
    with forced_backend("torch"):  # in float32 alone a kernel in C may be there
        low, full = sample_case(logits, "plain"), sample_case(logits.float(), "plain")
    assert torch.equal(low.token, full.token) and torch.equal(low.log_prob, full.log_prob)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("top_p", "all")])  # see test_top_p.py
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 2051])
def test_triton_draws_what_plain_pytorch_draws(case: str, vocabulary: int) -> None:
    rows = 12
    logits = case_logits()[:rows] if vocabulary == VOCABULARY else 2 * randn(rows, vocabulary, seed=5)
    if "valid_vocab" in CASES[case] and vocabulary != VOCABULARY:
        pytest.skip("the same as with the small vocabulary")
    settings: dict[str, Any] = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in CASES[case].items()}
    drawn = []
    for backend in BACKENDS:
        with forced_backend(backend):
            noise = counters(torch.arange(rows), torch.arange(rows) % 5).to(DEVICE)
            low = logits.bfloat16().to(DEVICE)
            drawn.append([sample_with_logprob(x, seed=3, counters=noise, **settings) for x in (logits.to(DEVICE), low)])
    for plain, fast in zip(*drawn, strict=True):
        assert torch.equal(plain.token, fast.token)
        for name in ("behaviour_log_prob", "log_prob", "mass"):
            torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=0, atol=1e-5)


def triton_shards(case: str) -> Sampled:
    size, rank = get_world_size(), get_rank()
    with forced_backend("interpreter"):
        return sample_case(case_logits().chunk(size, dim=1)[rank], case, group.WORLD)


@needs_interpreter
@pytest.mark.parametrize("case", ["top_k", "padded shard"])
def test_triton_draws_the_same_from_vocabulary_shards(case: str) -> None:
    whole = sample_case(case_logits(), case)
    for drawn in run_parallel(2, "test_sampling:triton_shards", case):
        assert torch.equal(drawn.token, whole.token)
        torch.testing.assert_close(drawn.mass, whole.mass, rtol=0, atol=1e-5)
