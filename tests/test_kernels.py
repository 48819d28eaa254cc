"""The kernels against their definitions, whole and cut over the ranks of a gloo group."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parallel import run_parallel
from torch import Tensor
from torch.distributed import get_rank, get_world_size, group

from mstar_mega.kernels.logprob import target_logprob_reference, vocab_parallel_logprob
from mstar_mega.kernels.noise import counters, gumbel, key_of, mix, uniform
from mstar_mega.kernels.prefix_attention import causal_attention, decode_attention, prefix_attention
from mstar_mega.kernels.process_scores import step_scores
from mstar_mega.kernels.sampling import Sampled, sample_with_logprob

INF = float("inf")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- noise -----------------------------------------------------------------------------------------------------------

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(x: int) -> int:
    """SplitMix64's finaliser on unsigned integers, as published."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def unmix(y: int) -> int:
    """The number whose :func:`splitmix` is ``y``."""

    def undo_shift(value: int, bits: int) -> int:
        x = value
        for _ in range(64 // bits + 1):
            x = value ^ (x >> bits)
        return x

    y = undo_shift(y, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    y = undo_shift(y, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return undo_shift(y, 30)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def test_mix_is_splitmix64s_finaliser_also_at_the_extremes() -> None:
    assert splitmix(GOLDEN) == 0xE220A8397B1DCDAF  # the generator's first output from seed 0
    inputs = [0, 1, MASK, 1 << 63, (1 << 63) - 1, GOLDEN, *(splitmix(i) for i in range(200))]
    assert all(unmix(splitmix(x)) == x for x in inputs)
    mixed = mix(torch.tensor([signed(x) for x in inputs]))
    assert mixed.tolist() == [signed(splitmix(x)) for x in inputs]
    assert mix(torch.arange(-50_000, 50_000)).unique().numel() == 100_000


def test_uniform_numbers_are_the_top_bits_of_the_mixed_counter() -> None:
    numbers = [0, -1, 2**63 - 1, -(2**63), 12345]
    expected = [[(splitmix((n + (i + 1) * GOLDEN) & MASK) >> 41) / 2**23 + 2**-24 for i in range(50)] for n in numbers]
    drawn = uniform(torch.tensor(numbers), torch.arange(50))
    assert drawn.dtype == torch.float32 and drawn.double().tolist() == expected


def test_uniform_numbers_look_uniform_and_independent() -> None:
    sample = counters(torch.arange(100) * 7919, torch.zeros(100, dtype=torch.int64))
    u = uniform(sample, torch.arange(2000))
    observed = torch.histc(u, bins=64, min=0, max=1)
    expected = u.numel() / 64
    assert ((observed - expected) ** 2 / expected).sum() < 103.4  # chi-square, 63 degrees of freedom, 1 in 1000
    centred = u.double() - 0.5
    standard_error = 1 / math.sqrt(u.numel())
    for a, b in [(centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])]:
        assert abs((a * b).mean() * 12) < 4 * standard_error, "neighbouring ids or samples are correlated"
    at_positions = uniform(counters(torch.full((2000,), 5), torch.arange(2000)), torch.arange(64)).double() - 0.5
    assert abs((at_positions[1:] * at_positions[:-1]).mean() * 12) < 4 / math.sqrt(at_positions.numel())


def test_gumbel_noise_is_finite_even_where_all_bits_are_equal() -> None:
    for bits in (0, MASK, 1 << 63, (1 << 63) - 1, (1 << 41) - 1):
        counter = torch.tensor([signed((unmix(bits) - 4 * GOLDEN) & MASK)])  # id 3 gets exactly these bits
        u, g = uniform(counter, torch.tensor([3])), gumbel(counter, torch.tensor([3]))
        assert 0 < u < 1 and torch.isfinite(g).all(), (bits, u, g)
    g = gumbel(counters(torch.arange(200), torch.arange(200)), torch.arange(1000)).double()
    assert torch.isfinite(g).all()
    assert abs(g.mean() - 0.5772157) < 4 * math.pi / math.sqrt(6 * g.numel())
    assert abs(g.var() / (math.pi**2 / 6) - 1) < 0.03


def test_noise_of_an_id_does_not_depend_on_which_ids_are_asked_for() -> None:
    sample = counters(torch.tensor([3, -5, 2**62]), torch.tensor([0, 10, 999]))
    whole = gumbel(sample, torch.arange(101))
    for cut in (slice(0, 50), slice(50, 101), slice(7, 8)):
        assert torch.equal(gumbel(sample, torch.arange(101)[cut]), whole[:, cut])
    assert torch.equal(gumbel(sample[1:2], torch.arange(101)), whole[1:2])
    assert whole.unique().numel() > 300


def test_keys_tell_their_parts_apart() -> None:
    keys = [key_of(0, "ab", "c"), key_of(0, "a", "bc"), key_of(1, "ab", "c"), key_of(0, "ab"), key_of(0, "ab", "c", 0)]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**63 for key in keys)
    assert key_of(0, "ab", "c") == keys[0]
    one = counters(torch.tensor([5, 5, 6]), torch.tensor([0, 1, 0]))
    assert one.unique().numel() == 3


# -- sampling --------------------------------------------------------------------------------------------------------

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
    for rank in run_parallel(size, "test_kernels:sample_shards"):
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
    for rank in [*run_parallel(2, "test_kernels:greedy_ties"), greedy_ties(whole=True)]:
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
    low, full = sample_case(logits, "plain"), sample_case(logits.float(), "plain")
    assert torch.equal(low.token, full.token) and torch.equal(low.log_prob, full.log_prob)


# -- log-probs -------------------------------------------------------------------------------------------------------

IGNORE = -100


def logprob_problem(vocabulary: int, scale: float = 3.0, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (first and last column, ignored and other rows) and upstream gradients (a zero among them)."""
    logits = scale * randn(12, vocabulary, seed=vocabulary) + shift
    target = torch.randint(0, vocabulary, (12,), generator=torch.Generator().manual_seed(1))
    target[0], target[1], target[2], target[5] = 0, vocabulary - 1, IGNORE, IGNORE
    upstream = randn(12, seed=8)
    upstream[7] = 0.0
    return logits, target, upstream


def by_definition(
    logits: Tensor, target: Tensor, upstream: Tensor, temperature: float, valid: int
) -> tuple[Tensor, Tensor]:
    """Forward and gradient in float64."""
    exact = logits.double().requires_grad_()
    counted = target != IGNORE
    chosen = target_logprob_reference(exact[:, :valid], target.clamp(min=0), temperature)
    values = torch.where(counted, chosen, 0.0)
    (values * upstream.double()).sum().backward()
    assert exact.grad is not None
    return values.detach(), exact.grad


@pytest.mark.parametrize("temperature", [1.0, 0.3, 3.0])
@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0])
@pytest.mark.parametrize(("vocabulary", "valid"), [(101, None), (128, 121), (1, None)])
def test_log_probs_and_gradients_against_float64(
    temperature: float, shift: float, vocabulary: int, valid: int | None
) -> None:
    logits, target, upstream = logprob_problem(vocabulary, shift=shift)
    logits[:, valid or vocabulary :] = 300.0 + shift  # padding must not count even where it is large
    target = target.clamp(max=(valid or vocabulary) - 1)
    z = logits.clone().requires_grad_()
    values = vocab_parallel_logprob(z, target, temperature=temperature, valid_vocab=valid)
    assert values.dtype == torch.float32
    (values * upstream).sum().backward()
    expected, gradient = by_definition(logits, target, upstream, temperature, valid or vocabulary)
    # A logit of 200 is stored to 1.5e-5, divided by 0.3 that is 5e-5.
    accuracy = 2e-6 if not shift else 6e-5 / min(temperature, 1.0)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=accuracy)
    assert z.grad is not None
    torch.testing.assert_close(z.grad.double(), gradient, rtol=1e-5, atol=accuracy / min(temperature, 1.0))
    assert z.grad[[2, 5, 7]].abs().max() == 0, "ignored rows and zero upstream gradients"
    assert torch.equal(logits, z.detach()), "the input was changed"


def test_all_ignored_and_empty() -> None:
    z = randn(3, 10).requires_grad_()
    values = vocab_parallel_logprob(z, torch.full((3,), IGNORE))
    values.sum().backward()
    assert values.tolist() == [0, 0, 0] and z.grad is not None and z.grad.abs().max() == 0
    nothing = randn(0, 10).requires_grad_()
    vocab_parallel_logprob(nothing, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert nothing.grad is not None and nothing.grad.shape == (0, 10)


def test_logits_of_minus_infinity_give_no_nan() -> None:
    z = randn(4, 9)
    z[:, 3] = z[1, 5] = z[2, :8] = -INF
    target = torch.tensor([0, 5, 8, IGNORE])
    z.requires_grad_()
    values = vocab_parallel_logprob(z, target, temperature=0.7)
    assert values[1] == -INF and values[2] == 0 and torch.isfinite(values[[0, 3]]).all()
    values.sum().backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()
    assert z.grad[0, 3] == 0 and z.grad[3].abs().max() == 0


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits, target, upstream = logprob_problem(257)
    z = logits.bfloat16().requires_grad_()
    values = vocab_parallel_logprob(z, target, temperature=0.8)
    (values * upstream).sum().backward()
    expected, gradient = by_definition(z.detach(), target, upstream, 0.8, 257)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=2e-6)
    assert z.grad is not None and z.grad.dtype == torch.bfloat16
    torch.testing.assert_close(z.grad.double(), gradient, rtol=2**-8, atol=1e-6)


def logprob_shards(valid: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Forward and this rank's gradient slice of the problem cut over the group."""
    logits, target, upstream = logprob_problem(128)
    size, rank = get_world_size(), get_rank()
    z = logits.chunk(size, dim=1)[rank].clone().requires_grad_()
    values = vocab_parallel_logprob(
        z, target.clamp(max=valid - 1), temperature=temperature, valid_vocab=valid, vocab_start=rank * (128 // size),
        group=group.WORLD,
    )  # fmt: skip
    (values * upstream).sum().backward()
    assert z.grad is not None
    return values.detach(), z.grad


@pytest.mark.parametrize("valid", [128, 121, 70])
def test_log_probs_from_vocabulary_shards_equal_the_whole(valid: int) -> None:
    # 70 leaves the last of 4 ranks (columns 96 to 127) nothing but padding.
    for temperature in (1.0, 0.5):
        whole, gradient = run_parallel(1, "test_kernels:logprob_shards", valid, temperature)[0]
        logits, target, upstream = logprob_problem(128)
        expected, _ = by_definition(logits, target.clamp(max=valid - 1), upstream, temperature, valid)
        torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=2e-6)
        for size in (2, 4):
            ranks = run_parallel(size, "test_kernels:logprob_shards", valid, temperature)
            for values, _ in ranks:
                torch.testing.assert_close(values, whole, rtol=1e-6, atol=1e-6)
            cut = torch.cat([part for _, part in ranks], dim=1)
            torch.testing.assert_close(cut, gradient, rtol=1e-6, atol=1e-6)
            assert cut[:, valid:].abs().max() == 0 if valid < 128 else True


# -- attention -------------------------------------------------------------------------------------------------------


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
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    for g in range(2):
        expected = full_attention(q[g].double(), k[g].double(), v[g].double(), causal, 0.4)
        torch.testing.assert_close(out[g].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "P", "R", "heads", "kv_heads"), [(3, 7, 5, 4, 2), (1, 1, 1, 2, 2), (2, 9, 1, 6, 2), (5, 3, 4, 3, 1)]
)
def test_prefix_attention_is_full_attention_of_every_continuation(
    n: int, P: int, R: int, heads: int, kv_heads: int
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


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (3, 1)])
def test_decode_attention_is_prefix_attention_of_one_token(heads: int, kv_heads: int) -> None:
    G, P, L, D, scale = 3, 5, 4, 6, 0.3
    group_of = [2, 0, 2, 2, 0, 1, 2]  # slots of a group lie anywhere
    B = len(group_of)
    q, kp, vp = randn(B, heads, D), randn(G, kv_heads, P, D, seed=1), randn(G, kv_heads, P, D, seed=2)
    ko, vo = randn(B, kv_heads, L, D, seed=3), randn(B, kv_heads, L, D, seed=4)
    prefix_bias, own_bias = torch.zeros(G, P), torch.zeros(B, L)
    prefix_bias[1, 3:] = prefix_bias[2, 1:] = -INF
    for slot in range(B):
        own_bias[slot, 1 + slot % L :] = -INF
    table = torch.tensor([[1, 4, 0, 0], [5, 6, 6, 6], [0, 2, 3, 6]])  # padded with any slot
    place = torch.tensor([8, 0, 9, 10, 1, 4, 11])
    assert table.flatten()[place].tolist() == list(range(B))
    out = decode_attention(q, kp, vp, prefix_bias, ko, vo, own_bias, table, place, scale)
    for slot, g in enumerate(group_of):
        one = slice(slot, slot + 1)
        expected = prefix_attention(
            q[one, None, None], kp[g : g + 1], vp[g : g + 1], prefix_bias[g : g + 1], ko[one, None], vo[one, None],
            own_bias[one, None, None], scale,
        )  # fmt: skip
        torch.testing.assert_close(out[slot], expected[0, 0, 0], rtol=0, atol=1e-6)


# -- process scores --------------------------------------------------------------------------------------------------


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
