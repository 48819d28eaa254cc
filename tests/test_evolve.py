"""The recipe's loop: which queries an iteration takes, when it ends, and what happens in which order."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any, cast

import pytest
from scripted import Events, make_job, make_task

from mstar_mega.config import (
    Config,
    EvaluationConfig,
    EvolveConfig,
    OptimizerConfig,
    PRMConfig,
    PromptsConfig,
    SelectionConfig,
    TemperatureConfig,
)
from mstar_mega.data.types import Query
from mstar_mega.models.lmm import LMM
from mstar_mega.recipe import evolve as loop
from mstar_mega.recipe import fit as fitting
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.fit import Position
from mstar_mega.recipe.intervals import Interval, next_interval
from mstar_mega.recipe.method import needs_prm, resolve_method
from mstar_mega.recipe.rollouts import Actors
from mstar_mega.training.batches import Examples, TrainGroup
from mstar_mega.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("job_of_one")

LABELLED = [Query(f"l{i:02d}", "?", (), "1") for i in range(10)]
UNLABELLED = [Query(f"u{i}", "?", (), None) for i in range(4)]


def interval(job: Job, **position: Any) -> Interval | None:
    return next_interval(job, resolve_method(job.config.evolve), Position(**position))


def labelled_ids(job: Job, number: int) -> list[str]:
    now = interval(job, iteration=number)
    assert now is not None and now.number == number and not now.unlabelled
    return [query.id for query in now.labelled]


# ------------------------------------------------------------------------------------------------------- intervals


def test_a_pass_takes_every_query_once_and_each_pass_has_its_own_order(tmp_path: Path) -> None:
    with make_job(tmp_path, Config(), make_task(labelled=LABELLED, unlabelled=UNLABELLED)) as job:
        parts = [labelled_ids(job, number) for number in range(1, 9)]
    assert sorted(map(len, parts)) == [2, 2, 2, 2, 3, 3, 3, 3]
    first, second = ([id for part in half for id in part] for half in (parts[:4], parts[4:]))
    assert sorted(first) == sorted(second) == [query.id for query in LABELLED]
    assert first != second and first != sorted(first)


def test_the_sweep_is_due_before_the_first_of_every_so_many_iterations(tmp_path: Path) -> None:
    def sweeps(**evolve: Any) -> list[bool]:
        config = Config(evolve=EvolveConfig(**evolve), temperature=TemperatureConfig(every=3))
        with make_job(tmp_path, config, make_task(labelled=LABELLED)) as job:
            found = [interval(job, iteration=number) for number in range(1, 8)]
        return [now is not None and now.sweep for now in found]

    assert sweeps() == [True, False, False, True, False, False, True]
    assert not any(sweeps(method="sft"))


@pytest.mark.parametrize(
    ("evolve", "position", "join"),
    [
        (EvolveConfig(max_steps=100), {"iteration": 3, "total_steps": 49}, False),
        (EvolveConfig(max_steps=100), {"iteration": 3, "total_steps": 50}, True),
        (EvolveConfig(max_steps=100), {"iteration": 3, "total_steps": 52, "step": 3}, False),
        (EvolveConfig(max_steps=0, passes=2), {"iteration": 4}, False),
        (EvolveConfig(max_steps=0, passes=2), {"iteration": 5}, True),
    ],
)
def test_unlabelled_queries_join_when_their_share_of_the_budget_is_spent(
    evolve: EvolveConfig, position: dict[str, int], join: bool, tmp_path: Path
) -> None:
    """Resumed inside an iteration, what counts is where it began."""
    config = Config(evolve=evolve, prompts=PromptsConfig(unlabelled="voting", mixin=0.5))
    with make_job(tmp_path, config, make_task(labelled=LABELLED, unlabelled=UNLABELLED)) as job:
        now = interval(job, **position)
        assert now is not None and bool(now.unlabelled) == join
        assert len(now.queries) == len(now.labelled) + len(now.unlabelled)


def test_the_run_ends_at_whichever_limit_comes_first(tmp_path: Path) -> None:
    config = Config(evolve=EvolveConfig(max_steps=50, passes=1.1))  # up to whole iterations: 5 of 4 to a pass
    with make_job(tmp_path, config, make_task(labelled=LABELLED)) as job:
        assert interval(job, iteration=5, total_steps=49, barren=3) is not None
        assert interval(job, iteration=6, total_steps=49) is None
        assert interval(job, iteration=2, total_steps=50) is None
        assert interval(job, iteration=5, total_steps=49, barren=4) is None


def test_a_prm_is_trained_where_a_setting_needs_one() -> None:
    def config(
        method: Any = "continuous", rule: Any = "random_k", mode: Any = "fixed", unlabelled: Any = "none"
    ) -> Any:
        return Config(
            evolve=EvolveConfig(method=method), selection=SelectionConfig(rule),
            temperature=TemperatureConfig(mode), prompts=PromptsConfig(unlabelled),
        )  # fmt: skip

    assert not needs_prm(config()) and not needs_prm(config(rule="all_correct", mode="pass_at_k", unlabelled="oracle"))
    for one in ({"rule": "top_k"}, {"rule": "threshold"}, {"mode": "reward_pass_at_k"}, {"unlabelled": "voting"}):
        assert needs_prm(config(**one)), one
    assert not needs_prm(config("sft", rule="top_k", mode="reward_pass_at_k", unlabelled="voting"))


# -------------------------------------------------------------------------------------------------------- the order


class Watched:
    """A policy that notes what is done to it, among all that the loop does."""

    model = cast(LMM, None)

    def __init__(self) -> None:
        self.done: list[str] = []

    def copy_weights(self) -> str:
        return "warm-up weights"

    def load_weights(self, weights: str) -> None:
        self.done.append(f"load {weights}")

    def reset_optimizer(self) -> None:
        self.done.append("reset")

    def set_total_steps(self, steps: int) -> None:
        self.done.append(f"schedule of {steps}")


def run_loop(job: Job, monkeypatch: pytest.MonkeyPatch, responses: int = 8, warmup_steps: int = 0) -> list[str]:
    """The loop with everything around it noted instead of done; each iteration selects so many responses."""
    policy = Watched()
    done = policy.done

    def note(name: str, result: Any = None, *places: int) -> None:
        def call(*arguments: Any) -> Any:
            done.append(" ".join([name, *(str(arguments[place]) for place in places)]))
            return result

        monkeypatch.setattr(loop, name, call)

    def tune(job: Job, actors: Any, number: int, present: float | None) -> float:
        done.append(f"tune {number} from {present}")
        return number / 10

    def generate(job: Job, actors: Any, now: Interval, position: Position) -> str:
        done.append(f"generate {now.number} at {position.temperature}")
        return "groups"

    def fit(job: Job, trainer: Any, stage: str, batches: Any, position: Position) -> float:
        done.append(f"fit {len(batches)}")
        position.step, position.total_steps = len(batches), position.total_steps + len(batches)
        return 0.0

    def read(i: int) -> TrainGroup:
        return TrainGroup(LABELLED[i], [[1]])

    chosen = Examples([query.id for query in LABELLED[:responses]], array("i", [1] * responses), read)
    monkeypatch.setattr(loop, "restore", lambda *arguments: None)
    monkeypatch.setattr(fitting, "base_weights", lambda job: "base weights")
    for name, value in (("tune_temperature", tune), ("generate", generate), ("fit", fit)):
        monkeypatch.setattr(loop, name, value)
    note("check_log_probs")
    note("choose", chosen)
    note("gold_examples", chosen)
    note("refresh_prm", None, 2, 3)
    note("exploration_responses", "responses", 2)
    note("measure_refreshed", None, 2, 3)
    note("measure_exploration", None, 2, 3)
    note("measure_greedy", None, 2, 3, 4)
    note("save", None, 2)
    loop.evolve(job, cast(Trainer, policy), cast(Actors, None), warmup_steps)
    return done


def run_settings(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluation: EvaluationConfig | None = None,
    refresh: int = 0,
    **evolve: Any,
) -> tuple[list[str], list[dict[str, Any]]]:
    """What the loop does with these settings in batches of 4 responses, and its events ``improve``."""
    given = {name: evolve.pop(name) for name in ("responses", "warmup_steps") if name in evolve}
    settings = EvolveConfig(optimizer=OptimizerConfig(batch_size=4), **{"max_steps": 0, **evolve})
    config = Config(evolve=settings, evaluation=evaluation or EvaluationConfig(), prm=PRMConfig(refresh_every=refresh))
    with make_job(directory, config, make_task(labelled=LABELLED)) as job:
        done = run_loop(job, monkeypatch, **given)
        assert isinstance(job.metrics, Events)
        return done, job.metrics.of("improve")


def test_continuous_training_goes_on_and_sweeps_every_second_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, _ = run_settings(tmp_path, monkeypatch, passes=0.75)

    def iteration(number: int, temperature: float) -> list[str]:
        return [
            f"generate {number} at {temperature}", "check_log_probs", "choose", "fit 2", "save evolve",
            f"measure_exploration evolve {number}", f"measure_greedy evolve {number} test", "save evolve",
        ]  # fmt: skip

    assert done == [
        "measure_exploration warmup 0",
        *("tune 1 from None", *iteration(1, 0.1), *iteration(2, 0.1)),
        *("tune 3 from 0.1", *iteration(3, 0.3)),
    ]


@pytest.mark.parametrize(
    ("method", "between"),
    [("iterative_rft", ["reset"]), ("rest_em", ["load warm-up weights", "reset"])],
)
def test_other_methods_start_over_behind_the_selection(
    method: str, between: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, _ = run_settings(tmp_path, monkeypatch, method=method, passes=2)
    for start in (i for i, what in enumerate(done) if what == "choose"):
        assert done[start : start + len(between) + 3] == ["choose", *between, "schedule of 2", "fit 2"]
    assert done.count("reset") == done.count("fit 2") == 2
    nothing, improved = run_settings(tmp_path, monkeypatch, method=method, passes=1, responses=0)
    assert not set(between) & set(nothing) and "fit 0" in nothing, "nothing to train on: nothing starts over"
    assert [event["steps"] for event in improved] == [0]


@pytest.mark.parametrize(
    ("start_from", "loaded"), [(None, ["load base weights"]), ("warmup", ["load warm-up weights"])]
)
def test_sft_is_one_training_on_gold_answers_from_the_base_or_the_warm_up(
    start_from: Any, loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, _ = run_settings(tmp_path, monkeypatch, method="sft", start_from=start_from, passes=2)
    steps = [what for what in done if what.startswith(("gold", "load", "reset", "schedule", "fit", "generate", "tune"))]
    assert steps == ["gold_examples", *loaded, "fit 2", "gold_examples", "fit 2"]


def test_the_iteration_that_reaches_the_step_budget_is_trained_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget holds the warm-up's steps; no iteration begins beyond it."""
    done, improved = run_settings(tmp_path, monkeypatch, max_steps=17, epochs=3, warmup_steps=7)
    assert [what for what in done if what.startswith("fit")] == ["fit 6", "fit 6"]
    assert [(event["iteration"], event["total_steps"]) for event in improved] == [(1, 13), (2, 19)]
    _, improved = run_settings(tmp_path, monkeypatch, max_steps=13, epochs=3, warmup_steps=7)
    assert [event["total_steps"] for event in improved] == [13]


