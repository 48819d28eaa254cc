"""Annotation in a stream: what it writes is what it would write block by block, and slots are not drained for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from scripted import make_job, make_task
from watched_steps import watched_steps

from mstar_mega.config import AnnotateConfig, Config, GenerationConfig
from mstar_mega.data.records import write_groups
from mstar_mega.data.types import Group, Query, Response, Step
from mstar_mega.generation.engine import Request, Sample, SampleSpec
from mstar_mega.kernels.noise import key_of
from mstar_mega.recipe import rollouts
from mstar_mega.recipe.annotate import annotate, annotated_queries
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.rollouts import Actors, sample_specs, to_group, to_response
from mstar_mega.rewards.reward import Judged

pytestmark = pytest.mark.usefixtures("job_of_one", "steps_and_answers")
BLOCK, RESPONSES, ROLLOUTS = 4, 2, 3
QUERIES = [Query(f"q{i}" + "x" * (5 * i % 17), f"question {i}", (), "7") for i in range(12)]


@pytest.fixture
def steps_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn at random has neither: every three tokens are a step, an even number of tokens is right."""

    def split(tokens: list[int], *_: Any) -> list[Step]:
        return [Step(at, min(at + 3, len(tokens)), "") for at in range(0, len(tokens), 3)]

    def is_even(query: Query, response: Response, *_: Any) -> Judged:
        return Judged(len(response.tokens) % 2 == 0, "exact")

    monkeypatch.setattr(rollouts, "split_steps", split)
    monkeypatch.setattr(rollouts, "judge_response", is_even)


@pytest.fixture(scope="module")
def policy() -> Any:
    model, family = tiny.build()
    # One token in eleven ends a response: continuations are of very different lengths.
    family.stop_tokens = frozenset(range(3, 10_000, 11)) | family.stop_tokens
    return tiny.randomize(model), family


def config(slots: int) -> Config:
    return Config(
        generation=GenerationConfig(max_new_tokens=14, slots=slots, queries_per_block=BLOCK, prefill_tokens=100),
        annotate=AnnotateConfig(queries=len(QUERIES), responses=RESPONSES, rollouts=ROLLOUTS),
    )


def run(directory: Path, policy: Any, slots: int = 16, lag: int = 0, stop_after: int | None = None) -> dict[str, str]:
    """Annotate; a kill comes after so many steps and prefills. What the files say, without the time that it took."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        if stop_after is not None and steps > stop_after:
            raise KeyboardInterrupt

    with make_job(directory, config(slots), make_task(labelled=QUERIES), policy[1]) as job:
        actors = Actors(job, policy[0], None)
        actors.engine.lag, actors.engine.between_steps = lag, count
        annotate(job, actors)
    return written(directory / "rollouts" / "annotate")


def written(directory: Path) -> dict[str, str]:
    return {file.name: file.read_text().partition("\n")[2] for file in sorted(directory.glob("block_*.jsonl"))}


@pytest.fixture(scope="module")
def reference(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Filled by the first test that needs it, as the fixtures of a test are not there for a module's."""
    return {}


def block_by_block(directory: Path, policy: Any) -> dict[str, str]:
    """The same by two calls of the engine for each block, the second one when the first has ended."""
    with make_job(directory, config(16), make_task(labelled=QUERIES), policy[1]) as job:
        actors, queries = Actors(job, policy[0], None), annotated_queries(job, 0)
        for first in range(0, len(queries), BLOCK):
            groups = labelled(job, actors, queries[first : first + BLOCK])
            write_groups(directory / f"block_{first // BLOCK:05d}.jsonl", groups, {})
    return written(directory)


def labelled(job: Job, actors: Actors, queries: Sequence[Query]) -> list[Group]:
    """Sample, continue and label a block."""
    hot = job.config.annotate.temperature
    plain = [Request(job.prompt(query), sample_specs("annotate", query, RESPONSES)) for query in queries]
    groups = [to_group(job, *one) for one in zip(queries, actors.engine.generate(plain, hot), strict=True)]
    requests, beginnings = [], []
    for group in groups:
        drafts = [response.tokens for response in group.responses]
        first: dict[tuple[int, ...], int] = {}
        for response in group.responses:
            for step in response.steps[:-1]:
                first.setdefault(tuple(response.tokens[: step.end]), response.index)
        named = [(start, draft, i) for start, draft in first.items() for i in range(ROLLOUTS)]
        specs = [SampleSpec(key_of("annotate", group.query.id, s, i), d, len(s)) for s, d, i in named]
        requests.append(Request(job.prompt(group.query), specs, drafts))
        beginnings.append([start for start, _, _ in named])
    for group, starts, samples in zip(groups, beginnings, actors.engine.generate(requests, hot), strict=True):
        group.continuation_tokens = sum(len(sample.tokens) for sample in samples)
        right: Counter[tuple[int, ...]] = Counter()
        for start, sample in zip(starts, samples, strict=True):
            whole = to_response(job, 0, Sample([*start, *sample.tokens], [], sample.truncated))
            right[start] += len(whole.tokens) % 2 == 0
        for response in group.responses:
            Judged(len(response.tokens) % 2 == 0, "exact").note(response)
            for step in response.steps[:-1]:
                step.label = right[tuple(response.tokens[: step.end])] / ROLLOUTS
            for step in response.steps[-1:]:
                step.label = float(bool(response.correct))
    return groups


@pytest.mark.parametrize(("slots", "lag"), [(16, 0), (5, 1), (512, 0)])
def test_files_are_those_of_a_run_block_by_block(
    policy: Any, reference: dict[str, str], tmp_path: Path, slots: int, lag: int
) -> None:
    reference.update(reference or block_by_block(tmp_path / "reference", policy))
    labels = {part.split(",")[0].rstrip("}]") for text in reference.values() for part in text.split('"label":')[1:]}
    assert len(reference) == 3 and len(labels) == 4, "all shares of three continuations are there"
    assert run(tmp_path / "run", policy, slots, lag) == reference


def test_a_killed_annotation_goes_on_to_the_same_files(policy: Any, reference: dict[str, str], tmp_path: Path) -> None:
    reference.update(reference or block_by_block(tmp_path / "reference", policy))
    directory = tmp_path / "run"
    for stop_after in (160, 60):
        with pytest.raises(KeyboardInterrupt):
            run(directory, policy, slots=8, stop_after=stop_after)
        found = written(directory / "rollouts" / "annotate")
        assert len(found) < len(reference) and found.items() <= reference.items()
    assert found, "no block was finished before the kills"
    assert run(directory, policy, slots=8) == reference


def test_slots_are_not_drained_between_sampling_and_continuing(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = watched_steps(monkeypatch, lambda schedule: len(schedule.running))
    block_by_block(tmp_path / "reference", policy)
    before = len(busy)
    busy.clear()
    run(tmp_path / "run", policy)
    assert len(busy) < 0.85 * before, "as many steps as with an end after each call"
    # Few of the last samples are there at the end of the one stream, and nowhere else.
    assert sum(busy[:-14]) > 0.9 * 16 * (len(busy) - 14)
