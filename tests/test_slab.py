"""Where keys and values lie: places of the slab, and which slot reads which prompt's."""

from __future__ import annotations

import random

import torch

from mstar_mega.generation.cache import Slab, group_table


def test_group_table_finds_every_slot_in_its_group() -> None:
    entry = torch.tensor([2, 0, 2, 2, 0, 4, 2])
    table, place = group_table(entry, 5)
    assert table.shape == (5, 4)
    assert table.flatten()[place].tolist() == list(range(7))
    assert (place // 4).tolist() == entry.tolist()


def test_the_slab_gives_no_place_twice_and_takes_all_back() -> None:
    slab, chance = Slab(500, 16), random.Random(0)
    held: list[tuple[int, int]] = []
    refused = 0
    for _ in range(400):
        if held and chance.random() < 0.5:
            slab.release(*held.pop(chance.randrange(len(held))))
            continue
        place = slab.allocate(chance.randint(1, 120))
        refused += place is None
        held += [place] if place else []
        taken = sorted(held)
        assert all(start + size <= after for (start, size), (after, _) in zip(taken, taken[1:], strict=False))
        assert all(start % 16 == 0 and start + size <= slab.tokens for start, size in taken)
    assert refused > 5
    for place in held:
        slab.release(*place)
    assert slab.allocate(slab.tokens) == (0, slab.tokens)
