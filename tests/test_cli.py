"""The ``mstar`` command, its words for mistakes, the launcher that is valid in two languages, and the package links."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import mstar_mega.recipe
from mstar_mega import cli, settings
from mstar_mega.config import Config, ParallelConfig

REPO = Path(__file__).parents[1]
LAUNCHER = REPO / "examples" / "pretrain_mstar.sh"
BENCHMARK = ["--benchmark", "mmmu", "--data", "none.tsv", "--out", "none"]
TORCHRUN = Path(sys.executable).with_name("torchrun")


class FakeJob(types.ModuleType):
    """Stands in for ``mstar_mega.recipe.job``: keeps what it is called with, raises what it is told to."""

    def __init__(self) -> None:
        super().__init__("mstar_mega.recipe.job")
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def _called(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error

    run = evaluate = generate = _called


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> FakeJob:
    fake = FakeJob()
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(mstar_mega.recipe, "job", fake, raising=False)
    for name in ("RANK", "TORCHELASTIC_ERROR_FILE", "MSTAR_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text(settings.dump(Config(seed=5)), encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("command", "until"), [("evolve", None), ("warmup", "warmup"), ("annotate", "annotate"), ("train-prm", "prm")]
)
def test_the_jobs_commands_run_it_until_their_stage(
    job: FakeJob, command: str, until: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--seed", "3", "--evolve.method", "rest_em"]) == 0
    config = Config(seed=3)
    config.evolve.method = "rest_em"
    assert job.calls == [(config, until)] and "without --config" in capsys.readouterr().err
    (tmp_path / "a.yaml").write_text("seed: 3\n")
    assert cli.main([command, "--config", str(tmp_path / "a.yaml"), "--evolve.method", "rest_em"]) == 0
    assert job.calls[1] == job.calls[0] and "without --config" not in capsys.readouterr().err


def test_evaluate_and_generate_take_the_runs_own_settings(job: FakeJob, run_dir: Path) -> None:
    expected = Config(seed=5)
    expected.run.dir = str(run_dir)
    expected.generation.slots = 4
    image = str(run_dir / "config.yaml")
    assert cli.main(["evaluate", str(run_dir), "--generation.slots", "4"]) == 0
    arguments = ["--question", "How many?", "--image", image, "--responses", "2", "--temperature", "0"]
    assert cli.main(["generate", str(run_dir), *arguments, "--generation.slots=4"]) == 0
    assert job.calls == [(expected,), (expected, "How many?", [image], 2, 0.0)]


@pytest.mark.parametrize("ranks", ["1", "3", "4", None])
def test_a_look_at_a_run_cut_for_more_ranks_takes_whole_copies(
    job: FakeJob,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ranks: str | None,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    config = Config(parallel=ParallelConfig(tensor=2, pipeline=2, sequence=True, distributed_optimizer=True))
    (run_dir / "config.yaml").write_text(settings.dump(config), encoding="utf-8")
    benchmark = types.ModuleType("mstar_mega.recipe.benchmark")
    benchmark.__dict__.update(settings_of=settings.load, Request=lambda *_: None, evaluate=job.evaluate)
    monkeypatch.setitem(sys.modules, benchmark.__name__, benchmark)
    monkeypatch.setattr(mstar_mega.recipe, "benchmark", benchmark, raising=False)
    whole = ParallelConfig(distributed_optimizer=True)
    for arguments in (
        ["evaluate", str(run_dir)],
        ["generate", str(run_dir), "--question", "?"],
        ["evaluate", "--checkpoint", str(run_dir), "--benchmark", "mathvista", "--data", "none", "--out", "none"],
    ):
        assert cli.main(arguments) == 0
        said = capsys.readouterr().err
        assert job.calls.pop()[0].parallel == (config.parallel if ranks == "4" else whole)
        if ranks == "4":
            assert said == ""
        else:
            assert said.count("\n") == 1 and "tensor 2 x pipeline 2 needs a multiple of 4 ranks" in said
        # A layout of the user's own stays as it is, and is refused later where it cannot be.
        assert cli.main([*arguments, "--parallel.pipeline=1"]) == 0
        assert job.calls.pop()[0].parallel.tensor == 2 and capsys.readouterr().err == ""
    assert cli.main(["evolve", "--parallel.tensor", "2"]) == 0
    assert job.calls.pop()[0].parallel.tensor == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["evolv"], "there is no command 'evolv': did you mean 'evolve'? If not, choose one of init, evolve, warmup"),
        (["evolve", "--sed", "1"], "unknown setting '--sed' on the command line; did you mean '--seed'?"),
        (["evolve", "--evolve.interval", "2"], "evolve.interval is 2.0: it must be above 0 and at most 1"),
        (["evaluate"], "the following arguments are required: RUN_DIR ('mstar evaluate --help' shows"),
        (["evaluate", "--seed", "1", "{run}"], "RUN_DIR comes first: mstar evaluate RUN_DIR ..."),
        (["evaluate", "{run}", "--sed", "1"], "unknown setting '--sed'"),
        (["evaluate", "{run}/none"], "none is not the directory of a run"),
        (["evaluate", "--checkpoint", "{run}"], "required: --benchmark, --data, --out"),
        (["evaluate", "--checkpoint", "{run}", *BENCHMARK, "--limit", "0"], "--limit is 0: it must be at least 1"),
        (["evaluate", "--checkpoint", "{run}", *BENCHMARK, "--responses", "0"], "--responses is 0: it must be"),
        (["score"], "required: --benchmark, --data, --predictions, --out"),
        (["score", *BENCHMARK, "--predictions", "p"], "there is no benchmark 'mmmu': choose one of mathvista, m3cot"),
        (["score", *BENCHMARK, "--predictions", "p", "--rules", "mine"], "invalid choice: 'mine'"),
        (["generate", "{run}"], "required: --question"),
        (["generate", "{run}", "--question", "?", "--image", "none.png"], "--image none.png: there is no such file"),
        (["generate", "{run}", "--question", "?", "--responses", "0"], "--responses is 0: it must be at least 1"),
        (["generate", "{run}", "--question", "?", "--temperature", "-1"], "--temperature is -1.0: it must be"),
        (["report", "{run}/none"], "none is not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    job: FakeJob, run_dir: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert cli.main([argument.replace("{run}", str(run_dir)) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("mstar: error: ") and said in captured.err
    assert job.calls == []


def test_other_ranks_are_quiet_but_leave_the_cause_for_torchrun(
    job: FakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    job.error = ValueError("image 7\nis cut off")
    assert cli.main(["evolve"]) == 2
    assert cli.main(["evolve", "--help"]) == cli.main(["--help"]) == 0
    assert capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "image 7 is cut off"


def test_a_full_disk_is_the_users_and_a_bug_is_not(
    job: FakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.error = OSError(errno.ENOSPC, "cannot write a.jsonl: the disk is full")
    assert cli.main(["evolve"]) == 2
    assert capsys.readouterr().err.endswith("task\nmstar: error: cannot write a.jsonl: the disk is full\n")
    for error in (RuntimeError("shapes"), OSError(errno.EBADF, "broken"), AssertionError()):
        job.error = error
        with pytest.raises(type(error)):
            cli.main(["evolve"])
    job.error = ValueError("mistake")
    monkeypatch.setenv("MSTAR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="mistake"):
        cli.main(["evolve"])


def test_a_reader_that_has_seen_enough_gets_no_traceback(tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("model: {family: internvl2, checkpoint: weights}\n")
    command = f"{sys.executable} -m mstar_mega.cli plan --config {settings} --gpus 8 --memory 80GB"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == cli.BROKEN_PIPE and "Traceback" not in done.stderr, done.stderr


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    program = "import sys; from mstar_mega.cli import main; main(['--help']); main(['evolve', '--sed', '1'])"
    program += "; sys.exit(bool({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True)
    for command in cli.COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("how", ["bash", "torchrun"])
def test_the_launcher_is_bash_and_python(how: str, tmp_path: Path) -> None:
    """Both start two ranks of ``mstar evolve`` from any directory; one of them prints."""
    dropped = ("RANK", "WORLD_SIZE", "VIRTUAL_ENV", "CONDA_PREFIX")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"TORCHRUN": str(TORCHRUN), "NPROC": "2", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    torchrun = [str(TORCHRUN), "--standalone", "--nproc-per-node", "2"]
    command = ["bash"] if how == "bash" else torchrun
    done = subprocess.run(
        [*command, str(LAUNCHER), "--seed", "12", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: mstar evolve") == 1
    # The digits config is taken where no other is given.
    digits = settings.parse(["--config", str(LAUNCHER.parent / "configs" / "digits.yaml")])
    assert f"default: {digits.data.warmup_examples})" in " ".join(done.stdout.split())


def test_the_launcher_says_what_to_do_without_an_environment(tmp_path: Path) -> None:
    copy = tmp_path / "examples" / LAUNCHER.name
    copy.parent.mkdir()
    copy.write_text(LAUNCHER.read_text())
    done = subprocess.run(
        ["bash", str(copy)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2 and "run 'make setup' first" in done.stderr


SBATCH = LAUNCHER.parent / "slurm" / "mstar.sbatch"
STUBS = {
    # In place of srun: its options, then what it would start on the first node; python shows what it is given.
    "srun": 'printf "%s\\n" "$@"; while [ "$1" != bash ]; do shift; done; SLURM_NODEID=0 SLURM_NNODES=4994 exec "$@"',
    "scontrol": 'case $2 in job) echo "JobId=7 JobState=RUNNING";; hostnames) printf "node%s\\n" $(seq 7 5000);;'
    ' *) echo "scontrol $*";; esac',
    "env/bin/python": 'printf "%s\\n" python "$@"; exit "${CODE:-0}"',
    "env/bin/torchrun": "",
}


def batch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """SLURM runs a copy of the script, with stubs for its commands."""
    for name, body in STUBS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "slurm_script").write_text(SBATCH.read_text())
    of_slurm = {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(REPO), "MSTAR_ENV": str(folder / "env"),
        "SLURM_JOB_NODELIST": "node[7-5000]", "SLURM_JOB_NUM_NODES": "4994", "SLURM_JOB_ID": "41234",
        "SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "1",
    }  # fmt: skip
    command = ["bash", str(folder / "slurm_script"), *arguments]
    return subprocess.run(command, env=of_slurm | environment, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("task", [None, "2"])
def test_the_slurm_script_starts_one_launcher_on_every_node(task: str | None, tmp_path: Path) -> None:
    """%a is an array task's number."""
    array = {"SLURM_ARRAY_TASK_ID": task} if task else {}
    more = {"MSTAR_SRUN": "--container-image=a.sqsh --mpi=none", **array}
    done = batch(tmp_path, "--seed", "%a", "--run.dir", "a b/%a", **more)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    options = said[: said.index("bash")]
    assert {"--nodes=4994", "--ntasks=4994", "--ntasks-per-node=1", "--gres=gpu:8", "--mpi=none"} <= set(options)
    assert said[said.index("python") + 1 :] == [
        "-m", "mstar_mega.launch", "--nnodes", "4994", "--node-rank", "0", "--master-addr", "node7",
        "--master-port", str(20000 + 41234 % 12000), "--nproc-per-node", "8", "--max-restarts", "0", str(LAUNCHER),
        "--seed", task or "%a", "--run.dir", f"a b/{task or '%a'}",
    ]  # fmt: skip
    assert "4994 nodes, 8 processes on" in done.stderr
    assert "--gres" not in batch(tmp_path, SLURM_GPUS_PER_NODE="8").stdout, "they were asked for"


