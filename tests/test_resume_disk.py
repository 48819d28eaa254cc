"""A job on a set on disk: killed and resumed it ends as if nothing had happened, and it knows its files again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from jobs import Job, events_of, finish, outcome
from test_data_sets import good_rows

from mstar_mega.config import DataConfig
from mstar_mega.data import disk


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multiple-choice questions about small pictures, and a warm-up that teaches to answer with a letter."""
    folder = tmp_path_factory.mktemp("set")
    rows = good_rows(folder)
    for i, row in enumerate(rows):
        row["conversations"][0]["value"] += "\nChoices:\n(A) x\n(B) y"
        row["conversations"][1]["value"] = "The answer is " + "AAB"[i % 3]
    (folder / "rows.json").write_text(json.dumps(rows))
    config = DataConfig("mathv360k", str(folder / "rows.json"), validation_queries=4, test_queries=4)
    labelled = disk.DiskQueries(disk.open_source(config, folder / "index"), "labelled")
    examples = [{"id": query.id, "response": f"so\n\n# Answer\n\n{query.answer}"} for query in labelled[:32]]
    (folder / "warmup.jsonl").write_text("".join(json.dumps(each) + "\n" for each in examples))
    return folder


def settings(folder: Path) -> list[str]:
    values = {
        "data.name": "mathv360k", "data.path": folder / "rows.json", "data.warmup_file": folder / "warmup.jsonl",
        "data.labelled_queries": 24, "data.test_queries": 4, "data.instruct": "false", "warmup.epochs": 8,
        "warmup.optimizer.batch_size": 8, "generation.max_new_tokens": 10, "annotate.queries": 4, "evolve.epochs": 2,
        "temperature.queries": 4, "report.samples_per_iteration": 1,
    }  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_killed_in_generation_and_in_training(folder: Path, tmp_path: Path) -> None:
    whole, run_dir, arguments = tmp_path / "whole", tmp_path / "run", settings(folder)
    finish(whole, 1, *arguments)
    trained = [event for event in events_of(whole) if event["event"] == "step" and event["stage"] == "evolve"]
    assert len(trained) > 4, "too little to be killed in"

    def in_generation(run_dir: Path) -> bool:
        return len(list(run_dir.glob("rollouts/iteration_0001/block_*"))) == 1

    def in_training(run_dir: Path) -> bool:
        steps = [event for event in events_of(run_dir) if event["event"] == "step" and event["stage"] == "evolve"]
        return len(steps) >= 2

    for moment in (in_generation, in_training):
        job = Job(run_dir, 1, *arguments)
        assert job.run_until(moment) and job.running, job.output
        job.kill()
        os.utime(folder / "rows.json")  # another time, the same bytes
    finish(run_dir, 1, *arguments)
    assert outcome(run_dir) == outcome(whole)

    for name, setting in (("rows.json", "data.path"), ("warmup.jsonl", "data.warmup_file")):
        content = (folder / name).read_bytes()
        changes = {"the same size, but SHA-256": content.replace(b"id-", b"ID-", 1), "bytes then": content + b"\n"}
        for said, other in changes.items():
            (folder / name).write_bytes(other)
            job = Job(run_dir, 1, *arguments)
            assert job.wait() == 2, job.output
            message = f"{setting} {folder / name} is not the file that {run_dir} was started with"
            assert message in job.output and said in job.output and "restore it" in job.output, job.output
        (folder / name).write_bytes(content)
    assert "done already" in finish(run_dir, 1, *arguments), "restored"
