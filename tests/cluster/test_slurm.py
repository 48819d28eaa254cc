"""The shipped batch script on a real SLURM: ``make cluster-test``; MSTAR_CLUSTER=quick runs the quick checks alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import BRIEF, ROOT, SMALLER, events_of, outcome
from slurm import Cluster, cluster, missing

# Only when asked: three daemons and their nodes on a busy machine are late for other reasons than ours.
_asked = os.environ.get("MSTAR_CLUSTER", "")
_reason = (
    f"no SLURM on this machine: {missing()}" if _asked and missing() else "" if _asked else "make cluster-test runs it"
)
pytestmark = pytest.mark.skipif(bool(_reason), reason=_reason)
whole = pytest.mark.skipif(os.environ.get("MSTAR_CLUSTER") != "all", reason="minutes: make cluster-test runs it")

SCRIPT = str(ROOT / "examples/slurm/mstar.sbatch")
RANKS = "python -u .*pretrain_mstar.sh"
"""In the commands of ranks; :data:`JOB` is in the launchers' too."""
JOB = "python.*pretrain_mstar.sh"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), 3) as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of the same layout on one machine, made when first asked for."""
    made: dict[tuple[str, ...], Path] = {}

    def make(ranks: int, *arguments: str) -> Path:
        key = (str(ranks), *arguments)
        if key not in made:
            directory = tmp_path_factory.mktemp("alone") / "run"
            launch = [sys.executable, "-m", "mstar_mega.launch", "--standalone", "--nproc-per-node", str(ranks)]
            command = [*launch, f"{ROOT}/examples/pretrain_mstar.sh", *SMALLER, "--run.dir", str(directory), *arguments]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=900)
            made[key] = directory
        return made[key]

    return make


def submit(
    slurm: Cluster, run_dir: Path, *arguments: str, nodes: int = 2, options: tuple[str, ...] = (), **env: str
) -> str:
    environment = {"MSTAR_REPO": str(ROOT), "MSTAR_ENV": str(Path(sys.executable).parents[1]), "NPROC": "1"} | env
    job = ["--nodes", str(nodes), *options, SCRIPT, *SMALLER, "--run.dir", str(run_dir), *arguments]
    return slurm.sbatch(*job, **environment)


def completed(slurm: Cluster, job: str) -> None:
    slurm.until_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    assert slurm.field(job, "JobState") == "COMPLETED", slurm.log(job)


def seen(run_dir: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(run_dir.glob(pattern))


def logged(run_dir: Path, **fields: object) -> Callable[[], bool]:
    return lambda: any(fields.items() <= event.items() for event in events_of(run_dir))


def assert_same(run_dir: Path, wanted: Path) -> None:
    for name, one, other in zip(("events", "rollouts", "weights"), outcome(run_dir), outcome(wanted), strict=True):
        assert one == other, name


def test_warned_before_its_limit_a_job_saves_goes_back_into_the_queue_and_ends_the_same(
    slurm: Cluster, alone: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, *BRIEF)
    slurm.until(logged(run_dir, event="step", stage="warmup", step=1), "training", 600, job)
    slurm.login("scancel", "--signal=USR1", "--batch", job)
    seconds = slurm.until_state(job, "PENDING", seconds=120)
    said = slurm.log(job)
    assert "2 x CPU (gloo) on node1, node2; tensor 1 x pipeline 1 x data 2" in said
    assert "stopped by SIG" in said and "back into the queue, for the 1. time" in said and "Traceback" not in said, said
    slurm.start_now(job)
    completed(slurm, job)
    assert slurm.field(job, "Restarts") == "1" and "Resuming" in slurm.log(job)
    assert "TCPStore" not in slurm.log(job), "no stack trace after success"
    assert_same(run_dir, alone(2, *BRIEF))
    print(f"saved and left {seconds:.1f} s after the warning")


def test_a_users_mistake_is_one_line_and_exit_code_2(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path / "run", "--evolve.intervall", "1")
    slurm.until_state(job, "FAILED")
    said = slurm.log(job)
    assert slurm.field(job, "ExitCode") == "2:0", said
    assert said.count("unknown setting '--evolve.intervall'") == 1 and "Traceback" not in said, said


def test_a_taken_port_is_one_line_within_seconds(slurm: Cluster, tmp_path: Path) -> None:
    program = "import socket, time; s = socket.socket(); s.bind(('', 23456)); s.listen(); time.sleep(600)"
    slurm.on("node1", "bash", "-c", f'setsid {sys.executable} -c "{program}" > /dev/null 2>&1 &')
    try:
        job = submit(slurm, tmp_path / "run", options=("--nodelist", "node1,node2"), RDZV_PORT="23456")
        slurm.until_state(job, "FAILED", seconds=60)
        assert slurm.field(job, "ExitCode") == "2:0", slurm.log(job)
        assert slurm.log(job).count("port 23456 on node1") == 1 and "Traceback" not in slurm.log(job)
    finally:
        for node, pid in slurm.processes("23456"):
            slurm.on(node, "kill", str(pid), check=False)


def test_gpus_that_pytorch_does_not_see_are_no_reason_to_run_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    with cluster(tmp_path / "slurm", 2, gpus=(2, 2)) as slurm:
        job = submit(slurm, tmp_path / "run", NPROC="", CUDA_VISIBLE_DEVICES="")
        slurm.until_state(job, "FAILED", seconds=300)
        said = slurm.log(job)
        assert "2 nodes, 2 processes on node1" in said, "the step has the GPUs of an exclusive job"
        assert "SLURM gives this job 2 GPUs on node" in said and "Traceback" not in said, said
        assert not (tmp_path / "run").exists()


@whole
@pytest.mark.parametrize(
    "layout", [("tensor", "pipeline"), ("tensor",)], ids=["tensor 2 x pipeline 2", "tensor 2 x data 2"]
)
def test_two_nodes_with_two_processes_give_one_machines_numbers(
    slurm: Cluster, alone: Callable[..., Path], tmp_path: Path, layout: tuple[str, ...]
) -> None:
    arguments = [part for name in layout for part in (f"--parallel.{name}", "2")]
    job = submit(slurm, tmp_path / "run", *arguments, NPROC="2", options=("--ntasks-per-node", "2"))
    completed(slurm, job)
    assert_same(tmp_path / "run", alone(4, *arguments))


STAGES = {
    "warmup": dict(event="step", stage="warmup", step=5),
    "prm": dict(event="step", stage="prm", step=1),
    "evolve": dict(event="step", stage="evolve", iteration=1),
}


@whole
@pytest.mark.parametrize("stage", [*STAGES, "generation"])
def test_a_lost_node_costs_a_block_and_the_job_ends_the_same(
    slurm: Cluster, alone: Callable[..., Path], tmp_path: Path, stage: str
) -> None:
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, "--run.stale_seconds", "20")
    moment = logged(run_dir, **STAGES[stage]) if stage in STAGES else seen(run_dir, "rollouts/iteration_0001/block_*")
    slurm.until(moment, stage, 600, job)
    lost = slurm.login("scontrol", "show", "hostnames", slurm.field(job, "NodeList")).split()[-1]
    slurm.power_off(lost)
    try:
        slurm.until_state(job, "PENDING", seconds=300)
        slurm.start_now(job)
        completed(slurm, job)
        assert_same(run_dir, alone(2))
    finally:
        slurm.power_on(lost)
        slurm.until(lambda: _idle(slurm) == len(slurm.names), "all nodes idle", 120)


def _idle(slurm: Cluster) -> int:
    return int(slurm.login("sinfo", "-h", "-t", "idle", "-o", "%D").strip() or 0)


@whole
def test_a_first_node_that_is_cut_off_is_displaced(slurm: Cluster, alone: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, *BRIEF, "--run.stale_seconds", "20")
    slurm.until(logged(run_dir, event="step", stage="warmup", step=1), "training", 600, job)
    first = slurm.login("scontrol", "show", "hostnames", slurm.field(job, "NodeList")).split()[0]
    slurm.plug(first, False)
    try:
        slurm.until_state(job, "PENDING", seconds=300)
        slurm.start_now(job)
        completed(slurm, job)
        assert "is an earlier start of this job: taken over" in slurm.log(job)
        assert_same(run_dir, alone(2, *BRIEF))
        assert not slurm.on(first, "pgrep", "-f", RANKS, check=False), "the displaced one has ended"
    finally:
        slurm.power_off(first)
        slurm.power_on(first)
        slurm.until(lambda: _idle(slurm) == len(slurm.names), "all nodes idle", 120)


@whole
def test_requeued_resubmitted_and_on_fewer_nodes(slurm: Cluster, alone: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir)
    slurm.until(seen(run_dir, "rollouts/annotate/block_*"), "annotation", 600, job)
    slurm.login("scontrol", "requeue", job)
    slurm.start_now(job)
    slurm.until(seen(run_dir, "rollouts/iteration_0001/block_*"), "generation", 600, job)
    slurm.login("scancel", job)
    slurm.until_state(job, "CANCELLED", seconds=60)
    slurm.until(lambda: not slurm.processes(JOB), "the end of all ranks", 60, job)
    assert "stopped by SIGTERM" in slurm.log(job) and "back into the queue" not in slurm.log(job), slurm.log(job)
    shutil.copytree(run_dir, tmp_path / "smaller")
    again = submit(slurm, run_dir)
    completed(slurm, again)
    assert_same(run_dir, alone(2))
    fewer = submit(slurm, tmp_path / "smaller", nodes=1)
    completed(slurm, fewer)
    assert "NOTE: the layout is tensor 1, pipeline 1, data 1" in slurm.log(fewer)


@whole
def test_a_killed_rank_fails_the_job_at_once_and_a_stopped_one_within_the_limit(slurm: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, *BRIEF)
    slurm.until(logged(run_dir, event="step", stage="warmup", step=1), "training", 600, job)
    slurm.on("node2", "pkill", "-KILL", "-f", RANKS)
    seconds = slurm.until_state(job, "FAILED", seconds=60)
    said = slurm.log(job)
    assert "rank 1 on node2 was killed by SIGKILL" in said and "Traceback" not in said, said
    slurm.until(lambda: not slurm.processes(JOB), "the end of all ranks", 60, job)
    print(f"failed {seconds:.1f} s after a rank was killed")
    job = submit(slurm, run_dir, *BRIEF, "--run.hang_minutes", "0.5")
    slurm.until(seen(run_dir, "rollouts/evaluation_0000_*/block_*"), "measuring", 600, job)
    slurm.on("node2", "pkill", "-STOP", "-f", RANKS)
    seconds = slurm.until_state(job, "FAILED", seconds=120)
    assert "no sign of life for 30 s from rank 1 on node2 (" in slurm.log(job), slurm.log(job)
    print(f"failed {seconds:.1f} s after a rank was stopped")


@whole
def test_an_array_of_one_run_goes_on_from_task_to_task(
    slurm: Cluster, alone: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = ("--array", "1-3%1", "--time", "1", "--signal", "B:USR1@35")
    job = submit(slurm, run_dir, options=options, MSTAR_REQUEUE="0")
    slurm.until(lambda: (run_dir / "report.html").exists(), "the end", 600, job)
    slurm.login("scancel", job)
    assert_same(run_dir, alone(2))


@whole
def test_a_run_directory_that_is_not_shared_is_named_before_work_begins(slurm: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    slurm.on("node2", "mount", "-t", "tmpfs", "none", str(run_dir))
    job = submit(slurm, run_dir, options=("--nodelist", "node1,node2"))
    slurm.until_state(job, "FAILED", seconds=300)
    said = slurm.log(job)
    assert slurm.field(job, "ExitCode") == "2:0", said
    assert said.count("run.dir") == 1 and "rank 1 on node2" in said and "Traceback" not in said, said
    slurm.on("node2", "umount", str(run_dir))


@whole
def test_host_names_that_mean_the_loopback_device(alone: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    with cluster(tmp_path / "slurm", 2, loopback=True) as slurm:
        job = submit(slurm, tmp_path / "run")
        completed(slurm, job)
    assert_same(tmp_path / "run", alone(2))


@whole
def test_unequal_counts_of_processes(slurm: Cluster, tmp_path: Path) -> None:
    """What a set-up hook exports holds on its node: two processes on one, one on the other."""
    hook = tmp_path / "setup.sh"
    hook.write_text("[ $SLURM_NODEID = 0 ] && export NPROC=2 || export NPROC=1\n")
    job = submit(slurm, tmp_path / "run", MSTAR_SETUP=str(hook))
    completed(slurm, job)
    assert "3 x CPU (gloo)" in slurm.log(job)
    assert time.time() - (tmp_path / "run/report.html").stat().st_mtime < 600
