"""Seeded orders: of sets in memory by sorting, of sets on disk by a permutation that is computed, not stored."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, overload

from mstar_mega.data.types import Query
from mstar_mega.kernels.noise import key_of

T = TypeVar("T")
_ROUNDS = 4


class Permutation:
    """A pseudo-random permutation of 0 ... n - 1 named by a key: a Feistel network with cycle walking.

    The network permutes the numbers of ``2 * bits`` bits, at most four times as many as n; numbers from n on are sent
    through again until they fall below it.
    """

    def __init__(self, n: int, *key: object) -> None:
        self._n = n
        self._bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._keys = [key_of(*key, "round", r).to_bytes(8, "big") for r in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """The number at ``position``. Raises IndexError outside 0 ... n - 1."""
        if not 0 <= position < self._n:
            raise IndexError(f"position {position} of a permutation of {self._n}")
        value = self._encrypt(position)
        while value >= self._n:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        mask = (1 << self._bits) - 1
        left, right = value >> self._bits, value & mask
        for key in self._keys:
            digest = hashlib.blake2b(right.to_bytes(8, "big"), digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        return left << self._bits | right


class View(Sequence[T]):
    """A stretch of a sequence, in another order where a permutation is given; nothing is read before it is asked."""

    def __init__(self, items: Sequence[T], span: range, order: Permutation | None = None) -> None:
        self._items, self._span, self._order = items, span, order

    def __len__(self) -> int:
        return len(self._span)

    @overload
    def __getitem__(self, position: int) -> T: ...
    @overload
    def __getitem__(self, position: slice) -> View[T]: ...
    def __getitem__(self, position: int | slice) -> T | View[T]:
        """One item, or a view of a stretch."""
        if isinstance(position, slice):
            return View(self._items, self._span[position], self._order)
        place = self._span[position]
        return self._items[place if self._order is None else self._order[place]]

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))


class OnDemand(Sequence[T]):
    """A sequence whose items are read one by one when they are asked for; a slice is a :class:`View`."""

    @overload
    def __getitem__(self, position: int) -> T: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[T]: ...
    def __getitem__(self, position: int | slice) -> T | Sequence[T]:
        """One item, or a view of a stretch."""
        if isinstance(position, slice):
            return View(self, range(len(self))[position])
        return self._item(range(len(self))[position])

    @abstractmethod
    def _item(self, place: int) -> T:
        """The item at a place from 0 to ``len(self) - 1``."""


class Without(OnDemand[T]):
    """A sequence without the items at a few positions, which are all that is kept in memory."""

    def __init__(self, items: Sequence[T], left_out: Iterable[int]) -> None:
        self._items = items
        # How many items stay before each that is left out.
        self._before = [position - i for i, position in enumerate(sorted(left_out))]

    def __len__(self) -> int:
        return len(self._items) - len(self._before)

    def _item(self, place: int) -> T:
        return self._items[place + bisect_right(self._before, place)]


class Joined(OnDemand[T]):
    """One sequence after the other, without copying either."""

    def __init__(self, *parts: Sequence[T]) -> None:
        self._parts = [part for part in parts if len(part)]

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _item(self, place: int) -> T:
        for part in self._parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise AssertionError("a place beyond the last part")


def shuffled(queries: Sequence[Query], *key: object) -> Sequence[Query]:
    """The queries in the order that ``key`` names; a set that is not in memory stays where it is.

    A list is ordered by the queries' ids, so that its order among them does not matter; a set on disk has one fixed
    order of its own, which is permuted.
    """
    if isinstance(queries, list):
        return sorted(queries, key=lambda query: key_of(*key, query.id))
    return View(queries, range(len(queries)), Permutation(len(queries), *key))
