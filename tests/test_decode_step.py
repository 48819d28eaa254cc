"""The decode step as a device sees it: few launches, the same ones on the same addresses, no question to the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from kernel_cases import BACKENDS, needs_interpreter
from launches import Tape, Watch, kernels_watched
from parallel import run_parallel

from mstar_mega.config import GenerationConfig, OptimizerConfig, ParallelConfig
from mstar_mega.data.types import Query
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.generation.replay import Straight
from mstar_mega.generation.runner import buckets
from mstar_mega.generation.scheduler import Schedule, Terms
from mstar_mega.kernels import forced_backend
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.inference import inference
from mstar_mega.models.lmm import LMM
from mstar_mega.models.sizes import DynamicNTK
from mstar_mega.training.batches import TrainGroup
from mstar_mega.training.trainer import Trainer, weights_of

pytestmark = [pytest.mark.usefixtures("job_of_one"), needs_interpreter]
VOCABULARY: Any = SimpleNamespace(stop_tokens=frozenset(range(60, 110)), banned_tokens=[6, 7, 8])
LIMIT = 8
PER_LAYER, OUTSIDE = 11, 30


@pytest.fixture(scope="module")
def model() -> LMM:
    return tiny.randomize(tiny.build()[0])


@pytest.fixture
def kernels() -> Iterator[None]:
    """Every kernel of a step runs, in Triton's interpreter where there is no GPU, and is seen."""
    with kernels_watched(), forced_backend(BACKENDS[1]):
        yield


def requests(count: int = 3, samples: int = 2, **spec: Any) -> list[Request]:
    return [
        Request(tiny.prompt(i, 7 + 5 * i), [SampleSpec(key_of("s", i, j), **spec) for j in range(samples)])
        for i in range(count)
    ]


def settings(**more: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": LIMIT, "slots": 4, **more})


def draw(model: LMM, wanted: list[Request], replay: Any = None, lag: int = 0, **more: Any) -> list[list[Any]]:
    engine = Engine(model, VOCABULARY, settings(**more), 3)
    engine.replay, engine.lag = (lambda: replay or Straight()), lag
    return [[(s.tokens, s.truncated) for s in samples] for samples in engine.generate(wanted, 1.0)]


def started(model: LMM, wanted: list[Request], slots: int = 4) -> Schedule:
    """A stream whose first samples run."""
    config = settings(slots=slots)
    terms = Terms(config, 1.0, frozenset(), VOCABULARY.banned_tokens, 3, 0, Straight)
    schedule = Schedule(model, terms, iter(wanted), slots, 0)
    schedule._pull()
    with inference(model):
        assert schedule._admit()
    schedule._collect()
    return schedule


def one_step(schedule: Schedule) -> list[tuple[Any, ...]]:
    """What the device is given to do in a step; the host reads nothing inside."""
    runner = schedule.runner
    if schedule.changed:
        entries = [schedule.cache.entries[r.work.request] for r in schedule.running.values()]  # type: ignore[union-attr]
        runner.run_over(list(schedule.running), entries)
        schedule.changed = False
    with Watch(strict=True) as watch:
        runner._steps[runner._bucket]()
    for running in schedule.running.values():
        running.own += 1
    return watch.seen


def test_every_step_of_a_bucket_is_the_same_launches_on_the_same_addresses(model: LMM, kernels: None) -> None:
    schedule = started(model, requests(2))
    with inference(model):
        first, second = one_step(schedule), one_step(schedule)
        assert first == second
        schedule._leave([1])  # a sample ends: other rows, the same bucket
        third = one_step(schedule)
    assert schedule.runner._bucket == 4 and len(schedule.running) == 3
    assert first == third
    assert {"sample_kernel", "decode_own_kernel", "mm"} <= {name for name, *_ in first}


def test_the_watch_sees_what_it_forbids() -> None:
    x, place = torch.arange(4.0), torch.zeros(4)
    for forbidden in (lambda: x.sum().item(), lambda: x[x > 1], lambda: x + 1, lambda: x.to(torch.float64)):
        with pytest.raises(AssertionError), Watch(strict=True):
            forbidden()
    with Watch(strict=True) as watch:
        torch.add(x, 1, out=place).view(2, 2)
    assert [name for name, *_ in watch.seen] == ["add"]


@pytest.mark.parametrize("scaled", [False, True])
def test_launches_of_a_step(monkeypatch: pytest.MonkeyPatch, scaled: bool) -> None:
    """At most 11 a layer and 30 outside of the layers, Triton's counted as one each."""
    counts = []
    whole = tiny.family
    for layers in (1, 3):

        def family(layers: int = layers) -> Any:
            made = whole()
            scaling = DynamicNTK(2.0, 4096) if scaled else None
            made.language = replace(made.language, layers=layers, rope_scaling=scaling)
            return made

        monkeypatch.setattr(tiny, "family", family)
        with kernels_watched(run=False), forced_backend(BACKENDS[1]):
            schedule = started(tiny.build()[0], requests(2))
            with inference(schedule.model):
                counts.append(len(one_step(schedule)))
    per_layer = (counts[1] - counts[0]) / 2
    outside = counts[0] - per_layer
    print(f"launches: {per_layer:g} a layer, {outside:g} outside")
    assert per_layer <= PER_LAYER and outside <= OUTSIDE


def test_recorded_steps_draw_what_plain_pytorch_draws(model: LMM, kernels: None) -> None:
    """Recorded once for each bucket and replayed, with tokens that arrive one step late; and three temperatures."""
    wanted = [*requests(2), *requests(1, temperature=0.0), *requests(1, temperature=0.6)]
    tape = Tape()
    drawn = draw(model, wanted, tape, lag=1)
    with forced_backend("torch"):
        assert draw(model, wanted) == drawn
        assert draw(model, wanted, lag=1, slots=3) == drawn
    assert 0 < tape.recorded <= len(buckets(4)) and tape.replayed > tape.recorded
    assert len({len(tokens) for samples in drawn for tokens, _ in samples}) > 2


def drawn_on_two(parallel: ParallelConfig) -> list[list[Any]]:
    """By the kernels, on ranks that share a model."""
    model = tiny.build(parallel)[0]
    with forced_backend("interpreter"):
        return draw(model, requests(2), lag=1)


@pytest.mark.parametrize("cut", [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)], ids=["tensor", "pipeline"])
def test_kernels_draw_the_same_on_a_model_that_is_cut(cut: ParallelConfig) -> None:
    whole = draw(tiny.build()[0], requests(2))
    for found in run_parallel(2, "test_decode_step:drawn_on_two", cut):
        assert found == whole


