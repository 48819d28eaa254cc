"""Killed anywhere, resumed exactly: the same command ends with the same log, responses and weights, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import (
    ROOT,
    SMALLER,
    TIMEOUT_S,
    Job,
    checkpoints,
    copy_run,
    events_of,
    finish,
    flip_a_bit,
    go_back,
    outcome,
)
from resumed import assert_equal, check_recipe, check_refresh, ended_within, exists, groups_of, logged

from mstar_mega.data.records import read_seconds
from mstar_mega.report.metrics import read_metrics
from mstar_mega.report.run import load_run
from mstar_mega.report.samples import collect_samples

EXHAUSTIVE = int(os.environ.get("MSTAR_RESUME_ROUNDS", "0"))
"""Further rounds of kills at random times, for each number of processes."""

_finished: dict[int, Path] = {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """An uninterrupted run at a number of processes, made when first asked for. Not to be changed."""

    def make(world_size: int) -> Path:
        if world_size not in _finished:
            directory = tmp_path_factory.mktemp(f"whole{world_size}") / "run"
            finish(directory, world_size)
            steps = [event for event in events_of(directory) if event["event"] == "step"]
            assert {event["stage"] for event in steps} == {"warmup", "prm", "evolve"}, "a stage that trains nothing"
            assert any("step_000004" in name for name in checkpoints(directory, "evolve")), "no save inside iterations"
            _finished[world_size] = directory
        return _finished[world_size]

    return make


# ------------------------------------------------------------------------------- a whole run, held against the recipe


def test_a_whole_run_is_the_recipe(whole: Callable[[int], Path]) -> None:
    check_recipe(whole(1))


# ---------------------------------------------------------------------------------------------------- kill -9, anywhere


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "data making": exists("data/images/digits-warmup-0001*.png"),
    "warm-up": logged(event="step", stage="warmup", step=13),
    "checkpoint writing": exists("checkpoints/warmup/.iteration_0000_step_0000[23]*.tmp/*"),
    "annotation": exists("rollouts/annotate/block_*.jsonl"),
    "PRM training": logged(event="step", stage="prm", step=2),
    "PRM quality": logged(event="prm_quality"),
    "sweep": exists("rollouts/temperature_0001_0.50/block_*.jsonl"),
    "generation": exists("rollouts/iteration_0001/block_*.jsonl"),
    "improve": logged(2, event="step", stage="evolve", iteration=1),
    "evaluation": exists("rollouts/evaluation_0001_validation_sampled/block_*.jsonl"),
    "second iteration": logged(event="generation", iteration=2),
    "improve again": logged(event="step", stage="evolve", iteration=2),
    "end of evolving": logged(event="stage", stage="evolve"),
    "report": logged(event="stage", stage="total"),
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_kill_9_in_every_stage(tmp_path: Path, whole: Callable[[int], Path], world_size: int) -> None:
    expected = whole(world_size)
    random_number = random.Random(f"kills {world_size}")
    run_dir = tmp_path / "run"
    # All moments with one process; with two, where starts cost twice, one of each kind of work.
    for name in MOMENTS if world_size == 1 else ("warm-up", "annotation", "generation", "improve again", "report"):
        job = Job(run_dir, world_size)
        assert job.run_until(MOMENTS[name]), f"{name} was never seen:\n{job.output}"
        time.sleep(random_number.choice([0.0, 0.0, 0.02, 0.1]))
        job.kill(random_number.choice([None, *range(world_size)]))
    finish(run_dir, world_size)
    assert_equal(run_dir, expected)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("round", range(EXHAUSTIVE))
def test_kill_9_at_random_times(tmp_path: Path, whole: Callable[[int], Path], world_size: int, round: int) -> None:
    expected = whole(world_size)
    random_number = random.Random(f"times {world_size} {round}")
    run_dir = tmp_path / "run"
    for _ in range(100):
        job = Job(run_dir, world_size)
        if ended_within(job, random_number.expovariate(1 / 6.0)):
            assert job.wait() == 0, job.output
            break
        job.kill(random_number.choice([None, *range(world_size)]))
    assert_equal(run_dir, expected)


def test_one_rank_killed_under_torchrun(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """The real command: torchrun ends the other rank, nothing hangs, and the same command finishes the run."""
    run_dir = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "examples/pretrain_mstar.sh"), *SMALLER, "--run.dir", str(run_dir)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while not logged(event="step", stage="warmup", step=6)(run_dir):
        assert first.poll() is None and time.monotonic() < deadline, "the job made no progress"
        time.sleep(0.05)
    ranks = [p for p in psutil.Process(first.pid).children() if p.environ().get("RANK") == "1"]
    assert len(ranks) == 1
    os.kill(ranks[0].pid, signal.SIGKILL)
    assert first.wait(TIMEOUT_S) != 0
    assert subprocess.run(command, capture_output=True, timeout=TIMEOUT_S).returncode == 0
    assert_equal(run_dir, whole(2))


def test_another_number_of_processes_goes_on(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    run_dir = copy_run(whole(1), tmp_path / "run")
    go_back(run_dir, "evolve", "iteration_0001_step_000004")
    output = finish(run_dir, 2)
    assert "Resuming" in output and "WARNING" not in output, output  # iteration 1's responses are taken as they are
    assert "the layout is tensor 1, pipeline 1, data 2, sequence False" in output

    def names(run_dir: Path) -> list[tuple[Any, ...]]:
        keys = ("event", "stage", "iteration", "step")
        return [tuple(map(event.get, keys)) for event in events_of(run_dir) if event["event"] != "run"]

    assert names(run_dir) == names(whole(1))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["accuracy"]["final"] is not None
    assert summary["parallel"] == {"tensor": 1, "pipeline": 1, "data": 2}, "of the newest start"


def test_a_method_that_starts_over_resumes_too(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """ReST-EM takes the warm-up weights and a new optimizer at the start of each iteration, and only there."""
    method = ("--evolve.method", "rest_em", "--evolve.interval", "0.5", "--run.allow_changed_settings", "true")
    reference = copy_run(whole(1), tmp_path / "reference")
    shutil.rmtree(reference / "checkpoints/evolve")
    finish(reference, 1, *method)
    origins = [json.loads((reference / f"rollouts/iteration_000{i}/origin.json").read_text()) for i in (1, 2)]
    assert origins[0]["drawn_by"] != origins[1]["drawn_by"], "the policy that was trained generates, not the warm-up's"
    run_dir = copy_run(reference, tmp_path / "run")
    go_back(run_dir, "evolve", "iteration_0001_step_000004")
    assert "Resuming" in finish(run_dir, 1, *method)
    assert_equal(run_dir, reference)


def test_a_finished_run_stays_as_it_is(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    run_dir = copy_run(whole(1), tmp_path / "run")
    (run_dir / "report.html").unlink()
    before = {
        path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "tensorboard" not in str(path)
    }
    assert "done already" in finish(run_dir)
    for part in ("warmup", "annotate", "train-prm"):
        job = Job(run_dir, 1, command=part)
        assert job.wait() == 0 and "done already" in job.output
    assert (run_dir / "report.html").exists()
    assert {path: path.read_bytes() for path in before if path.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }


# ------------------------------------------------------------------------------------------------- damage, at any place


def test_every_damaged_file_is_named_and_made_again(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """The last state of every stage, and responses of every kind, at once."""
    run_dir = copy_run(whole(1), tmp_path / "run")
    damaged = [
        run_dir / "checkpoints" / stage / checkpoints(run_dir, stage)[-1] for stage in ("warmup", "prm", "evolve")
    ]
    for path in damaged:
        flip_a_bit(next(path.glob("*.distcp")))
    of_iteration = ("annotate/block_00001", "iteration_0002/block_00002", "evaluation_0000_test_greedy/block_00000")
    blocks = [run_dir / "rollouts" / f"{name}.jsonl" for name in of_iteration]
    for path in blocks:
        os.truncate(path, path.stat().st_size // 2)
    (run_dir / "rollouts/annotate/.block_00000.jsonl.77.tmp").write_text("half")
    (run_dir / "checkpoints/evolve/.iteration_0009_step_000000.tmp").mkdir()
    with open(run_dir / "metrics.jsonl", "ab") as log:
        log.write(b'{"event": "half')
    output = finish(run_dir)
    for path in [*damaged, *blocks]:
        assert str(path) in output, (path, output)
    assert_equal(run_dir, whole(1))


def test_lost_responses_take_the_run_back_to_the_iterations_start(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """Inside an iteration the weights that drew its responses are gone: others must not draw the lost ones."""
    run_dir = copy_run(whole(1), tmp_path / "run")
    go_back(run_dir, "evolve", "iteration_0001_step_000004")
    flip_a_bit(run_dir / "rollouts/iteration_0001/block_00001.jsonl")
    output = finish(run_dir)
    assert "iteration_0001_step_000004 cannot be used" in output and "block_00001.jsonl" in output
    assert_equal(run_dir, whole(1))


def test_an_early_stage_made_again_keeps_its_place_in_the_log(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """The PRM is lost while evolving is ahead; then evolving is lost, and the PRM made again is the newest state."""
    run_dir = copy_run(whole(1), tmp_path / "run")
    flip_a_bit(next((run_dir / "checkpoints/prm" / checkpoints(run_dir, "prm")[-1]).glob("*.distcp")))
    shutil.rmtree(run_dir / "checkpoints/evolve" / checkpoints(run_dir, "evolve")[-1])
    job = Job(run_dir)
    assert job.run_until(lambda run_dir: len(list((run_dir / "checkpoints/evolve").glob("iteration_0003*"))) == 1)
    job.kill()
    shutil.rmtree(run_dir / "checkpoints/evolve")
    finish(run_dir)
    assert_equal(run_dir, whole(1))


def test_only_what_is_needed_is_kept(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """One checkpoint is kept, and inside an iteration its start as well."""
    run_dir = copy_run(whole(1), tmp_path / "run")
    go_back(run_dir, "evolve", "iteration_0002_step_000000")
    seen: list[list[str]] = []

    def watch(run_dir: Path) -> bool:
        seen.append(checkpoints(run_dir, "evolve"))
        return "iteration_0003_step_000000" in seen[-1]

    extra = ("--run.keep_checkpoints", "1", "--run.checkpoint_every_steps", "1", "--run.allow_changed_settings", "true")
    job = Job(run_dir, 1, *extra)
    assert job.run_until(watch) and job.wait() == 0, job.output
    inside = [names for names in seen[:-1] if "iteration_0002_step_000002" in names]
    assert inside and all("iteration_0002_step_000000" in names for names in inside)
    assert min(map(len, inside)) == 2, "no more than these two"
    assert checkpoints(run_dir, "evolve") == ["iteration_0003_step_000000"]


def test_a_damaged_line_in_the_log_is_named_and_costs_no_work(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    run_dir = copy_run(whole(1), tmp_path / "run")
    log = run_dir / "metrics.jsonl"
    content = log.read_bytes()
    lines = content.split(b"\n")
    log.write_bytes(b"\n".join([*lines[:6], lines[6][:20], *lines[7:]]))
    job = Job(run_dir)
    assert job.wait() == 0
    assert f"{log}, line 7: not JSON" in job.output and "everything is done already" in job.output
    events, before = read_metrics(log), [json.loads(line) for line in lines[:-1]]
    assert events.pop(6)["event"] == "damaged" and events == before[:6] + before[7:]


def test_selected_responses_and_times_outlive_a_resume(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    run_dir = copy_run(whole(1), tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / "evolve")
    finish(run_dir)
    again = json.loads((run_dir / "summary.json").read_text())

    def took(directories: str, part: str) -> float:
        """What the blocks say of themselves; none was sampled again."""
        blocks = run_dir.glob(f"rollouts/{directories}/block_*")
        return sum(read_seconds(block)[part] for block in blocks)

    scoring = took("iteration_*", "score")
    sampled = {"annotate": took("annotate", "all"), "generate": took("iteration_*", "all") - scoring}
    for phase, seconds in {**sampled, "score": scoring, "temperature": took("temperature_*", "all")}.items():
        assert again["seconds"][phase] > seconds - 0.01 > 0, phase
    run = load_run(run_dir)
    run.settings["report"]["samples_per_iteration"] = 1000
    samples = collect_samples(run).iterations
    shown = [r["selected"] for i in samples for query in i["queries"] for r in query["responses"]]
    assert sum(shown) == again["responses_selected"] > 0


def test_a_log_that_was_cut_is_told(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    run_dir = copy_run(whole(1), tmp_path / "run")
    log = run_dir / "metrics.jsonl"
    log.write_bytes(b"\n".join(log.read_bytes().split(b"\n")[:9]) + b"\n")
    job = Job(run_dir, 2)
    assert job.wait() == 2
    assert "has 9 events, but the checkpoint was written after event" in job.output, job.output


# ---------------------------------------------------------------------------------------------- the PRM's refreshes

REFRESH = (
    *("--prm.refresh_every", "1", "--run.checkpoint_every_steps", "2", "--run.keep_checkpoints", "100"),
    *("--run.allow_changed_settings", "true"),
)
REFRESH_MOMENTS: dict[str, Callable[[Path], bool]] = {
    "annotation": exists("rollouts/annotate_0001/block_*.jsonl"),
    "training": exists("checkpoints/prm_0001/iteration_0001_step_000002"),
    "what it has gained": logged(event="prm_quality", stage="refresh"),
    "behind it": exists("checkpoints/evolve/iteration_0002_step_000002"),
}


def test_kill_9_around_a_refresh_of_the_prm(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """Also behind it, where the refreshed PRM is lost and the policy that labelled for it is gone."""
    expected = copy_run(whole(1), tmp_path / "expected")
    go_back(expected, "evolve", "iteration_0002_step_000000")
    run_dir = copy_run(expected, tmp_path / "run")
    finish(expected, 1, *REFRESH)
    check_refresh(expected)
    for name, moment in REFRESH_MOMENTS.items():
        job = Job(run_dir, 1, *REFRESH)
        assert job.run_until(moment), f"{name} was never seen:\n{job.output}"
        job.kill()
    last = checkpoints(run_dir, "evolve")[-1]
    for path in (run_dir / "checkpoints/prm_0001").glob("*/*.distcp"):
        flip_a_bit(path)
    output = finish(run_dir, 1, *REFRESH)
    assert "DAMAGED CHECKPOINT" in output and f"{last} cannot be used: it needs the PRM in" in output, output
    assert_equal(run_dir, expected)


def test_a_run_with_another_runs_prm_ends_as_that_run(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """From the same warm-up, nothing annotated, nothing trained; resumed in the middle too."""
    run_dir = copy_run(whole(1), tmp_path / "run")
    for path in (run_dir / "checkpoints/prm", run_dir / "checkpoints/evolve", run_dir / "rollouts"):
        shutil.rmtree(path)
    extra = ("--prm.checkpoint", str(whole(1)), "--run.allow_changed_settings", "true")
    job = Job(run_dir, 1, *extra)
    assert job.run_until(exists("checkpoints/evolve/iteration_0001_step_000004")), job.output
    job.kill()
    told = f"the PRM is {whole(1)}: nothing is annotated, and no PRM is trained"
    assert told in job.output and told not in finish(run_dir, 1, *extra), "once"
    assert not (run_dir / "rollouts/annotate").exists() and not (run_dir / "checkpoints/prm").exists()
    for number in (1, 2):
        groups, wanted = (groups_of(d / f"rollouts/iteration_{number:04d}") for d in (run_dir, whole(1)))
        assert [group.responses for group in groups] == [group.responses for group in wanted], "tokens and scores"
    assert outcome(run_dir)[2] == outcome(whole(1))[2], "and so are the weights in the end"
    qualities = [e["iteration"] for e in events_of(run_dir) if e["event"] == "prm_quality"]
    assert qualities == [0, 1, 2], "on validation queries, from the start"
    job = Job(run_dir, 1, *extra, command="train-prm")
    assert job.wait() == 0 and "done already" in job.output