@pytest.mark.parametrize(("every", "measured"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (3, [0, 3]), (0, [0, 3])])
def test_exploration_is_measured_at_the_start_every_so_often_and_at_the_end(
    every: int, measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, _ = run_settings(tmp_path, monkeypatch, EvaluationConfig(every=every), passes=0.75)
    explored = [what.split()[1:] for what in done if what.startswith("measure_exploration")]
    assert explored == [["evolve" if iteration else "warmup", str(iteration)] for iteration in measured]


@pytest.mark.parametrize(("every", "expected"), [(2, [(2, 0), (4, 2)]), (3, [(3, 0)]), (0, [])])
def test_the_prm_is_refreshed_between_iterations_before_the_sweep(
    every: int, expected: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured before and after on the same responses where the iteration is measured; not behind the last one."""
    done, _ = run_settings(tmp_path, monkeypatch, EvaluationConfig(every=4), every, passes=1.25)
    refreshed = [i for i, what in enumerate(done) if what.startswith("refresh_prm")]
    assert [done[i] for i in refreshed] == [f"refresh_prm {after} {before}" for after, before in expected]
    for i, (after, _) in zip(refreshed, expected, strict=True):
        of_iteration = [f"exploration_responses {after}"] if after == 4 else []
        assert done[i - len(of_iteration) - 1 : i] == ["save evolve", *of_iteration]
        following = [f"measure_refreshed {after} responses"] if after == 4 else []
        following += [f"tune {after + 1} from 0.{after - 1}"] if after % 2 == 0 else []
        assert done[i + 1 : i + len(following) + 2] == [
            *following,
            f"generate {after + 1} at 0.{after + 1 - after % 2}",
        ]


def test_without_a_prm_nothing_is_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, _ = run_settings(tmp_path, monkeypatch, refresh=1, method="sft", passes=3)
    assert not [what for what in done if "refresh" in what]


@pytest.mark.parametrize(("every", "measured"), [(1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (0, [3])])
def test_test_accuracy_is_measured_every_so_often_and_at_the_end(
    every: int, measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up policy's is the warm-up stage's business."""
    done, _ = run_settings(tmp_path, monkeypatch, EvaluationConfig(every=2, test_every=every), passes=0.75)
    assert [what for what in done if what.startswith("measure_greedy")] == [
        f"measure_greedy evolve {iteration} test" for iteration in measured
    ]
