"""The whole recipe on tiny models of the three families, from a converted checkpoint, killed and resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny_families
from jobs import Job, checkpoints, copy_run, go_back, outcome

from mstar_mega.checkpoint_tools.convert import hf_to_megatron
from mstar_mega.recipe import rollouts
from mstar_mega.report.metrics import read_metrics
from mstar_mega.rewards.reward import Judged

SETTINGS = [
    *("--run.checkpoint_every_steps", "1"),
    *("--data.warmup_examples", "4", "--data.labelled_queries", "4", "--data.unlabelled_queries", "1"),
    *("--data.validation_queries", "2", "--data.test_queries", "2", "--generation.max_new_tokens", "8"),
    *("--warmup.epochs", "1", "--warmup.optimizer.batch_size", "2", "--warmup.optimizer.lr", "1e-3"),
    *("--annotate.queries", "4", "--annotate.responses", "2", "--annotate.rollouts", "1", "--prm.head", "likelihood"),
    *("--evolve.epochs", "2", "--evolve.interval", "0.5", "--evolve.responses", "4", "--evaluation.every", "0"),
    *("--temperature.responses", "2", "--temperature.queries", "2", "--temperature.grid", "[0.9, 1.0]"),
]
"""So little that nothing is learnt: what is judged correct is decided by :func:`judge_by_index`."""


LAYOUTS = {"internvl2": (2, 1), "phi3_5_vision": (1, 2), "minicpm_v2_5": (2, 2)}
"""Tensor x pipeline. That each family is the same in every layout, its goldens and its gradients show."""


def judge_by_index() -> None:
    """Call every second response that has a step correct, on this rank."""
    rollouts.judge_response = lambda query, response, *_: Judged(
        bool(response.steps) and response.index % 2 == 0, "exact"
    )


pytestmark = pytest.mark.usefixtures("job_of_one")


def settings(name: str, directory: Path) -> list[str]:
    """Convert a tiny model of the family, and how a run starts from it."""
    hf_to_megatron(tiny_families.make_model_directory(name, directory / "hf"), directory / "megatron")
    tensor, pipeline = map(str, LAYOUTS[name])
    model = ("--model.family", name, "--model.checkpoint", str(directory / "megatron"))
    return [*SETTINGS, *model, "--parallel.tensor", tensor, "--parallel.pipeline", pipeline]


def run(directory: Path, name: str, extra: list[str]) -> str:
    job = Job(directory, math.prod(LAYOUTS[name]), *extra, before="test_families_recipe:judge_by_index")
    assert job.wait() == 0, job.output
    return job.output


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_the_recipe_runs_and_resumes(name: str, tmp_path: Path) -> None:
    extra = settings(name, tmp_path)
    assert "the first weights are those of" in run(tmp_path / "run", name, extra)
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {event["stage"] for event in events if event["event"] == "step"} == {"warmup", "prm", "evolve"}
    gaps = [event["largest"] for event in events if event["event"] == "log_prob_gap"]
    assert gaps and max(gaps) < 1e-3, "generating and training disagree"
    # From the middle of the first iteration on, once more.
    copy_run(tmp_path / "run", tmp_path / "again")
    inside = [at for at in checkpoints(tmp_path / "run", "evolve") if not at.endswith("step_000000")]
    go_back(tmp_path / "again", "evolve", inside[0])
    assert "Resuming" in run(tmp_path / "again", name, extra)
    first, second = outcome(tmp_path / "run"), outcome(tmp_path / "again")
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert first[2] == second[2]
