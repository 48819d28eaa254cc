"""Examples cut into optimizer steps: near-equal sizes, an order for each epoch, no dependence on where groups lie."""

from __future__ import annotations

import pytest

from mstar_mega.data.types import Query
from mstar_mega.training.batches import Examples, TrainGroup, split_into_epochs


def examples(*sizes: int) -> Examples:
    """Groups of so many responses."""
    return Examples.of([TrainGroup(Query(f"q{i}", "?", (), None), [[1]] * size) for i, size in enumerate(sizes)])


def ids(batch: object) -> list[str]:
    return [group.query.id for group in batch]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sizes", "batch_size", "steps"),
    [
        ([2] * 16, 8, [8, 8, 8, 8]),
        ([1] * 21, 8, [7, 7, 7]),  # 2.6 steps: three, not two and a small one
        ([1] * 18, 8, [9, 9]),
        ([1] * 3, 8, [3]),
        ([], 8, []),
    ],
)
def test_steps_are_about_as_large_as_asked_and_nearly_equal(
    sizes: list[int], batch_size: int, steps: list[int]
) -> None:
    batches = split_into_epochs(examples(*sizes), batch_size, 1, ("seed",))
    assert [batch.responses for batch in batches] == steps
    assert [sum(len(group.responses) for group in batch) for batch in batches] == steps


def test_responses_of_one_query_stay_together_whatever_their_number() -> None:
    batches = split_into_epochs(examples(1, 9, 1, 1, 5, 1, 1, 1), 5, 1, ("seed",))
    seen = [id for batch in batches for id in ids(batch)]
    assert sorted(seen) == [f"q{i}" for i in range(8)] and len(batches) > 1


def test_every_epoch_has_its_own_order_and_a_fraction_is_cut_short() -> None:
    made = examples(*[1] * 24)
    batches = split_into_epochs(made, 4, 2.5, ("seed",))
    assert len(batches) == 6 + 6 + 3
    first, second = ([id for batch in batches[at : at + 6] for id in ids(batch)] for at in (0, 6))
    assert sorted(first) == sorted(second) == sorted(made.ids)
    assert first != second and first != list(made.ids)
    other = split_into_epochs(made, 4, 1, ("another seed",))
    assert [id for batch in other for id in ids(batch)] != first
    assert len(split_into_epochs(made, 4, 0.1, ("seed",))) == 1


def test_the_order_does_not_depend_on_where_the_groups_come_from() -> None:
    groups = [TrainGroup(Query(f"q{i}", "?", (), None), [[1]]) for i in range(12)]
    one, other = (split_into_epochs(Examples.of(g), 4, 2, ("seed",)) for g in (groups, groups[::-1]))
    assert [ids(batch) for batch in one] == [ids(batch) for batch in other]