def test_the_slurm_script_says_what_is_missing_on_a_node(tmp_path: Path) -> None:
    refused = batch(tmp_path, MSTAR_ENV=str(tmp_path))
    assert refused.returncode == 2 and "run make setup in" in refused.stderr
    refused = batch(tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert refused.returncode == 2 and "submit from there or set MSTAR_REPO" in refused.stderr
    (tmp_path / "modules.sh").write_text("export CODE=3\n")
    assert batch(tmp_path, MSTAR_SETUP=str(tmp_path / "modules.sh")).returncode == 3
    assert batch(tmp_path, MSTAR_SETUP="none.sh").returncode == 2


def test_the_slurm_script_goes_back_into_the_queue_when_there_is_more_to_do(tmp_path: Path) -> None:
    again = batch(tmp_path, CODE="75", MSTAR_ENDED="0")
    assert again.returncode == 75 and "scontrol requeue 41234" in again.stdout
    often = ({"SLURM_RESTART_COUNT": "20"}, {"MSTAR_REQUEUE": "1"})
    cases: list[tuple[str, dict[str, str]]] = [("2", {}), ("1", {}), ("0", {}), *(("75", each) for each in often)]
    for code, more in cases:
        ended = batch(tmp_path, CODE=code, **more)
        assert ended.returncode == int(code) and "requeue" not in ended.stdout
        assert ("submit the same command to go on" in ended.stderr) == (code == "75")


def test_top_level_rooms_import_under_the_packages_name() -> None:
    for name in ("kernels", "checkpoint_tools"):
        spec = importlib.util.find_spec(f"mstar_mega.{name}")
        assert spec is not None and spec.origin is not None
        assert Path(spec.origin).resolve() == REPO / name / "__init__.py"
