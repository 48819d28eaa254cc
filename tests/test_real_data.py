"""Genuine questions in MathV360K's shape through every stage of the job, at smoke size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import Job, events_of

from mstar_mega.config import DataConfig
from mstar_mega.data import disk
from mstar_mega.data.records import read_groups

REAL = Path(__file__).parents[2] / "shared/data/small_real/train_mathv360k_format.json"
needs_real_data = pytest.mark.skipif(not REAL.exists(), reason="the reference data are not beside the project")


@needs_real_data
def test_genuine_questions_go_through_every_stage(tmp_path: Path) -> None:
    config = DataConfig("mathv360k", str(REAL), validation_queries=20, test_queries=20, instruct=False)
    labelled = disk.DiskQueries(disk.open_source(config, tmp_path / "data"), "labelled")
    # Short multiple-choice questions: a small warm-up learns to answer with a letter, and some are right by chance.
    chosen = [query for query in labelled[:200] if query.choices and len(query.question) < 400][:48]
    warmup = tmp_path / "warmup.jsonl"
    rows = [{"id": query.id, "response": f"so\n\n# Answer\n\n{query.answer}"} for query in chosen]
    warmup.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = tmp_path / "run"
    settings = {
        "data.name": "mathv360k", "data.path": REAL, "data.warmup_file": warmup, "data.dir": tmp_path / "data",
        "data.labelled_queries": 24, "data.validation_queries": 20, "data.test_queries": 20, "data.instruct": "false",
        "warmup.epochs": 6, "warmup.optimizer.batch_size": 8, "generation.max_new_tokens": 12,
        "annotate.queries": 8, "annotate.responses": 4, "evolve.epochs": 1, "evolve.optimizer.batch_size": 4,
        "temperature.queries": 4,
    }  # fmt: skip
    job = Job(run_dir, 1, *(part for name, value in settings.items() for part in (f"--{name}", str(value))))
    assert job.wait() == 0, job.output
    events = events_of(run_dir)
    stages = [event["stage"] for event in events if event["event"] == "stage"]
    assert stages == ["warmup", "annotate", "prm", "evolve", "total"]
    trained = [event for event in events if event["event"] == "step" and event["stage"] == "evolve"]
    assert trained and all(event["responses"] for event in trained)
    files = sorted((run_dir / "rollouts").rglob("iteration_*/block_*"))
    groups = [group for file in files for group in read_groups(file)]
    asked = {query.id: query for query in labelled}
    assert {group.query.id for group in groups} == {query.id for query in labelled[:24]}
    for group in groups:
        assert group.query == asked[group.query.id]
        for response in group.responses:
            assert not response.correct or response.answer
    tested = [event for event in events if event["event"] == "evaluation" and event["split"] == "test"]
    assert {event["queries"] for event in tested} == {20}
    assert (run_dir / "report.html").exists()
