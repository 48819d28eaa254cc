"""Memory of one iteration: what it takes for each query is an id and some numbers, not its responses."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mstar_mega.config import Config, DataConfig, OptimizerConfig, ParallelConfig
from mstar_mega.data import disk
from mstar_mega.data.order import View, shuffled
from mstar_mega.data.prefetch import Ahead
from mstar_mega.data.types import Group, Query, Response, Step, Task
from mstar_mega.models.build import build_family
from mstar_mega.platform import distributed
from mstar_mega.recipe.blocks import Made, Wanted, stream_blocks
from mstar_mega.recipe.choose import choose
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.intervals import Interval
from mstar_mega.recipe.warmup import warmup_batches
from mstar_mega.report.metrics import NullMetrics
from mstar_mega.report.progress import Progress
from mstar_mega.rewards.checker import AnswerChecker
from mstar_mega.training.batches import split_into_epochs

FEW, MANY = 128, 512
MOST_BYTES = 250
"""A query may cost so much; its 16 responses would take some 50,000."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A job on a set on disk of some 600 labelled queries, each with a written-out chain of thought."""
    folder = tmp_path_factory.mktemp("set")
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(2 * MANY + 200):
            turns = [{"from": "human", "value": f"Question: what is {i}?"}, {"from": "gpt", "value": str(i)}]
            file.write(json.dumps({"id": f"query-{i:06d}", "image": None, "conversations": turns}) + "\n")
    data = DataConfig("mathv360k", str(folder / "rows.jsonl"), validation_queries=4, test_queries=4)
    labelled = disk.DiskQueries(disk.open_source(data, folder / "index"), "labelled")
    assert len(labelled) >= MANY
    with open(folder / "warmup.jsonl", "w") as file:
        for query in labelled:
            text = "a written-out chain of thought, " * 30 + f"\n\n# Answer\n\n{query.answer}"
            file.write(json.dumps({"id": query.id, "response": text}) + "\n")
    data.warmup_file = str(folder / "warmup.jsonl")
    data.labelled_queries = data.warmup_examples = None
    config = Config(data=data)
    distributed.initialize(ParallelConfig(), 0)
    family = build_family(config)
    prompt = Ahead(lambda query: family.prompt(query), lambda _: 1, 0, 0)
    with Progress(False) as progress, AnswerChecker() as checker:
        task = disk.build(data, folder / "index", 0)
        yield Job(config, folder / "run", distributed.layout(), family, prompt, task, NullMetrics(), progress, checker)


def make(queries: list[Query]) -> list[Group]:
    """16 responses of 40 tokens to each query, every third one correct."""

    def response(query: Query, index: int) -> Response:
        tokens = [hash((query.id, index, t)) % 30_000 for t in range(40)]
        steps = [Step(0, 20, "first"), Step(20, 40, "second")]
        score = (index * 7 % 16) / 16
        return Response(index, tokens, "word " * 40, [-0.1] * 40, False, "1", index % 3 == 0, "exact", steps, score)

    return [Group(query, [response(query, index) for index in range(16)]) for query in queries]


def make_blocks(blocks: Iterator[tuple[int, Sequence[Query]]]) -> Iterator[Made]:
    """:func:`make` of one block after the other."""
    return ((number, [make(list(queries))]) for number, queries in blocks)


def iterate(job: Job, count: int, number: int) -> list[list[int]]:
    """Generate, choose and cut ``count`` queries into steps; tokens of one batch in forty."""
    queries = shuffled(job.task.labelled, 0, "x")[:count]
    rollout = Wanted(job.rollouts / f"iteration_{number:04d}", {"number": number})
    (groups,) = stream_blocks(job, queries, [rollout], "sample", make_blocks)
    examples = choose(job, Interval(number, queries, [], False), groups)
    assert len(examples) == count and set(examples.sizes) == {2}
    batches = split_into_epochs(examples, OptimizerConfig(batch_size=16), 2, (0, "improve", number))
    assert sum(batch.responses for batch in batches) == 4 * count
    found = []
    for batch in batches[::40]:
        for group in batch:
            (wanted,) = make([group.query])
            best = sorted(
                sorted(wanted.responses, key=lambda r: -(r.score or 0.0) if r.correct else 1)[:2], key=lambda r: r.index
            )
            assert all(tokens in [r.tokens for r in best] for tokens in group.responses)
            found += group.responses
    return found


def peak_of(call: Any, *arguments: Any) -> int:
    """Most bytes of Python objects (and NumPy's) that were alive in a call beyond those before it."""
    tracemalloc.start()
    call(*arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_an_iteration_keeps_no_responses(job: Job) -> None:
    iterate(job, 64, 9)  # whatever is loaded at the first use
    few, many = peak_of(iterate, job, FEW, 1), peak_of(iterate, job, MANY, 2)
    assert few > 300_000, "a block of responses at least"
    assert (many - few) / (MANY - FEW) < MOST_BYTES, (few, many)
    again = peak_of(iterate, job, MANY, 2)  # resumed: every block is on disk
    assert (again - few) / (MANY - FEW) < MOST_BYTES, (few, again)


def test_a_warmup_keeps_no_texts(job: Job) -> None:
    def warm_up(job: Job, count: int) -> None:
        whole = job.task
        parts = {name: getattr(whole, name) for name in ("labelled", "unlabelled", "validation", "test")}
        job.task = Task(View(whole.warmup, range(count)), **parts)
        batches = warmup_batches(job)
        assert sum(batch.responses for batch in batches) == count
        (group, *_) = batches[-1]
        assert job.family.tokenizer.decode(group.responses[0]).endswith(f"# Answer\n\n{group.query.answer}")
        job.task = whole

    warm_up(job, 64)
    few, many = peak_of(warm_up, job, FEW), peak_of(warm_up, job, MANY)
    assert (many - few) / (MANY - FEW) < MOST_BYTES, (few, many)
