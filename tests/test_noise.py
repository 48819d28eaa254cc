"""The counter-based noise against SplitMix64 as published, and its statistics."""

from __future__ import annotations

import math

import torch

from mstar_mega.kernels.noise import counters, gumbel, key_of, mix, uniform

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
