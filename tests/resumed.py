"""What runs that were killed are held against: an uninterrupted one, the recipe, and moments to kill them at."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import (
    Job,
    events_of,
    outcome,
)

from mstar_mega import settings
from mstar_mega.data.records import read_groups
from mstar_mega.data.types import Group


def assert_equal(run_dir: Path, expected: Path) -> None:
    (events, *ours), (expected_events, *theirs) = outcome(run_dir), outcome(expected)
    assert events == expected_events
    for made, wanted in zip(ours, theirs, strict=True):  # rollouts, tensors of the final state
        assert made.keys() == wanted.keys()
        assert [name for name in made if made[name] != wanted[name]] == []
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (run_dir, expected)]
    for summary in summaries:
        del summary["seconds"], summary["peak_memory_bytes"]
    assert summaries[0] == summaries[1]
    assert not list(run_dir.rglob(".*.tmp")), "leftovers"


def groups_of(directory: Path) -> list[Group]:
    return [group for path in sorted(directory.glob("block_*.jsonl")) for group in read_groups(path)]


def check_policies(rollouts: Path, sweep: float) -> None:
    """Who drew what, and at which temperature, by the notes beside the blocks."""
    policies: dict[str, str] = {}
    for directory in rollouts.iterdir():
        origin = json.loads((directory / "origin.json").read_text())
        name = directory.name
        policies[name] = origin["drawn_by"].partition(",")[0]
        temperature = {"annotate": 1.0, "evaluation": 0.0, "iteration": sweep}.get(name.split("_")[0])
        if temperature is not None:
            assert origin["temperature"] == (1.0 if name.endswith("_sampled") else temperature), name
    # Each iteration is drawn by the policy that the one before it left, which was measured there.
    for number in (1, 2):
        measured = {policy for name, policy in policies.items() if name.startswith(f"evaluation_{number - 1:04d}")}
        assert {policies[f"iteration_{number:04d}"]} == measured
    assert policies["annotate"] == policies["temperature_0001_0.50"] == policies["iteration_0001"]
    assert len(set(policies.values())) == 3


def logged(times: int = 1, **fields: object) -> Callable[[Path], bool]:
    """So many events with these fields have been written."""
    return lambda run_dir: sum(fields.items() <= event.items() for event in events_of(run_dir)) >= times


def exists(pattern: str) -> Callable[[Path], bool]:
    return lambda run_dir: any(run_dir.glob(pattern))


def check_refresh(run_dir: Path) -> None:
    """What a refresh leaves behind: who labelled which queries, who scores from then on, and what is told of it."""

    def origin(name: str) -> list[str]:
        text = json.loads((run_dir / f"rollouts/{name}/origin.json").read_text())["drawn_by"]
        return str(text).split(", ")

    def of(name: str, **fields: Any) -> list[dict[str, Any]]:
        return [event for event in events_of(run_dir) if event["event"] == name and fields.items() <= event.items()]

    asked = []
    for after, name in ((0, "annotate"), (1, "annotate_0001")):
        groups = groups_of(run_dir / "rollouts" / name)
        asked.append({group.query.id for group in groups})
        assert all(step.label is not None for group in groups for r in group.responses for step in r.steps)
        (event,) = of("annotation", iteration=after)
        counted = (len(groups), sum(len(group.responses) for group in groups))
        assert (event["queries"], event["responses"]) == counted
        policy = origin(f"iteration_{after + 1:04d}")[0]
        assert origin(name)[0] == policy, "the policy that draws the next iteration's responses"
    assert asked[0] != asked[1] and origin("iteration_0001")[1] != origin("iteration_0002")[1]
    first, second = of("step", stage="prm", iteration=None), of("step", stage="prm", iteration=1)
    assert [step["step"] for step in first + second] == list(range(1, len(first + second) + 1))
    rates = [step["learning_rate"] for step in second]
    assert rates[0] == first[0]["learning_rate"] > rates[-1], "the schedule starts over"
    (aged,), (fresh,) = (of("prm_quality", stage=stage, iteration=1) for stage in ("evolve", "refresh"))
    assert aged["baselines"] == fresh["baselines"] and aged["responses"] == fresh["responses"], "the same responses"
    assert len(of("prm_quality", split="held_out", iteration=1)) == 1
    counted = json.loads((run_dir / "summary.json").read_text())["generated"]["annotate"]
    assert counted["responses"] == sum(event["responses"] + event["rollouts"] for event in of("annotation"))
    assert counted["tokens"] == sum(event["tokens"] for event in of("annotation"))


def check_recipe(run_dir: Path) -> None:
    """What a run leaves on disk, worked out from its settings and its responses a second time."""
    rollouts, config, events = run_dir / "rollouts", settings.load(run_dir), events_of(run_dir)

    def of(name: str, **fields: Any) -> list[dict[str, Any]]:
        return [event for event in events if event["event"] == name and fields.items() <= event.items()]

    check_policies(rollouts, of("temperature")[0]["temperature"])
    asked: list[str] = []
    for number in (1, 2):
        directory = rollouts / f"iteration_{number:04d}"
        groups = groups_of(directory)
        asked += [group.query.id for group in groups]
        best = {}
        for group in groups:
            assert len(group.responses) == config.evolve.responses
            assert all(r.score == min(step.score or 0.0 for step in r.steps) for r in group.responses)
            correct = sorted((r for r in group.responses if r.correct), key=lambda r: (-(r.score or 0.0), r.index))
            if correct:
                best[group.query.id] = sorted(response.index for response in correct[:2])
        assert json.loads((directory / "selected.json").read_text()) == best
        responses = [response for group in groups for response in group.responses]
        (counted,) = of("generation", iteration=number)
        assert (counted["queries"], counted["responses"]) == (len(groups), len(responses))
        assert counted["queries_without_correct"] == len(groups) - len(best)
        assert counted["correct"] == sum(bool(r.correct) for r in responses)
        assert (counted["tokens"], counted["truncated"]) == (
            sum(len(r.tokens) for r in responses), sum(r.truncated for r in responses),
        )  # fmt: skip
        steps = of("step", iteration=number)
        assert sum(step["responses"] for step in steps) == config.evolve.epochs * sum(map(len, best.values()))
        assert {step["learning_rate"] for step in steps} == {config.evolve.optimizer.lr}
        (improved,) = of("improve", iteration=number)
        assert improved["loss"] == pytest.approx(sum(step["loss"] for step in steps) / len(steps))
        for split in ("validation", "test"):
            right = [g.responses[0].correct for g in groups_of(rollouts / f"evaluation_{number:04d}_{split}_greedy")]
            (measured,) = of("evaluation", iteration=number, split=split)
            share = sum(map(bool, right)) / len(right)
            assert (measured["queries"], measured["greedy_accuracy"]) == (len(right), pytest.approx(share))
            assert measured["standard_error"] == pytest.approx((share * (1 - share) / len(right)) ** 0.5)
    assert sorted(asked) == [f"digits-train-{i:06d}" for i in range(config.data.labelled_queries or 0)], "one pass"
    assert of("annotation")[0]["queries"] == len(groups_of(rollouts / "annotate")) == config.annotate.queries
    warmup = of("step", stage="warmup")
    rates = [step["learning_rate"] for step in warmup]
    assert max(rates) == pytest.approx(config.warmup.optimizer.lr) and rates[-1] < rates[5], "warmed up, then a cosine"
    seen = sum(step["responses"] for step in warmup)
    assert seen == (config.data.warmup_examples or 0) * config.warmup.epochs


def ended_within(job: Job, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    job.run_until(lambda _: time.monotonic() > deadline)
    return not job.running
