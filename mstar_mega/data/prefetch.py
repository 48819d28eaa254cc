"""Decode images ahead of the device: prompts that will be asked for soon are made in worker threads.

What a prompt is does not depend on when or where it is made, so results are the same with any number of workers. Memory
is bounded by bytes: what is ready or under way exceeds the limit by one result at most, and what was asked for longest
ago goes first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from mstar_mega.data.types import ImageRef, Query

V = TypeVar("V")
_Key = tuple[str, str, tuple[ImageRef, ...]]


class Ahead(Generic[V]):
    """A function of queries whose results are made ahead and kept for a while.

    Args:
        make: the function; it may raise, and the error comes out where the result is asked for.
        size: bytes of a result.
        workers: threads; 0: everything is made when it is asked for, and nothing is kept.
        limit: most bytes of results that are kept, those under way counted as large as the largest seen.
    """

    def __init__(self, make: Callable[[Query], V], size: Callable[[V], int], workers: int, limit: int) -> None:
        self._make, self._size, self._workers, self._limit = make, size, workers, limit
        self._pool = ThreadPoolExecutor(workers, "decode") if workers else None
        self._kept: dict[_Key, Future[V]] = {}
        self._sizes: dict[_Key, int] = {}
        self._used: OrderedDict[_Key, None] = OrderedDict()
        """Those of the kept that have been asked for, the longest ago first: they go when room is needed."""
        self._ready = 0
        """Bytes of the kept results that are ready."""
        self._largest = 0
        self._lock = threading.Lock()

    def expect(self, queries: Iterable[Query]) -> None:
        """These will be asked for soon, in this order: start on as many as there is room for."""
        if self._pool is None:
            return
        for query in queries:
            key = _key(query)
            with self._lock:
                if key in self._kept:
                    continue
                if not self._make_room():
                    return
                self._kept[key] = self._pool.submit(self._measured, key, query)

    def __call__(self, query: Query) -> V:
        """The result for a query, ready or not."""
        if self._pool is None:
            return self._make(query)
        key = _key(query)
        with self._lock:
            future = self._kept.get(key)
            if future is not None:
                self._use(key)
        if future is None:
            value = self._make(query)
            future = Future()
            future.set_result(value)
            with self._lock:
                self._kept[key] = future
                self._use(key)
            self._note_size(key, value)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                self._forget(key)
            raise
        finally:
            with self._lock:
                self._free(0, newest=key)

    def close(self) -> None:
        """Stop the workers and forget the results."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        with self._lock:
            for key in list(self._kept):
                self._forget(key)

    @property
    def bytes_kept(self) -> int:
        """Bytes of the results that are ready."""
        with self._lock:
            return self._ready

    def _measured(self, key: _Key, query: Query) -> V:
        value = self._make(query)
        self._note_size(key, value)
        return value

    def _note_size(self, key: _Key, value: V) -> None:
        size = self._size(value)
        with self._lock:
            self._largest = max(self._largest, size)
            if key in self._kept and key not in self._sizes:
                self._sizes[key] = size
                self._ready += size

    def _use(self, key: _Key) -> None:
        self._used[key] = None
        self._used.move_to_end(key)

    def _make_room(self) -> bool:
        """Whether one more may be started, after forgetting results that have been used."""
        if self._largest == 0:  # nothing is known yet: one for each worker
            return len(self._kept) < self._workers
        self._free(self._largest)
        return self._weight() + self._largest <= self._limit

    def _weight(self) -> int:
        return self._ready + (len(self._kept) - len(self._sizes)) * self._largest

    def _free(self, extra: int, newest: _Key | None = None) -> None:
        """Forget used results, the longest ago first, until ``extra`` bytes fit in; ``newest`` stays."""
        while self._used and self._weight() + extra > self._limit:
            key = next(iter(self._used))
            if key == newest or key not in self._sizes:
                break
            self._forget(key)

    def _forget(self, key: _Key) -> None:
        self._kept.pop(key, None)
        self._used.pop(key, None)
        self._ready -= self._sizes.pop(key, 0)


def _key(query: Query) -> _Key:
    return query.id, query.question, query.images
