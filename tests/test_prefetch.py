"""Prompts made ahead: the same results, in bounded memory."""

from __future__ import annotations

import threading
import time

import pytest

from mstar_mega.data.prefetch import Ahead
from mstar_mega.data.types import Query


def queries(count: int) -> list[Query]:
    return [Query(str(i), f"question {i}", (), "1") for i in range(count)]


class Maker:
    """Makes 100 bytes for each query, and notes in which threads and how often."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.threads: set[str] = set()
        self.open = threading.Event()
        self.open.set()

    def __call__(self, query: Query) -> bytes:
        assert self.open.wait(10)
        self.made.append(query.id)
        self.threads.add(threading.current_thread().name.partition("_")[0])
        if query.id == "7":
            raise ValueError("7 is broken")
        return query.question.encode().ljust(100)


def settle(ahead: Ahead[bytes], size: int) -> None:
    deadline = time.monotonic() + 10
    while ahead.bytes_kept < size and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_do_not_depend_on_the_workers(workers: int) -> None:
    maker = Maker()
    ahead = Ahead(maker, len, workers, 400)
    asked = queries(30)
    for start in range(0, 30, 5):
        ahead.expect(asked[start : start + 10])
        for query in asked[start : start + 5]:
            if query.id == "7":
                with pytest.raises(ValueError, match="7 is broken"):
                    ahead(query)
            else:
                assert ahead(query) == query.question.encode().ljust(100)
                assert ahead.bytes_kept <= 400
    assert ("decode" in maker.threads) == bool(workers)
    ahead.close()
    assert ahead.bytes_kept == 0


def test_what_is_expected_is_ready_before_it_is_asked_for_and_made_once() -> None:
    maker = Maker()
    ahead = Ahead(maker, len, 2, 1000)
    ahead(queries(1)[0])  # now the size is known
    ahead.expect(queries(6))
    settle(ahead, 600)
    assert sorted(maker.made) == list("012345")
    maker.open.clear()  # nothing could be made any more
    for _ in range(2):  # sampled, then scored
        assert [ahead(query)[:10] for query in queries(6)] == [f"question {i}".encode() for i in range(6)]
    ahead.close()


def test_never_more_than_the_limit_is_started() -> None:
    maker = Maker()
    ahead = Ahead(maker, len, 2, 500)
    maker.open.clear()
    ahead.expect(queries(6))  # nothing is known yet: one for each worker
    maker.open.set()
    settle(ahead, 200)
    assert sorted(maker.made) == ["0", "1"]
    ahead.expect(queries(50)[10:])
    settle(ahead, 500)
    assert ahead.bytes_kept == 500 and len(maker.made) == 5
    for query in queries(50)[10:13]:
        ahead(query)
    ahead.expect(queries(50)[20:])  # those that were used make room
    settle(ahead, 500)
    assert ahead.bytes_kept == 500 and len(maker.made) == 8
    ahead.close()


def test_a_call_costs_no_more_when_much_is_kept() -> None:
    ahead = Ahead(Maker(), len, 1, 1 << 30)
    started = time.process_time()
    for query in queries(20_008)[8:]:
        ahead(query)
    assert ahead.bytes_kept == 2_000_000
    assert time.process_time() - started < 10, "a call looks at everything that is kept"
    ahead.close()


def test_another_question_of_the_same_id_is_another_prompt() -> None:
    ahead = Ahead(Maker(), len, 1, 1000)
    first, other = Query("a", "one", (), "1"), Query("a", "two", (), "1")
    assert ahead(first)[:3] == b"one" and ahead(other)[:3] == b"two" and ahead(first)[:3] == b"one"
    ahead.close()