def test_late_tokens_change_nothing(model: LMM) -> None:
    wanted = requests(6, 3)
    now = draw(model, wanted, slots=512)
    for slots in (1, 5, 512):
        assert draw(model, wanted, lag=1, slots=slots) == now
    model.rope.scaling = DynamicNTK(2.0, 12)  # sequences change their regime on the way
    try:
        assert draw(model, wanted[:3], lag=1) == draw(model, wanted[:3])
    finally:
        model.rope.scaling = None


def test_buckets_waste_little() -> None:
    for rows in (1, 3, 16, 100, 512):
        sizes = buckets(rows)
        assert sizes[-1] == rows and sizes == sorted(set(sizes))
        for wanted in range(1, rows + 1):
            bucket = next(size for size in sizes if size >= wanted)
            assert bucket <= max(16, 1.5 * wanted), (wanted, bucket)
    assert len(buckets(512)) < 20


def test_weights_stay_where_they_are() -> None:
    """Recorded steps read the weights by address: training, a reset and loading leave every one in its place."""
    model, _ = tiny.build()
    query = Query("q", "?", (), "1")
    for shared in (False, True):
        trainer = Trainer(
            model,
            OptimizerConfig(lr=0.01),
            lambda _: tiny.prompt(0, 9),
            10,
            ParallelConfig(distributed_optimizer=shared),
        )
        places = {name: weight.data_ptr() for name, weight in weights_of(model).items()}
        before = trainer.copy_weights()
        trainer.step([TrainGroup(query, tiny.tokens(1, 5, 4))])
        after = weights_of(model)
        assert any(not torch.equal(before[name], weight) for name, weight in after.items()), "nothing was trained"
        trainer.reset_optimizer()
        trainer.load_weights(before)
        assert {name: weight.data_ptr() for name, weight in weights_of(model).items()} == places
