"""Small finished runs, and the events, rollouts and images they are made of, for the report's tests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from PIL import Image

from mstar_mega.data.records import write_groups, write_selected
from mstar_mega.data.types import Group, ImageRef, Query, Response, Step
from mstar_mega.report.metrics import MetricsLog

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 {{tiles}}"


def write_image(path: Path, size: tuple[int, int] = (40, 30)) -> ImageRef:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).save(path)
    return ImageRef(str(path), hashlib.sha256(path.read_bytes()).hexdigest()[:16])


def response(index: int, correct: bool | None, score: float | None, text: str = "2 + 3 = 5.") -> Response:
    steps = [] if score is None else [Step(0, 4, text + "\n", score, 0.5)]
    answer = "The answer is 5."
    return Response(index, [1, 2, 3], f"{text}\n{answer}", answer="5", correct=correct, steps=steps, score=score)


def write_rollouts(run_dir: Path, iteration: int, queries: int, block: int = 5, text: str = "2 + 3 = 5.") -> None:
    groups = []
    for i in range(queries):
        image = write_image(run_dir / "images" / f"{iteration}-{i}.png")
        query = Query(f"q-{iteration}-{i}", f"What is the sum? {NASTY}", (image,), "5", kind="sum")
        responses = [response(0, True, 0.9, text), response(1, False, 0.4, text), response(2, False, None, text)]
        groups.append(Group(query, responses))
    directory = run_dir / "rollouts" / f"iteration_{iteration:04d}"
    directory.mkdir(parents=True)
    for number_, start in enumerate(range(0, queries, block)):
        write_groups(directory / f"block_{number_:05d}.jsonl", groups[start : start + block])
    write_selected(directory, [(group.query.id, [0]) for group in groups])


def evaluation(log: MetricsLog, stage: str, iteration: int, split: str, accuracy: float, **more: Any) -> None:
    log.append(
        "evaluation", stage=stage, iteration=iteration, split=split, greedy_accuracy=accuracy, standard_error=0.02,
        queries=750, responses=750, tokens=30_000, seconds=2.0,
        **{"by_kind": {"sum": accuracy, "cost in $": 0.5}, "kind_queries": {"sum": 500, "cost in $": 250}, **more},
    )  # fmt: skip


def log_iteration(log: MetricsLog, i: int) -> None:
    grid = [
        {"temperature": t, "reward_pass_at_k": 0.6 + 0.1 * t, "pass_at_k": 0.7,
         "pass_at_most_k": 0.7 + 0.2 * t, "random_pass_at_k": 0.65,
         "difference": 0.1 * t - 0.1, "difference_stderr": 0.02 - 0.02 * t}
        for t in (0.5, 1.0)
    ]  # fmt: skip
    log.append(
        "temperature", iteration=i, temperature=1.0, mode="reward_pass_at_k", k=2, most_k=16, distinct=False,
        queries=250, responses=500, tokens=10_000, grid=grid, seconds=3.0,
    )  # fmt: skip
    log.append(
        "generation", iteration=i, temperature=1.0, queries=10, responses=160, tokens=5000, truncated=1,
        without_steps=2, correct=80, queries_without_correct=3, unlabelled_queries=0, checker={"exact": 160},
        seconds=10.0, score_seconds=4.0,
    )  # fmt: skip
    log.append("log_prob_gap", iteration=i, largest=1e-6 * i, mean=1e-7, tokens=900, limit=1e-3)
    log.append(
        "selection", iteration=i, rule="top_k", selected=13, queries_with_selection=7,
        kept_per_query={"0": 3, "1": 1, "2": 6},
        right_reasoning={"all_correct": {"share": 0.5, "responses": 80}, "top_k": {"share": 0.75, "responses": 12}},
    )  # fmt: skip
    for step in (1, 2):
        log_step(log, "evolve", 10 * i + step, 0.5 / i, iteration=i)
    log_quality(log, "evolve", i, "validation", 0.72 - 0.03 * i)
    log.append("improve", iteration=i, steps=2, loss=0.5 / i, total_steps=10 * i + 2, seconds=5.0)
    evaluation(
        log, "evolve", i, "validation", 0.5 + 0.05 * i, pass_at_k=0.9, k=16, reward_pass_at_k=0.7 + 0.01 * i,
        reward_k=2, pass_at_reward_k=0.65,
        reward_gain=0.05 + 0.01 * i, reward_gain_stderr=0.02, best_of_n=0.7, weighted_vote=0.69, majority_vote=0.66,
    )  # fmt: skip
    evaluation(log, "evolve", i, "test", 0.49 + 0.05 * i)


def log_quality(log: MetricsLog, stage: str, i: int, split: str, auc: float, **more: Any) -> None:
    free = {"policy_log_prob": 0.61, "length": 0.55, "constant_per_query": 0.5}
    quality = {
        "within_query_auc": auc, "within_query_auc_stderr": 0.02, "mixed_queries": 40, "responses": 640,
        "right_share": 0.5, "baselines": free, "baselines_stderr": dict.fromkeys(free, 0.03),
        "difference": {name: auc - value for name, value in free.items()},
        "difference_stderr": dict.fromkeys(free, 0.025), "pooled_auc": {"process_score": 0.8, **free},
    }  # fmt: skip
    log.append("prm_quality", stage=stage, iteration=i, split=split, **quality, reasoning=quality, **more)


def log_step(log: MetricsLog, stage: str, step: int, loss: float, iteration: int | None = None) -> None:
    log.append(
        "step", stage=stage, iteration=iteration, step=step, loss=loss, grad_norm=1.0, learning_rate=1e-3, tokens=100,
        responses=8, seconds=0.5,
    )  # fmt: skip


def make_run(run_dir: Path, iterations: int = 2, queries: int = 6) -> Path:
    """A small finished run."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(
        "seed: 7\nevolve:\n  method: continuous\nmodel: {family: internvl2, size: digits}\n"
        "report:\n  samples_per_iteration: 4\n"
    )
    log = MetricsLog(run_dir / "metrics.jsonl")
    log.append("run", world_size=8, parallel={"tensor": 2, "pipeline": 2})
    for step in range(1, 5):
        log_step(log, "warmup", step, 2.0 / step)
    evaluation(log, "warmup", 0, "validation", 0.5, pass_at_k=0.8, k=16, reward_pass_at_k=0.6, reward_k=2)
    evaluation(log, "warmup", 0, "test", 0.45)
    log.append("stage", stage="warmup", seconds=7.0, peak_memory_bytes=100)
    log.append(
        "annotation", queries=9, responses=144, tokens=70_000, steps=500, rollouts=4000, positive_share=0.6,
        without_steps=0, truncated=0, seconds=6.0,
    )  # fmt: skip
    log.append("stage", stage="annotate", seconds=6.5, peak_memory_bytes=300)
    log_step(log, "prm", 1, 0.6)
    log_quality(log, "prm", 0, "held_out", 0.7, pooled_step_accuracy=0.8, pooled_step_auc=0.85, steps=50)
    log_quality(log, "warmup", 0, "validation", 0.72)
    log.append("skipped", what="image", where="a.png", reason=NASTY)
    for i in range(1, iterations + 1):
        log_iteration(log, i)
        write_rollouts(run_dir, i, queries)
    log.append("stage", stage="evolve", seconds=90.0, peak_memory_bytes=200)
    log.close()
    return run_dir
