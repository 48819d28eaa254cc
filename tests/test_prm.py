"""PRM training by itself: what it starts from, what it is taught, what is kept out to measure it, what its score is."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from scripted import Events, make_job, make_task
from torch import Tensor

from mstar_mega.config import AnnotateConfig, Config, OptimizerConfig, PRMConfig, RunConfig
from mstar_mega.data.types import Group, ImageRef, Query, Response, Step
from mstar_mega.models.packing import pack, step_index
from mstar_mega.recipe import prm as stage
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.fit import Position, forget_old_refreshes, refreshes
from mstar_mega.recipe.held_out import divide
from mstar_mega.rewards.process import score_groups
from mstar_mega.rewards.reader import PRM, Reader
from mstar_mega.training.batches import Batches, TrainGroup
from mstar_mega.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("job_of_one")

SHARES = (0.0, 0.25, 0.5, 1.0)


def annotated(count: int) -> list[Group]:
    """Queries with a response of two labelled steps, one of a single step, and one without any."""

    def group(number: int) -> Group:
        first, second = SHARES[number % 4], SHARES[number // 4 % 4]
        two = Response(
            0,
            [5 + number, 6, 7, 8, 9],
            "",
            steps=[Step(0, 2, "", label=first), Step(2, 5, "", label=second)],
            correct=second > 0,
        )
        one = Response(1, [20 + number, 21], "", steps=[Step(0, 2, "", label=second)], correct=second > 0)
        return Group(Query(f"q{number:02d}", "?", (), "1"), [two, one, Response(2, [3], "", correct=False)])

    return [group(number) for number in range(count)]


@dataclass
class Taught:
    """What reached the optimizer."""

    groups: list[TrainGroup]
    weights: dict[str, Tensor]
    trained: dict[str, bool]
    """Which parameters have a gradient."""
    lengths: int
    events: list[dict[str, Any]]
    policy: dict[str, Tensor]
    prm: Any


def train(directory: Path, monkeypatch: pytest.MonkeyPatch, settings: PRMConfig, count: int = 20) -> Taught:
    """The stage with everything but the optimizer steps, which are only looked at."""
    seen: dict[str, Any] = {}

    def fit(job: Job, trainer: Trainer, stage: str, batches: Batches, position: Position) -> None:
        seen.update(groups=[group for batch in batches for group in batch], lengths=len(batches))
        seen["weights"] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        seen["trained"] = {name: p.requires_grad for name, p in trainer.model.named_parameters()}

    monkeypatch.setattr(stage, "fit", fit)
    policy = tiny.randomize(tiny.build()[0], seed=4)
    config = Config(seed=1, prm=settings, annotate=AnnotateConfig(held_out=0.25))
    with make_job(directory, config, make_task(), tiny.family()) as job:
        prm = stage.train_prm(job, policy, annotated(count))
        assert isinstance(job.metrics, Events)
        return Taught(**seen, events=job.metrics.all, policy=dict(policy.named_parameters()), prm=prm)


def settings(**changes: Any) -> PRMConfig:
    optimizer = OptimizerConfig(batch_size=4, shuffle="queries")  # whole groups, to look at
    return PRMConfig(optimizer=optimizer, **{"epochs": 1, **changes})


def test_a_quarter_of_the_queries_is_kept_out_and_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = train(tmp_path, monkeypatch, settings())
    asked = [group.query.id for group in taught.groups]
    assert len(asked) == len(set(asked)) == 15 and taught.lengths == round(15 * 2 / 4)
    (quality,) = [event for event in taught.events if event["event"] == "prm_quality"]
    held_out = [group for group in annotated(20) if group.query.id not in asked]
    assert len(held_out) == 5 and quality["steps"] == sum(len(r.steps) for g in held_out for r in g.responses)
    good = [float((step.label or 0) > 0) for g in held_out for r in g.responses for step in r.steps]
    assert quality["positive_share"] == pytest.approx(sum(good) / len(good))
    mixed = [group for group in held_out if len({bool(response.correct) for response in group.responses}) == 2]
    assert quality["split"] == "held_out" and quality["mixed_queries"] == len(mixed)


def test_queries_that_share_a_picture_are_on_one_side(tmp_path: Path) -> None:
    """Pictures of two questions each, one of twelve, and a query with two pictures that ties two of them together."""
    pictures = [["big"] if i < 12 else ["a", "b"] if i == 12 else [f"p{i // 2}"] for i in range(40)]
    pictures[13], pictures[14] = ["a"], ["b"]
    groups = [
        Group(Query(f"q{i:02d}", "?", tuple(ImageRef("", name) for name in names), "1"), [])
        for i, names in enumerate(pictures)
    ]
    for seed in range(8):
        config = Config(seed=seed, annotate=AnnotateConfig(held_out=0.2))
        with make_job(tmp_path, config, make_task(), tiny.family()) as job:
            train, held_out = divide(job, groups)
            again = divide(job, groups[::-1])
        assert sorted(group.query.id for group in train + held_out) == [group.query.id for group in groups]
        seen = [{image.digest for group in side for image in group.query.images} for side in (train, held_out)]
        assert not seen[0] & seen[1] and 8 <= len(held_out) <= 20
        assert (train, held_out) == again


def test_what_an_earlier_training_has_seen_is_never_measured_on(tmp_path: Path) -> None:
    """Later annotations have some queries of the earlier ones, new ones, and new ones about known pictures."""
    rng = random.Random(5)
    queries = [Query(f"q{i:03d}", "?", (ImageRef("", f"p{i // 2}"),) if i % 5 else (), "1") for i in range(120)]
    with make_job(tmp_path, Config(seed=3, annotate=AnnotateConfig(held_out=0.2)), make_task()) as job:
        earlier: list[list[Query]] = []
        before: dict[str, bool] = {}
        for _ in range(4):
            asked = rng.sample(queries, 60)
            sides = divide(job, [Group(query, []) for query in asked], earlier)
            assert sorted(g.query.id for side in sides for g in side) == sorted(query.id for query in asked)
            assert 6 <= len(sides[1]) <= 18, "about a fifth"
            for is_out, side in enumerate(sides):
                names = {name for group in side for name in (group.query.id, *(i.digest for i in group.query.images))}
                assert all(before.get(name, bool(is_out)) == bool(is_out) for name in names)
                before.update(dict.fromkeys(names, bool(is_out)))
            earlier.append(asked)


def test_labels_that_are_all_alike_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "warn", lambda job, text: job.log("warned", text=text))
    assert not [event for event in train(tmp_path / "a", monkeypatch, settings()).events if event["event"] == "warned"]
    monkeypatch.setattr("test_prm.SHARES", (0.0,) * 4)
    (warned,) = [e for e in train(tmp_path / "b", monkeypatch, settings()).events if e["event"] == "warned"]
    assert "every held-out step is labelled bad" in warned["text"]


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_steps_label_stands_at_its_last_token(labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = train(tmp_path, monkeypatch, settings(labels=labels))
    known = {group.query.id: group for group in annotated(20)}
    for group in taught.groups:
        two, one, _ = known[group.query.id].responses
        assert group.responses == [two.tokens, one.tokens], "a response without steps teaches nothing"
        assert group.step_ends == [[2, 5], [2]]
        shares = [[step.label or 0.0 for step in response.steps] for response in (two, one)]
        wanted = shares if labels == "soft" else [[float(share > 0) for share in each] for each in shares]
        assert group.step_labels == wanted
    if labels == "soft":
        (quality,) = [event for event in taught.events if event["event"] == "prm_quality"]
        asked = {group.query.id for group in taught.groups}
        held_out = [step for id, g in known.items() if id not in asked for r in g.responses for step in r.steps]
        share = sum((step.label or 0) >= 0.5 for step in held_out) / len(held_out)
        assert quality["positive_share"] == pytest.approx(share) and 0 < share < 1


@pytest.mark.parametrize("head", ["linear", "likelihood"])
@pytest.mark.parametrize("freeze", [True, False])
def test_it_starts_as_the_policy_with_a_new_head(
    head: Any, freeze: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = train(tmp_path, monkeypatch, settings(head=head, freeze_vision=freeze))
    own = {"score_head", "likelihood_weights"} & taught.weights.keys()
    assert own == ({"score_head"} if head == "linear" else {"score_head", "likelihood_weights"})
    left_out = {"language.output_layer.weight"} if head == "linear" else set()
    assert taught.weights.keys() - own == taught.policy.keys() - left_out
    for name in taught.weights.keys() - own:
        assert torch.equal(taught.weights[name], taught.policy[name]), name
    frozen = {name for name, trained in taught.trained.items() if not trained}
    eyes = {name for name in taught.weights if name.startswith(("vision.", "connector."))}
    assert eyes and frozen == (eyes if freeze else set())
    after = dict(taught.prm.model.named_parameters())
    assert after.keys() == taught.weights.keys() and not any(p.requires_grad for p in after.values())
    assert all(torch.equal(after[name], value) for name, value in taught.weights.items()), "what was saved"


@pytest.mark.parametrize("head", ["linear", "likelihood"])
def test_a_score_is_the_probability_that_the_step_is_good(head: Any) -> None:
    prm = tiny.randomize(tiny.build(head=head)[0], seed=3)
    groups = annotated(3)

    def prompt_of(query: Query) -> Any:
        return tiny.prompt(int(query.id[1:]), 9)

    score_groups(PRM(prm, Reader(prompt_of)), groups, "min", max_tokens=20)
    seen = []
    for group in groups:
        for response in group.responses:
            if not response.steps:
                assert response.score is None
                continue
            batch = pack([prompt_of(group.query)], [[response.tokens]])
            steps = step_index(batch, [[response.tokens]], [[[step.end for step in response.steps]]])
            with torch.no_grad():
                logits = prm.step_logits(tiny.hidden(prm, batch), steps).tolist()
            expected = [1 / (1 + math.exp(-logit)) for logit in logits]
            assert [step.score for step in response.steps] == pytest.approx(expected, abs=1e-5)
            assert response.score == pytest.approx(min(expected), abs=1e-5)
            seen += expected
    assert max(seen) - min(seen) > 0.01


def test_old_refreshed_prms_are_deleted_and_no_others(tmp_path: Path) -> None:
    """Kept are as many as checkpoints of evolving, and one more."""
    for name in ("prm", "prm_failed", "prm_0003", "prm_0009", "prm_0010", "prm_10002", "evolve"):
        (tmp_path / "checkpoints" / name / "iteration_0000_step_000000").mkdir(parents=True)
    with make_job(tmp_path, Config(run=RunConfig(keep_checkpoints=1)), make_task()) as job:
        forget_old_refreshes(job)
        assert refreshes(job) == [10, 10002]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"prm", "prm_failed", "prm_0010", "prm_10002", "evolve"}
