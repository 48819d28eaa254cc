"""Bad input gets one clear message that names it and what to do, exit code 2, and leaves earlier results intact."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import Job, checkpoints, events_of

from mstar_mega import cli
from mstar_mega.config import Config, ParallelConfig

TINY = [
    *("--data.warmup_examples", "24", "--data.labelled_queries", "4", "--data.validation_queries", "2"),
    *("--data.test_queries", "2", "--data.unlabelled_queries", "2", "--warmup.epochs", "1"),
    *("--warmup.optimizer.batch_size", "8", "--run.checkpoint_every_steps", "1"),
]
"""A warm-up of three steps."""


def start(run_dir: Path, *extra: str, ranks: int = 1, command: str = "warmup", before: str = "") -> Job:
    return Job(run_dir, ranks, *TINY, *extra, command=command, before=before)


def refusal(job: Job) -> str:
    """The one message of a job that must end with exit code 2."""
    assert job.wait() == 2, job.output
    lines = [line for line in job.output.splitlines() if line.startswith("mstar: error: ")]
    assert len(lines) == 1 and "Traceback" not in job.output, job.output
    return lines[0].removeprefix("mstar: error: ")


def good(job: Job) -> str:
    assert job.wait() == 0, job.output
    return job.output


# ------------------------------------------------------------------------------------------------ images, questions


def spoil_the_data() -> None:
    """Before a job: the digits task makes its pictures, then some are damaged, as if it had been given them so."""
    from mstar_mega.data import types
    from mstar_mega.data.digits import task

    build = task.build

    def spoiled(config: object, dir: Path, seed: int) -> types.Task:
        made = build(config, dir, seed)  # type: ignore[arg-type]
        for chosen in (made.warmup[3][0], made.test[0]):
            os.truncate(chosen.images[0].path, 60)
        labelled = [*made.labelled[:-1], replace(made.labelled[-1], question="")]
        return replace(made, labelled=labelled)

    task.build = spoiled


def test_a_job_leaves_bad_queries_out_and_lists_them(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    output = good(start(run_dir, ranks=2, before="test_bad_input:spoil_the_data"))
    assert "WARNING: 3 queries are left out: query digits-warmup-000003 of the warm-up set" in output
    skipped = [event for event in events_of(run_dir) if event["event"] == "skipped"]
    assert [event["what"] for event in skipped] == [
        "query digits-warmup-000003 of the warm-up set",
        "query digits-train-000003 of the labelled set",
        "query digits-test-000000 of the test set",
    ]
    assert skipped[0]["where"].endswith("digits-warmup-000003.png") and skipped[1]["where"] == "question"
    steps = [event for event in events_of(run_dir) if event["event"] == "step"]
    assert sum(event["responses"] for event in steps) == 23
    (tested,) = [e for e in events_of(run_dir) if e["event"] == "evaluation" and e["split"] == "test"]
    assert tested["queries"] == 1
    good(start(run_dir, ranks=2, before="test_bad_input:spoil_the_data"))
    assert [event for event in events_of(run_dir) if event["event"] == "skipped"] == skipped, "listed once"


def spoil_all_tests() -> None:
    from mstar_mega.data.digits import task

    build = task.build
    task.build = lambda *arguments: replace(
        made := build(*arguments), test=[replace(query, answer=None) for query in made.test]
    )


def test_a_set_without_any_usable_query_stops_the_job(tmp_path: Path) -> None:
    message = refusal(start(tmp_path / "run", before="test_bad_input:spoil_all_tests"))
    assert "no query of the test set can be used (answer: there is no gold answer" in message


# ----------------------------------------------------------------------------------------------------------- settings


def test_an_unknown_setting_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evolve", "--evolve.intervall", "0.5"]) == cli.USER_ERROR == 2
    error = capsys.readouterr().err
    assert "unknown setting '--evolve.intervall'" in error and "'--evolve.interval'" in error


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        (ParallelConfig(tensor=3), "parallel.tensor 3 does not divide the model's 4 attention heads"),
        (ParallelConfig(tensor=4), "parallel.tensor 4 does not divide the model's 2 key-value heads"),
        (ParallelConfig(pipeline=3), "parallel.pipeline 3 does not divide the model's 4 layers"),
    ],
)
def test_sizes_that_do_not_divide_the_model(parallel: ParallelConfig, said: str) -> None:
    from mstar_mega.models.build import build_family, check_divisible

    config = Config(parallel=parallel)
    family = build_family(config)
    with pytest.raises(ValueError, match=said):
        check_divisible(config, family.vision, family.language)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parallel.tensor", "2"], "the job has 1 rank. Start a multiple of 2"),
        (["--parallel.pipeline", "0"], "parallel.pipeline is 0: it must be at least 1"),
        (["--parallel.sequence", "true"], "it needs parallel.tensor of at least 2"),
        (["--model.size", "huge"], "model.size 'huge' is not a size of internvl2"),
    ],
)
def test_impossible_sizes_stop_the_job_before_it_writes(tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in refusal(start(tmp_path / "run", *arguments))
    assert not (tmp_path / "run").exists()


def test_a_budget_that_the_warmup_uses_up_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    message = refusal(start(tmp_path / "run", "--evolve.max_steps", "3", command="evolve"))
    assert "evolve.max_steps 3 includes the warm-up's 3 steps" in message and "use more than 3, or 0" in message
    assert not (tmp_path / "run/checkpoints").exists()


def test_more_ranks_than_queries_in_a_step_is_no_mistake(tmp_path: Path) -> None:
    """A step of one response at two ranks: one of them has nothing to train on."""
    good(start(tmp_path / "run", "--warmup.optimizer.batch_size", "1", "--data.warmup_examples", "3", ranks=2))


# ------------------------------------------------------------------------------------------------------ run directory


def files_of(run_dir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.name != ".lock" and "tensorboard" not in path.parts
    }


def test_other_settings_are_shown_and_refused_unless_told(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    good(start(run_dir))
    before = files_of(run_dir)
    changed = ("--warmup.optimizer.lr", "0.002", "--seed", "7")
    message = refusal(start(run_dir, *changed, ranks=2))
    assert "seed: 0 -> 7" in message and "warmup.optimizer.lr: 0.003 -> 0.002" in message
    assert f"--config {run_dir / 'config.yaml'}" in message and "--run.allow_changed_settings true" in message
    everything = [f"--warmup.optimizer.{name}=0.125" for name in ("lr", "decay_share", "beta1", "beta2", "eps")]
    everything += [f"--evolve.optimizer.{name}=0.125" for name in ("lr", "decay_share", "beta1", "beta2", "eps")]
    message = refusal(start(run_dir, *everything))
    assert message.count(" -> ") == 6 and "; and 4 others. " in message
    assert files_of(run_dir) == before
    good(start(run_dir, "--evolve.responses", "3", "--run.allow_changed_settings", "true"))
    assert "responses: 3" in (run_dir / "config.yaml").read_text()
    assert refusal(start(run_dir)).count("evolve.responses: 3 -> 8") == 1


def test_a_cut_settings_file_is_told(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    good(start(run_dir))
    config = run_dir / "config.yaml"
    os.truncate(config, config.stat().st_size - 30)
    assert f"{config} is cut off" in refusal(start(run_dir))


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refusal(start(tmp_path / "file" / "run", ranks=2))
    assert f"run.dir {tmp_path / 'file' / 'run'} cannot be used: Not a directory" in message
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = start(run_dir, "--warmup.epochs", "100")
    assert first.run_until(lambda run_dir: any(event["event"] == "step" for event in events_of(run_dir))), first.output
    pid = first.processes[0].pid
    assert f"{run_dir} is in use by another job (process {pid} on " in refusal(start(run_dir, "--warmup.epochs", "100"))
    assert first.running
    first.kill()
    third = start(run_dir, "--warmup.epochs", "100")
    assert third.run_until(lambda _: "train warmup" in third.output), third.output
    third.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of a given size, which can be made larger later."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode:
            pytest.skip("this user cannot mount a small disk; each writer has its own test with a simulated one")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("size", ["100k", "4m", "14m"])
def test_a_full_disk_stops_the_job_and_costs_nothing_that_was_done(
    small_disk: Callable[[str], Path], size: str
) -> None:
    """Full while pictures, the first checkpoint, a later checkpoint are written; then there is room again."""
    run_dir = small_disk(size) / "run"
    first = start(run_dir, "--data.warmup_examples", "40")
    assert first.wait() == 2, first.output
    (message,) = [line for line in first.output.splitlines() if line.startswith("mstar: error: ")]
    assert "disk is full" in message
    kept = checkpoints(run_dir, "warmup")
    assert bool(kept) == (size == "14m"), (kept, message)
    assert not list(run_dir.rglob("checkpoints/*/.*"))
    small_disk("64m")
    output = good(start(run_dir, "--data.warmup_examples", "40"))
    assert ("Resuming" in output) == bool(kept)
    steps = [event["step"] for event in events_of(run_dir) if event["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5]


# ----------------------------------------------------------------------------------------------------------- training


def test_nothing_selected_goes_on_and_a_barren_pass_ends_the_run(tmp_path: Path) -> None:
    extra = ("--selection.rule", "threshold", "--selection.threshold", "1.0", "--evolve.passes", "5",
             "--annotate.queries", "2", "--prompts.unlabelled", "none")  # fmt: skip
    output = good(start(tmp_path / "run", *extra, command="evolve"))
    assert "iteration 1: NO RESPONSE SELECTED, nothing is trained" in output
    assert "Stopping: 2 iterations in a row (a whole pass over the queries) selected no response" in output
    events = events_of(tmp_path / "run")
    improved = [event for event in events if event["event"] == "improve"]
    assert [(event["steps"], event["loss"]) for event in improved] == [(0, None)] * 2
    assert events[-1]["event"] == "stage" and events[-1]["stage"] == "total"


def test_a_loss_that_is_not_finite_saves_the_state_before_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    message = refusal(start(run_dir, "--warmup.optimizer.lr", "1e30", ranks=2))
    assert "warmup training stopped at iteration 0, step " in message
    assert "loss nan" in message or "gradient norm" in message
    assert str(run_dir / "checkpoints/warmup_failed") in message and "warmup.optimizer.lr" in message
    taken = [event["step"] for event in events_of(run_dir) if event["event"] == "step"]
    assert checkpoints(run_dir, "warmup_failed") == [f"iteration_0000_step_{len(taken):06d}"]
    assert taken == list(range(1, len(taken) + 1)) and len(taken) < 3
    again = refusal(start(run_dir, "--warmup.optimizer.lr", "1e30", ranks=2))
    assert again == message, "the same command comes to the same end"


def test_random_arguments_never_end_in_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    random_number = random.Random(3)
    names = ["--seed", "--evolve.interval", "--parallel.tensor", "--evol", "-x", "", "--run.dir", "--config", "train"]
    values = ["", "-1", "nan", "1e999", "0", "[]", "{", "null", "ü", "--", "'"]
    for _ in range(60):
        argv = [random_number.choice([*names, *values]) for _ in range(random_number.randint(1, 4))]
        code = cli.main(["warmup", "--parallel.tensor", "0", *argv, "--parallel.tensor", "0"])
        assert code == 2 and capsys.readouterr().err.startswith("mstar: error: ")


def test_a_finished_stage_says_that_it_trains_nothing_more(tmp_path: Path) -> None:
    good(start(tmp_path / "run"))
    again = ("--warmup.epochs", "2", "--run.allow_changed_settings", "true")
    output = good(start(tmp_path / "run", *again))
    assert "WARNING: warmup ended after 3 steps, and the settings now ask for 6: it is finished and trains" in output
    assert checkpoints(tmp_path / "run", "warmup")[-1].endswith("000003")
    output = good(start(tmp_path / "run", "--warmup.epochs", "2", "--prm.epochs", "3", *again[2:]))
    assert "goes on with other settings: prm.epochs: 1.0 -> 3.0. What is finished stays" in output
