"""Queries in a stream: who is sampled with whom, when and where changes no byte of what is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from parallel import run_parallel
from scripted import make_job, make_task
from watched_steps import watched_steps

from mstar_mega.config import Config, GenerationConfig, ParallelConfig
from mstar_mega.data.types import Query
from mstar_mega.generation import scheduler
from mstar_mega.platform import distributed
from mstar_mega.platform.distributed import taken
from mstar_mega.recipe.rollouts import Actors, Sampling, rollout, rollouts

pytestmark = pytest.mark.usefixtures("job_of_one")
WARM, HOT = Sampling("warm", 0.7, 3, key="v"), Sampling("hot", 1.3, 2, key="v")
QUERIES = [Query(f"q{i}" + "x" * (5 * i % 17), f"question {i}", (), "7") for i in range(20)]


@pytest.fixture(scope="module")
def policy() -> Any:
    model, family = tiny.build()
    # One token in seven ends a response: slots are freed and refilled at different times.
    family.stop_tokens = frozenset(range(3, 10_000, 7)) | family.stop_tokens
    return tiny.randomize(model), family


def draw(directory: Path, policy: Any, samplings: Sequence[Sampling], slots: int = 12, lag: int = 0) -> dict[str, str]:
    """What the rollouts leave on disk, by file, without the time that it took."""
    model, family = policy
    generation = GenerationConfig(max_new_tokens=20, slots=slots, queries_per_block=8, prefill_tokens=60)
    with make_job(directory, Config(generation=generation), make_task(), family) as job:
        actors = Actors(job, model, None)
        actors.engine.lag = lag
        if len(samplings) == 1:
            rollout(job, actors, QUERIES, samplings[0])
        else:
            rollouts(job, actors, QUERIES, samplings)
    return written(directory)


def written(directory: Path) -> dict[str, str]:
    files = sorted(directory.rglob("block_*.jsonl"))
    return {f"{file.parent.name}/{file.name}": file.read_text().partition("\n")[2] for file in files}


@pytest.fixture(scope="module")
def whole(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return draw(tmp_path_factory.mktemp("whole"), policy, [WARM])


@pytest.mark.parametrize(("slots", "lag"), [(1, 0), (7, 1), (512, 0)])
def test_files_do_not_depend_on_slots(policy: Any, whole: dict[str, str], tmp_path: Path, slots: int, lag: int) -> None:
    assert len(whole) == 3 and len({len(text) for text in whole.values()}) == 3
    assert draw(tmp_path, policy, [WARM], slots, lag) == whole


@pytest.mark.parametrize("lost", [[1], [0, 2]])
def test_what_is_resumed_is_what_an_uninterrupted_stream_writes(
    policy: Any, whole: dict[str, str], tmp_path: Path, lost: list[int]
) -> None:
    """Blocks that are drawn alone, block by block, are those of the stream."""
    draw(tmp_path, policy, [WARM])
    for block in lost:
        (tmp_path / "rollouts" / "warm" / f"block_{block:05d}.jsonl").unlink()
    assert draw(tmp_path, policy, [WARM]) == whole


def test_a_sweep_in_one_pass_is_one_temperature_after_the_other(
    policy: Any, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[int] = []
    prefill = scheduler.Schedule._prefill

    def counted(self: scheduler.Schedule, requests: list[int]) -> None:
        prompts.extend(requests)
        prefill(self, requests)

    monkeypatch.setattr(scheduler.Schedule, "_prefill", counted)
    pooled = draw(tmp_path / "pooled", policy, [WARM, HOT])
    assert len(prompts) == len(QUERIES), "each image and prompt is read once for all temperatures"
    assert pooled == whole | draw(tmp_path / "hot", policy, [HOT])
    texts = [json.loads(line)["responses"] for line in pooled["hot/block_00000.jsonl"].splitlines()]
    cooler = [json.loads(line)["responses"] for line in pooled["warm/block_00000.jsonl"].splitlines()]
    assert any(a[0]["tokens"] != b[0]["tokens"] for a, b in zip(texts, cooler, strict=True)), "temperature matters"
    # A kill between two files of a block: it is made again for every temperature, and nothing differs.
    (tmp_path / "pooled" / "rollouts" / "hot" / "block_00001.jsonl").unlink()
    assert draw(tmp_path / "pooled", policy, [WARM, HOT]) == pooled


def test_slots_are_not_drained_between_blocks(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = watched_steps(monkeypatch, lambda schedule: (schedule.source is not None, len(schedule.running)))
    draw(tmp_path, policy, [WARM], slots=8)
    busy = [running for has_more, running in steps if has_more]
    assert len(busy) > 20 and min(busy) == 8, "slots wait while there is work"


def take_blocks() -> list[int]:
    distributed.initialize(ParallelConfig(), 0)
    place = distributed.layout()
    lists = [list(taken(range(n), f"a test {n}", place)) for n in (0, 1, 7)]
    assert lists[0] == []
    return [*lists[1], *(10 + item for item in lists[2])]


def test_every_block_is_taken_by_one_replica() -> None:
    found = run_parallel(2, "test_stream:take_blocks")
    assert sorted(found[0] + found[1]) == [0, *range(10, 17)]
