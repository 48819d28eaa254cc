"""The summary of a run: finished, running, damaged, not begun."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from report_runs import evaluation, log_step, make_run

from mstar_mega.report.html import render
from mstar_mega.report.metrics import MetricsLog
from mstar_mega.report.run import load_run
from mstar_mega.report.summary import build_summary, write_summary

SUMMARY_KEYS = [
    "seed", "method", "parallel", "accuracy", "pass_at_k", "reward_pass_at_k", "pass_at_reward_k", "temperatures",
    "responses_generated", "generated", "trajectory", "vote", "responses_selected", "queries_without_correct_response",
    "right_reasoning", "prm", "log_prob_gap_max", "seconds", "peak_memory_bytes",
]  # fmt: skip
PHASES = ["warmup", "annotate", "prm", "temperature", "generate", "score", "improve", "evaluate", "total"]


def test_summary_of_a_finished_run(tmp_path: Path) -> None:
    summary = json.loads(write_summary(make_run(tmp_path / "run")).read_text())
    assert list(summary) == SUMMARY_KEYS
    assert summary["seed"] == 7 and summary["method"] == "continuous"
    assert summary["parallel"] == {"tensor": 2, "pipeline": 2, "data": 2}
    assert summary["accuracy"] == {"warmup": 0.45, "final": pytest.approx(0.59)}
    assert summary["pass_at_k"] == {"start": 0.8, "end": 0.9}
    assert summary["reward_pass_at_k"] == {"start": 0.6, "end": pytest.approx(0.72)}
    assert summary["temperatures"] == [1.0, 1.0]
    assert (summary["responses_generated"], summary["responses_selected"]) == (320, 26)
    assert summary["queries_without_correct_response"] == 6 and summary["vote"] is None
    assert summary["generated"] == {
        "annotate": {"responses": 144 + 4000, "tokens": 70_000},
        "sweeps": {"responses": 2 * 500, "tokens": 2 * 10_000},
        "evolve": {"responses": 320, "tokens": 10_000},
        "evaluate": {"responses": 6 * 750, "tokens": 6 * 30_000},
        "for_training": {"responses": 4144 + 1000 + 320, "tokens": 100_000},
        "total": {"responses": 4144 + 1000 + 320 + 4500, "tokens": 280_000},
    }
    assert [list(row.values()) for row in summary["trajectory"]] == [
        [0, 0.45, 0.02, 4, 0, 0, 0],
        [1, pytest.approx(0.54), 0.02, 12, 16, 4144 + 660, 85_000],
        [2, pytest.approx(0.59), 0.02, 22, 32, 4144 + 1320, 100_000],
    ]
    assert summary["pass_at_reward_k"] == {"start": None, "end": 0.65} and summary["log_prob_gap_max"] == 2e-6
    assert [summary["prm"][when]["within_query_auc"] for when in ("held_out", "start", "end")] == pytest.approx(
        [0.7, 0.72, 0.66]
    )
    assert summary["prm"]["held_out"]["pooled_step_auc"] == 0.85
    assert summary["prm"]["end"]["baselines"]["policy_log_prob"] == 0.61
    of_all, of_selected = {"share": 0.5, "responses": 160}, {"share": 0.75, "responses": 24}
    assert summary["right_reasoning"] == {"all_correct": of_all, "top_k": of_selected, "selected": of_selected}
    assert list(summary["seconds"]) == PHASES
    assert list(summary["seconds"].values()) == [2.0, 6.0, 0.5, 6.0, 20.0, 8.0, 10.0, 12.0, 103.5]
    assert summary["peak_memory_bytes"] == 300


def test_summary_before_anything_has_happened(tmp_path: Path) -> None:
    summary = build_summary(tmp_path)
    assert list(summary) == SUMMARY_KEYS
    assert summary.pop("temperatures") == summary.pop("trajectory") == []
    assert all(count == {"responses": 0, "tokens": 0} for count in summary.pop("generated").values())
    leaves = [leaf for part in summary.values() for leaf in (part.values() if isinstance(part, dict) else [part])]
    assert len(leaves) == 32 and all(leaf is None for leaf in leaves)


def test_summary_of_a_running_job(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    evaluation(log, "warmup", 0, "test", 0.45)
    log_step(log, "warmup", 1, 0.4)
    log.append("log_prob_gap", iteration=1, largest=math.nan)
    log.append("log_prob_gap", iteration=2, largest=1.0)
    summary = json.loads(write_summary(tmp_path).read_text())
    assert summary["accuracy"] == {"warmup": 0.45, "final": None}
    assert summary["seconds"]["total"] == 2.5 and summary["seconds"]["generate"] is None
    assert summary["log_prob_gap_max"] == "NaN"


def test_no_summary_of_a_damaged_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "run"}\ngarbage\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        write_summary(tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_votes_are_told_apart_from_the_real_judge(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", iterations=1, queries=1)
    log = MetricsLog(run_dir / "metrics.jsonl")
    vote = {"queries": 5, "responses": 80, "agreeing": 60, "answers_known": 4, "answers_right": 3}
    log.append("generation", iteration=2, temperature=1.0, queries=10, responses=160, tokens=1, correct=40, vote=vote)
    log.close()
    assert build_summary(run_dir)["vote"] == {"accuracy": 0.75, "answers_known": 4}
    page = render(load_run(run_dir))
    # 80 of 160, and 40 of the 80 to labelled queries.
    assert "50.0% of those with a known answer were correct" in page
    assert "right for 75.0% of 4 unlabelled queries" in page
    assert "evolving 320 (5K tokens), temperature sweeps 500 (10K tokens), annotation 4,144 (70K tokens)" in page
