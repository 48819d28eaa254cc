"""Engine and training agree on log-probabilities, or the run stops: another policy, stale slots, rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from scripted import Events, make_job, make_task
from test_rollouts import query

from mstar_mega.config import (
    Config,
    GenerationConfig,
    ModelConfig,
)
from mstar_mega.generation.cache import Entry
from mstar_mega.generation.runner import Runner
from mstar_mega.recipe import generate as generate_phase
from mstar_mega.recipe.generate import check_log_probs, spread_over_blocks
from mstar_mega.recipe.intervals import Interval
from mstar_mega.recipe.rollouts import Actors, Sampling, rollout

pytestmark = pytest.mark.usefixtures("job_of_one")


@pytest.fixture(scope="module")
def tiny_policy() -> Any:
    model, family = tiny.build()
    # One token in seven ends a response: lengths vary, so that slots are freed and refilled at different times.
    family.stop_tokens = frozenset(range(3, 10_000, 7)) | family.stop_tokens
    return tiny.randomize(model), family


@contextmanager
def checked(directory: Path, tiny_policy: Any) -> Iterator[tuple[Any, Any, Any]]:
    """A job, and what draws and checks 24 queries in three blocks whose slots are refilled."""
    policy, family = tiny_policy
    generation = GenerationConfig(
        max_new_tokens=24, log_prob_gap_queries=6, slots=12, queries_per_block=8, prefill_tokens=40
    )
    queries = [query(f"q{i}" + "x" * (i % 3)) for i in range(24)]
    with make_job(directory, Config(generation=generation), make_task(), family) as job:
        now = Interval(1, queries, [], False)

        def draw() -> Any:
            return rollout(job, Actors(job, policy, None), queries, Sampling("a", 1.0, 3))

        yield job, draw, lambda groups, temperature=1.0: check_log_probs(job, policy, now, groups, temperature)


def test_responses_of_another_policy_stop_the_run(tmp_path: Path, tiny_policy: Any) -> None:
    """The log-probs of what was drawn are computed again by the training forward."""
    with checked(tmp_path, tiny_policy) as (job, draw, check):
        groups = draw()
        check(groups)
        (event,) = job.metrics.of("log_prob_gap")
        chosen = spread_over_blocks(groups, 6, (0, "log_prob_gap", 1))
        assert event["tokens"] == sum(len(r.tokens) for group in chosen for r in group.responses)
        assert event["mean"] <= event["largest"] < 1e-4 and event["above_limit"] == 0.0
        with pytest.raises(ValueError, match="iteration 1: the log-prob of a generated token differs by"):
            check(groups, 0.7)  # another temperature is another distribution


def test_checked_queries_lie_in_all_blocks_and_not_at_their_beginnings(tmp_path: Path, tiny_policy: Any) -> None:
    with checked(tmp_path, tiny_policy) as (_, draw, _):
        groups = draw()
        ids = [each.id for each in groups.queries]
        places = [
            divmod(ids.index(group.query.id), 8)
            for number in range(20)
            for group in spread_over_blocks(groups, 6, (0, number))
        ]
    assert [sum(block == b for block, _ in places) for b in range(3)] == [40, 40, 40]
    assert {row for _, row in places} == set(range(8)), "over the iterations every place is looked at"


def test_refilled_slots_with_their_predecessors_state_stop_the_run(
    tmp_path: Path, tiny_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their positions go on from the prompt that the slot had before. Queries that had fresh slots do not show it."""
    start = Runner.start

    def without_renewing(self: Runner, *arguments: Any) -> None:
        before = self.slots.prompt_length.clone()
        start(self, *arguments)
        self.slots.prompt_length.copy_(torch.where(before > 0, before, self.slots.prompt_length))

    monkeypatch.setattr(Runner, "start", without_renewing)
    with checked(tmp_path, tiny_policy) as (_, draw, check):
        groups = draw()
        with pytest.raises(ValueError, match="log-prob of a generated"):
            check(groups)
        monkeypatch.setattr(generate_phase, "spread_over_blocks", lambda blocks, *_: list(blocks)[:4])
        check(groups)


def test_rows_that_read_another_prompt_after_a_refill_stop_the_run(
    tmp_path: Path, tiny_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of the rows' prompts is right at first, and mixed up when samples and prompts have come and gone."""
    run_over, calls = Runner.run_over, Counter[int]()

    def mixed_up(self: Runner, slots: list[int], entries: Sequence[Entry]) -> None:
        calls[id(self)] += 1
        run_over(self, slots, entries if calls[id(self)] == 1 else [*entries[1:], entries[0]])

    monkeypatch.setattr(Runner, "run_over", mixed_up)
    with checked(tmp_path, tiny_policy) as (_, draw, check), pytest.raises(ValueError, match="log-prob of a generated"):
        check(draw())


@pytest.mark.parametrize(
    ("precision", "above", "stops"), [("float32", 1, True), ("bfloat16", 20, False), ("bfloat16", 21, True)]
)
def test_in_bfloat16_one_token_in_a_thousand_may_be_above_the_limit(
    precision: Any, above: int, stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the largest gap is, and however many tokens are read."""
    gaps = torch.zeros(20_000)
    gaps[:above] = 3.0
    monkeypatch.setattr(generate_phase, "spread_over_blocks", lambda *arguments: ["a group"])
    monkeypatch.setattr(generate_phase, "_gaps", lambda *arguments: gaps)
    now = Interval(1, [], [], False)
    with make_job(tmp_path, Config(model=ModelConfig(precision=precision)), make_task()) as job:
        with pytest.raises(ValueError, match="log-prob") if stops else nullcontext():
            check_log_probs(job, cast(Any, None), now, cast(Any, None), 1.0)
        assert isinstance(job.metrics, Events)
        assert job.metrics.of("log_prob_gap")[0]["above_limit"] == pytest.approx(above / 20_000)
