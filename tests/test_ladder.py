"""The ladder: equal numbers of responses, paired differences with an honest error, runs that end with their parent."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ladder
import ladder_rates
import ladder_results
import ladder_runs
import pytest
from groups import make_group, make_response
from ladder_rows import BY_NAME, QUESTIONS, ROWS
from ladder_runs import MADE_BY, Ladder

from mstar_mega import settings
from mstar_mega.config import Config
from mstar_mega.data.records import write_groups
from mstar_mega.settings.rules import validate
from mstar_mega.settings.shipped import config_file

LADDER_YAML = "examples/configs/ladder.yaml"


def drawn(rng: random.Random, seeds: int, questions: int, effect: float, spread: float) -> list[list[float]]:
    """Differences of two methods' answers (0, 1 or -1): seeds differ by ``spread``, questions by chance."""
    gaps = []
    for _ in range(seeds):
        better = effect + rng.gauss(0.0, spread)
        gaps.append([float((rng.random() < 0.5 + better) - (rng.random() < 0.5)) for _ in range(questions)])
    return gaps


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_error_of_a_paired_difference_is_that_of_repeated_experiments(spread: float) -> None:
    rng = random.Random(0)
    found = [ladder_results.paired(drawn(rng, 5, 100, 0.1, spread)) for _ in range(300)]
    assert statistics.mean(mean for mean, _ in found) == pytest.approx(0.1, abs=0.01)
    real = statistics.stdev(mean for mean, _ in found)
    told = statistics.mean(error for _, error in found)
    assert real * 0.9 < told < real * 1.4, "the larger of two estimates errs on the careful side"


def test_one_seed_has_the_error_of_its_questions() -> None:
    mean, error = ladder_results.paired([[1.0, 0.0, 0.0, -1.0, 1.0, 1.0, 0.0, 0.0]])
    assert mean == 0.25 and error == pytest.approx((0.4375 / 8) ** 0.5)


def test_every_row_and_question_names_rows_that_there_are_and_settings_that_this_version_has(tmp_path: Path) -> None:
    assert len(BY_NAME) == len(ROWS)
    names = {row.reference for row in ROWS} | {name for q in QUESTIONS for name in (q.row, q.reference)}
    names |= {name for row in ROWS for name in row.tokens_of or ()}
    assert names <= set(BY_NAME)
    place = Ladder(tmp_path, LADDER_YAML, tmp_path / "outcomes.json")
    assert all(ladder.is_known(row, place) for row in ROWS)
    for row in ROWS:
        if row.mixin is not None:  # the config has unlabelled prompts enough
            validate(settings.parse(place.arguments(row.name, 1, place.settings_of(row, 1))))


@pytest.mark.parametrize(("labelled", "unlabelled", "passes"), [(1024, 1024, 2.0), (1000, 900, 3.0), (96, 256, 1.5)])
def test_unlabelled_prompts_add_no_response_in_total(labelled: int, unlabelled: int, passes: float) -> None:
    config = Config()
    config.data.labelled_queries, config.data.unlabelled_queries, config.evolve.passes = labelled, unlabelled, passes
    for mixin in (0.0, 0.25, 0.5, 0.75):
        given = dict(item[2:].split("=") for item in ladder_runs.mixing(config, mixin))
        iterations = round(4 * float(given["evolve.passes"]))
        ratio, drawn, joined = float(given["prompts.ratio"]), 0, 0
        for i in range(iterations):  # as recipe/intervals.py shares them out
            own = labelled * (i % 4 + 1) // 4 - labelled * (i % 4) // 4
            pool = unlabelled * (i % 4 + 1) // 4 - unlabelled * (i % 4) // 4
            others = min(pool, round(ratio * own)) if i / iterations >= mixin else 0
            drawn, joined = drawn + own + others, joined + (others > 0)
        assert drawn == pytest.approx(passes * labelled, abs=iterations), mixin
        assert joined > 0, "some join"


def test_too_few_unlabelled_prompts_are_refused() -> None:
    config = Config()
    config.data.labelled_queries, config.data.unlabelled_queries, config.evolve.passes = 1024, 64, 2.0
    with pytest.raises(ValueError, match="unlabelled"):
        ladder_runs.mixing(config, 0.75)


