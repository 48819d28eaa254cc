"""Examples cut into optimizer steps and microbatches: near-equal sizes, an order for each epoch, bounds that hold, and
losses and gradients that do not depend on how responses were put together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest
import tiny
import torch

from mstar_mega.config import LossMean, OptimizerConfig
from mstar_mega.data.types import Query
from mstar_mega.kernels import dispatch
from mstar_mega.models.packing import Prompt
from mstar_mega.training.batches import Batches, Examples, TrainGroup, dealt, microbatches, split_into_epochs


def examples(*sizes: int) -> Examples:
    """Groups of so many responses, each with tokens of its own."""
    return Examples.of(
        [TrainGroup(Query(f"q{i}", "?", (), None), [[i, j] for j in range(n)]) for i, n in enumerate(sizes)]
    )


def cut(
    made: Examples, batch_size: int, epochs: float = 1, shuffle: Literal["responses", "queries"] = "responses"
) -> Batches:
    return split_into_epochs(made, OptimizerConfig(batch_size=batch_size, shuffle=shuffle), epochs, ("seed",))


def tokens(batches: Batches) -> list[list[int]]:
    return [response for batch in batches for group in batch for response in group.responses]


@pytest.mark.parametrize("shuffle", ["responses", "queries"])
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
    sizes: list[int], batch_size: int, steps: list[int], shuffle: Literal["responses", "queries"]
) -> None:
    batches = cut(examples(*sizes), batch_size, shuffle=shuffle)
    assert [batch.responses for batch in batches] == steps
    assert [sum(len(group.responses) for group in batch) for batch in batches] == steps


def test_each_response_finds_its_step_by_itself() -> None:
    made = examples(*[16] * 64)
    batches = cut(made, 32)
    assert sorted(tokens(batches)) == sorted(response for i in range(64) for response in made.read(i).responses)
    # 32 of 1,024 responses meet 25.3 of 64 queries on average; grouped they would meet 2.
    assert sum(map(len, batches)) / len(batches) == pytest.approx(25.3, abs=1.0)
    for batch in batches:
        assert max(Counter(group.query.id for group in batch).values()) == 1, "a query stands in a step once"


def test_responses_that_meet_keep_their_order_and_their_labels() -> None:
    query = Query("q", "?", (), None)
    group = TrainGroup(query, [[1], [2, 2], [3]], [[1], [1, 2], [1]], [[0.1], [0.2, 0.3], [0.4]])
    (batch,) = cut(Examples.of([group]), 8)
    assert batch[0] is group
    assert group.only([2, 1]) == TrainGroup(query, [[3], [2, 2]], [[1], [1, 2]], [[0.4], [0.2, 0.3]])


def test_responses_of_one_query_stay_together_where_queries_are_shuffled() -> None:
    made = examples(1, 9, 1, 1, 5, 1, 1, 1)
    batches = cut(made, 5, shuffle="queries")
    seen = [group for batch in batches for group in batch]
    assert sorted(group.query.id for group in seen) == [f"q{i}" for i in range(8)] and len(batches) > 1
    assert all(group.responses == made.read(int(group.query.id[1:])).responses for group in seen)


def test_every_epoch_has_its_own_order_and_a_fraction_is_cut_short() -> None:
    made = examples(*[3] * 8)
    batches = cut(made, 4, 2.5)
    assert len(batches) == 6 + 6 + 3
    first, second = tokens(batches[0:6]), tokens(batches[6:12])
    assert sorted(first) == sorted(second) == sorted(tokens(cut(made, 24)))
    assert first != second and first != sorted(first)
    other = split_into_epochs(made, OptimizerConfig(batch_size=4), 1, ("another seed",))
    assert tokens(other) != first
    assert len(cut(made, 4, 0.1)) == 1


@pytest.mark.parametrize("shuffle", ["responses", "queries"])
def test_the_order_does_not_depend_on_where_the_groups_come_from(shuffle: Literal["responses", "queries"]) -> None:
    groups = [TrainGroup(Query(f"q{i}", "?", (), None), [[i], [i, i]]) for i in range(12)]
    one, other = (cut(Examples.of(g), 4, 2, shuffle) for g in (groups, groups[::-1]))
    for batch, mirrored in zip(one, other, strict=True):
        assert sorted(map(str, batch)) == sorted(map(str, mirrored))


def test_shares_have_about_as_many_tokens_each() -> None:
    generator = torch.Generator().manual_seed(0)
    for ranks in (8, 32):
        # Eight queries a rank: prompts of 1 to 13 tiles, two responses.
        tiles = torch.randint(1, 14, (8 * ranks,), generator=generator)
        costs = (256 * tiles + 74 + torch.randint(100, 600, (8 * ranks,), generator=generator)).tolist()
        shares = dealt(costs, ranks)
        assert sorted(item for share in shares for item in share) == list(range(len(costs)))
        loads = [sum(costs[item] for item in share) for share in shares]
        assert max(loads) <= 1.05 * sum(costs) / ranks
        by_turns = [sum(costs[rank::ranks]) for rank in range(ranks)]
        assert max(by_turns) > 1.15 * sum(costs) / ranks, "dealt by turns it would be worse"
    assert dealt([], 2) == [[], []] and dealt([5], 2) == [[0], []]
    made = replace(examples(2, 1, 3), tokens=[70, 20, 90])
    assert sorted(cut(made, 100)[0].costs) == [20, 70, 90]


# ---------------------------------------------------------------------------------------------------- microbatches

PROMPT = 5


def prompt_of(query: Query) -> Prompt:
    return Prompt([7] * PROMPT, [], None)


@pytest.mark.parametrize("limit", [1, 11, 17, 40, 1000])
def test_no_microbatch_is_longer_than_asked_but_for_one_response_alone(limit: int) -> None:
    generator = torch.Generator().manual_seed(limit)
    lengths = torch.randint(1, 12, (6, 9), generator=generator).tolist()
    groups = [
        TrainGroup(Query(str(i), "?", (), None), [[20 + i, j, *range(n)] for j, n in enumerate(row)])
        for i, row in enumerate(lengths)
    ]
    made = microbatches(groups, prompt_of, OptimizerConfig(microbatch_tokens=limit), 1)
    assert sum(batch.loss.tokens for batch in made) == sum(len(r) for g in groups for r in g.responses)
    longest = PROMPT + max(len(r) for g in groups for r in g.responses)
    assert all(batch.tokens <= max(limit, longest) for batch in made)
    for batch in made:
        assert batch.packed.tokens.numel() == batch.tokens
        if batch.tokens > limit:
            assert sum(map(len, batch.packed.response_start)) == 1


def test_a_prompt_stands_once_in_a_part_though_its_responses_turn_differently() -> None:
    """Two rotary regimes need two copies of the prompt: they are two parts, so that the bound holds."""
    group = TrainGroup(Query("q", "?", (), None), [[1] * 3, [2] * 9, [3] * 4, [4] * 8])
    made = microbatches([group], prompt_of, OptimizerConfig(microbatch_tokens=22), 1, lambda length: int(length > 10))
    assert sorted(batch.packed.tokens.numel() for batch in made) == [PROMPT + 7, PROMPT + 17]


def gradients_of(groups: list[TrainGroup], head: str, config: OptimizerConfig) -> tuple[float, int, list[torch.Tensor]]:
    """(mean loss, microbatches, gradients) of a batch on a random tiny model."""
    model = tiny.randomize(tiny.build(head=head)[0])  # type: ignore[arg-type]
    made = microbatches(groups, prompt_of, config, 1)
    total, count = torch.zeros(()), 0
    for batch in made:
        loss, counted = batch.loss(model, tiny.hidden(model, batch.packed))
        total, count = total + loss, count + int(counted)
    found = tiny.gradients(model, total / count)
    return float(total.detach() / count), len(made), [found[name] for name in sorted(found)]


def sft_groups(steps: bool) -> list[TrainGroup]:
    generator = torch.Generator().manual_seed(3)
    groups = []
    for i, count in enumerate((7, 1, 3)):
        responses = [torch.randint(20, 200, (4 + (i + j) % 5,), generator=generator).tolist() for j in range(count)]
        ends = [[2, len(r)] if j % 2 else [len(r)] for j, r in enumerate(responses)] if steps else None
        labels = [[float(j % 3 == 0)] * len(of) for j, of in enumerate(ends)] if ends else None
        groups.append(TrainGroup(Query(str(i), "?", (), None), responses, ends, labels))
    return groups


@pytest.mark.parametrize("loss_mean", ["token", "response"])
@pytest.mark.parametrize("head", ["vocabulary", "linear", "likelihood"])
def test_loss_and_gradients_do_not_depend_on_how_a_batch_is_cut(head: str, loss_mean: LossMean) -> None:
    groups = sft_groups(head != "vocabulary")
    config = OptimizerConfig(microbatch_tokens=10_000, loss_mean=loss_mean)
    scattered = [group.only([j]) for group in groups for j in range(len(group.responses))]
    expected, count, wanted = gradients_of(groups, head, config)
    assert count == 1
    for given, limit in ((groups, 21), (groups, 1), (scattered, 33)):
        loss, count, found = gradients_of(given, head, OptimizerConfig(microbatch_tokens=limit, loss_mean=loss_mean))
        assert count > 3 and loss == pytest.approx(expected, rel=1e-5)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_mean_over_responses_weighs_each_the_same() -> None:
    groups = sft_groups(False)
    alone = [
        gradients_of([group.only([j])], "vocabulary", OptimizerConfig())[0]
        for group in groups
        for j in range(len(group.responses))
    ]
    lengths = [len(response) for group in groups for response in group.responses]
    by_response, _, _ = gradients_of(groups, "vocabulary", OptimizerConfig(loss_mean="response"))
    by_token, _, _ = gradients_of(groups, "vocabulary", OptimizerConfig())
    assert by_response == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    weighted = sum(loss * length for loss, length in zip(alone, lengths, strict=True)) / sum(lengths)
    assert by_token == pytest.approx(weighted, rel=1e-5) and by_token != pytest.approx(by_response, rel=1e-3)


@pytest.mark.parametrize("loss_mean", ["token", "response"])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_responses_weight_scales_its_loss_and_gradient_below_0_too(
    loss_mean: LossMean, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weighted batch is the weighted sum of its responses; what it is divided by is that of the unweighted one."""
    if not kernel:
        monkeypatch.setattr(dispatch, "_off", frozenset(["linear_cross_entropy"]))
    weights = [[1.0, -0.5, 0.0, 2.0, 0.25, 1.0, 1.0], [-1.0], [0.5, 0.0, 3.0]]
    groups = sft_groups(False)
    config = OptimizerConfig(microbatch_tokens=21, loss_mean=loss_mean)
    given = [replace(group, weights=own) for group, own in zip(groups, weights, strict=True)]
    loss, _, found = gradients_of(given, "vocabulary", config)
    singles = [
        (own[j], len(group.responses[j]), gradients_of([group.only([j])], "vocabulary", config))
        for group, own in zip(groups, weights, strict=True)
        for j in range(len(group.responses))
    ]
    shares = [length if loss_mean == "token" else 1 for _, length, _ in singles]
    expected = sum(w * n * single[0] for (w, _, single), n in zip(singles, shares, strict=True)) / sum(shares)
    assert loss == pytest.approx(expected, rel=1e-4)
    for k, gradient in enumerate(found):
        wanted = sum(w * n * single[2][k] for (w, _, single), n in zip(singles, shares, strict=True)) / sum(shares)
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)
    ones = [replace(group, weights=[1.0] * len(group.responses)) for group in groups]
    same, plain = gradients_of(ones, "vocabulary", config)[0], gradients_of(groups, "vocabulary", config)[0]
    assert same == pytest.approx(plain, rel=1e-6) and plain != pytest.approx(loss, rel=1e-2)


def test_weights_follow_their_responses_into_parts_and_steps() -> None:
    group = TrainGroup(Query("q", "?", (), None), [[1], [2], [3]], weights=[0.1, 0.2, 0.3])
    assert group.only([2, 0]).weights == [0.3, 0.1]
    batches = cut(Examples.of([group]), 1)
    assert {part.responses[0][0]: part.weights for batch in batches for part in batch} == {1: [0.1], 2: [0.2], 3: [0.3]}