def finished(place: Ladder, name: str, seed: int, right: list[bool], commit: str = "a" * 40, tokens: int = 9) -> None:
    """A run directory as a finished run of the ladder leaves it, with so many right answers."""
    run = place.run(name, seed)
    for iteration, verdicts in ((0, [not r for r in right]), (8, right)):
        block = run / f"rollouts/evaluation_{iteration:04d}_test_greedy/block_00000.jsonl"
        block.parent.mkdir(parents=True)
        write_groups(block, [make_group([make_response(0, None, r)], f"q{i}") for i, r in enumerate(verdicts)])
    points = [{"iteration": i, "accuracy": 0.5, "steps": steps} for i, steps in ((0, 10), (8, 50))]
    (run / "summary.json").write_text(json.dumps({"responses_generated": 64, "trajectory": points}))
    events = [
        {"event": "annotation", "responses": 4, "tokens": 100, "time": 0.0},
        {"event": "generation", "iteration": 1, "responses": 64, "tokens": tokens, "time": 0.0},
        {"event": "evaluation", "iteration": 8, "split": "test", "responses": 4, "tokens": 7, "time": 0.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    config = settings.parse(place.arguments(name, seed, BY_NAME[name].settings))
    (run / "config.yaml").write_text(settings.dump(config))
    (run / MADE_BY).write_text(json.dumps([{"commit": commit, "changed": commit[0] == "b", "date": "2026-01-02"}]))


@pytest.fixture
def place(tmp_path: Path) -> Ladder:
    """Two seeds of top_2, of random_2 and of top_2_above, one of likelihood_2."""
    made = Ladder(tmp_path / "ladder", LADDER_YAML, tmp_path / "outcomes.json")
    for seed in (1, 3):
        finished(made, "top_2", seed, [True, True, True, False])
        finished(made, "random_2", seed, [True, seed == 1, False, False], "b" * 40)
    finished(made, "top_2_above", 1, [True, True, True, True])
    finished(made, "likelihood_2", 3, [True, True, True, True])
    (made.directory / "top_2_5").mkdir()  # not finished
    return made


def test_results_compare_the_last_policies_over_the_seeds_that_both_have(place: Ladder) -> None:
    results = ladder_results.collect(place)
    rows = {row["name"]: row for row in results["rows"]}
    assert set(rows) == {"top_2", "random_2", "top_2_above", "likelihood_2"}
    top = rows["top_2"]
    assert top["seeds"] == [1, 3] and top["accuracy"] == {"mean": 75.0, "stderr": 0.0}
    assert set(top["paired"]) == {"reference", "difference", "stderr"}
    assert top["paired"]["reference"] == "random_2" and top["paired"]["difference"] == pytest.approx(37.5)
    assert rows["random_2"]["paired"] == {"reference": "continuous_25", "difference": None, "stderr": None}
    assert (top["responses"], top["tokens"], top["evaluation_tokens"], top["steps"]) == (64, 109, 7, 40)
    assert rows["random_2"]["tokens"] == 9, "it needs no PRM, so it pays for no step labels"
    assert top["commits"] == ["a" * 40] and rows["random_2"]["commits"] == ["b" * 40 + "+"]
    assert results["commits"] == ["a" * 40, "b" * 40 + "+"] and results["date"] == "2026-01-02"
    pairs = {(pair["row"], pair["reference"]): pair for pair in results["comparisons"]}
    assert pairs["top_2", "likelihood_2"]["seeds"] == [3] and pairs["top_2", "likelihood_2"]["difference"] == -25.0
    assert pairs["likelihood_2", "random_2"]["difference"] == 75.0
    assert ("continuous_25", "iterative_rft") not in pairs

    text = ladder_results.tables(results)
    assert "| PRM top-2 (`top_2`) | 2 | 75.0 ± 0.0 | random_2 | +37.5 ± " in text
    assert "| 64 | 109 | 7 | 40 | 45.3 / 59.2 |" in text
    assert "`top_2` − `likelihood_2` | 1 | -25.0 ± " in text and "`aaaaaaaaaaaa`, `bbbbbbbbbbbb+`" in text


def test_what_came_of_a_run_is_kept_where_the_run_is_gone(place: Ladder, tmp_path: Path) -> None:
    before = ladder_results.collect(place)
    shutil.rmtree(place.directory)
    place.directory.mkdir()
    assert ladder_results.collect(place) == before
    assert place.is_finished(BY_NAME["top_2"], 3) and not place.is_finished(BY_NAME["top_2"], 2)
    assert not ladder.work(place, [BY_NAME["top_2"]], [1, 3], 1) and not place.run("base", 1).exists(), "none is needed"
    finished(place, "likelihood_2", 1, [False] * 4)  # a new run joins the kept ones
    pairs = {(pair["row"], pair["reference"]): pair for pair in ladder_results.collect(place)["comparisons"]}
    assert pairs["likelihood_2", "random_2"]["seeds"] == [1, 3]
    other = tmp_path / "other.yaml"
    other.write_text(config_file(LADDER_YAML).read_text().replace("passes: 2 ", "passes: 3 "))
    elsewhere = Ladder(tmp_path / "nothing", str(other), place.outcomes)
    assert not ladder_results.collect(elsewhere)["rows"], "what other settings gave does not count"


def test_runs_of_different_questions_are_not_compared(place: Ladder) -> None:
    finished(place, "likelihood_2", 1, [True] * 5)
    with pytest.raises(ValueError, match="likelihood_2_1 .*measured on different questions"):
        ladder_results.collect(place)


def test_more_passes_until_as_many_tokens_are_generated(place: Ladder) -> None:
    finished(place, "continuous_25", 1, [True] * 4, tokens=40)  # top_2: 109
    more = place.settings_of(BY_NAME["continuous_25_more"], 1)
    assert more[-1] == "--evolve.passes=5.5", "2 passes * 109 / 40, in quarters"
    with pytest.raises(ValueError, match="continuous_25_3 first"):
        place.settings_of(BY_NAME["continuous_25_more"], 3)


def test_a_failed_run_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, began = Ladder(tmp_path, LADDER_YAML, tmp_path / "outcomes.json"), []

    def launch(self: Ladder, command: str, name: str, seed: int, more: tuple[str, ...]) -> None:
        began.append((name, seed))
        if (name, seed) == ("top_2", 1):
            raise subprocess.CalledProcessError(1, command)
        if (name, seed) == ("base", 3):
            raise RuntimeError("out of luck")
        if name == "base":
            self.run(name, seed).mkdir()
            (self.run(name, seed) / "config.yaml").write_text(
                settings.dump(settings.parse(self.arguments(name, seed, ())))
            )
        else:
            (self.run(name, seed) / "summary.json").write_text("{}")

    monkeypatch.setattr(Ladder, "launch", launch)
    written: list[int] = []

    def write(_: Ladder) -> None:
        written.append(1)
        raise KeyError("a question")

    rows = [BY_NAME[name] for name in ("top_2", "random_2")]
    failures = ladder.work(place, rows, [1, 2, 3], 1, write)
    assert began == [
        ("base", 1),
        ("base", 2),
        ("top_2", 1),
        ("random_2", 1),
        ("base", 3),
        ("top_2", 2),
        ("random_2", 2),
    ]
    names = [line.partition(":")[0] for line in failures]
    assert names == ["top_2, seed 1", "base, seed 3", "top_2, seed 3", "random_2, seed 3"]
    assert failures[1] == "base, seed 3: RuntimeError: out of luck"
    said = capsys.readouterr().out
    assert "top_2, seed 1: FAILED, exit code 1, see" in said and "results cannot be written: KeyError" in said
    assert len(written) == 3
    began.clear()
    ladder.work(place, rows, [1], 2)
    assert began == [("top_2", 1)], "what is finished stays, what failed is tried again"


def test_other_settings_do_not_mix_with_the_base_that_is_there(tmp_path: Path) -> None:
    place = Ladder(tmp_path, LADDER_YAML, tmp_path / "outcomes.json")
    base = place.run("base", 1)
    base.mkdir()
    (base / "done").touch()
    (base / "config.yaml").write_text(
        settings.dump(settings.parse([*place.arguments("base", 1, ()), "--prm.epochs=9"]))
    )
    with pytest.raises(ValueError, match=r"prm\.epochs"):
        place.make_base(1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_killed_ladder_leaves_no_run_behind(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(60)"
    program = (
        "import sys, pathlib, ladder_runs; from concurrent.futures import ThreadPoolExecutor\n"
        f"log = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "with ThreadPoolExecutor(1) as pool:\n"
        f"    pool.submit(ladder_runs.run_child, [sys.executable, '-c', {child!r}], log).result()"
    )
    place = str(Path(ladder_runs.__file__).parent)
    parent = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": place})
    try:
        wait_for(lambda: note.exists() and note.read_text().isdigit())
        pid = int(note.read_text())
        assert alive(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not alive(pid))


def alive(pid: int) -> bool:
    """Whether the process runs: one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: object) -> None:
    """Until it holds, two minutes at most: a busy machine imports slowly."""
    assert callable(condition)
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never held")


def write_validation(run: Path, right: int, of: int) -> None:
    """A finished run of which only the validation answers are read."""
    block = run / "rollouts/evaluation_0008_validation_greedy/block_00000.jsonl"
    block.parent.mkdir(parents=True)
    write_groups(block, [make_group([make_response(0, None, i < right)], f"q{i}") for i in range(of)])
    (run / "summary.json").write_text("{}")


def test_the_rates_are_chosen_on_validation_and_none_of_the_ladders_seeds(tmp_path: Path) -> None:
    place = Ladder(tmp_path, LADDER_YAML, tmp_path / "outcomes.json", ladder_rates.COMMON)
    rows = ladder_rates.candidates()
    assert len({row.name for row in rows}) == len(rows) and not {*ladder_rates.SEEDS} & {*ladder.DEFAULT_SEEDS}
    assert all(ladder.is_known(row, place) for row in rows)
    for row, (method, rate, passes) in rows.items():
        config = settings.parse(place.arguments(row.name, 51, row.settings))
        assert config.evolve.optimizer.lr == rate and (passes is None or config.evolve.passes == passes)
        assert config.data.validation_queries == 1500
        if method != "sft":
            write_validation(place.run(row.name, 51), 10 + round(rate * 1e5) if rate < 1e-4 else 5, 20)
    results = ladder_rates.collect(place)
    assert results["chosen"]["iterative_rft"]["rate"] == 4e-5 and "sft" not in results["chosen"]
    assert {run["method"] for run in results["runs"]} == {*ladder_rates.RATES} - {"sft"}
