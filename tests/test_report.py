"""The report room: the event log, its followers, the summary and the page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mstar_mega.data.records import read_groups, write_groups
from mstar_mega.data.types import Group, ImageRef, Query, Response, Step
from mstar_mega.report import progress as progress_module
from mstar_mega.report import samples as samples_module
from mstar_mega.report.html import write_report
from mstar_mega.report.metrics import MetricsLog, NullMetrics, comparable, number, read_metrics
from mstar_mega.report.plots import all_plots
from mstar_mega.report.progress import Progress, clock
from mstar_mega.report.samples import choose_groups, collect_samples, data_url, pieces
from mstar_mega.report.summary import build_summary, load_run, write_summary
from mstar_mega.report.tensorboard import TensorBoardLog

SUMMARY_KEYS = [
    "seed", "method", "parallel", "accuracy", "pass_at_k", "reward_pass_at_k", "temperatures", "responses_generated",
    "responses_selected", "queries_without_correct_response", "prm", "log_prob_gap_max", "seconds", "peak_memory_bytes",
]  # fmt: skip
PHASES = ["warmup", "annotate", "prm", "temperature", "generate", "score", "improve", "evaluate", "total"]
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
        responses[0].selected = True
        groups.append(Group(query, responses))
    directory = run_dir / "rollouts" / f"iteration_{iteration:04d}"
    directory.mkdir(parents=True)
    for number_, start in enumerate(range(0, queries, block)):
        write_groups(directory / f"block_{number_:05d}.jsonl", groups[start : start + block])


def evaluation(log: MetricsLog, stage: str, iteration: int, split: str, accuracy: float, **more: Any) -> None:
    log.append(
        "evaluation", stage=stage, iteration=iteration, split=split, greedy_accuracy=accuracy, standard_error=0.02,
        queries=750, by_kind={"sum": accuracy, "cost in $": 0.5}, seconds=2.0, **more,
    )  # fmt: skip


def log_iteration(log: MetricsLog, i: int) -> None:
    grid = [{"temperature": t, "reward_pass_at_k": 0.6 + 0.1 * t, "pass_at_k": 0.7} for t in (0.5, 1.0)]
    log.append("temperature", iteration=i, temperature=1.0, mode="reward_pass_at_k", k=2, grid=grid, seconds=3.0)
    log.append(
        "generation", iteration=i, temperature=1.0, queries=10, responses=160, tokens=5000, truncated=1,
        without_steps=2, correct=80, queries_without_correct=3, unlabelled_queries=0, checker={"exact": 160},
        seconds=10.0, score_seconds=4.0,
    )  # fmt: skip
    log.append("log_prob_gap", iteration=i, largest=1e-6 * i, mean=1e-7, tokens=900, limit=1e-3)
    log.append(
        "selection", iteration=i, rule="top_k", selected=13, queries_with_selection=7,
        kept_per_query={"0": 3, "1": 1, "2": 6},
    )  # fmt: skip
    for step in (1, 2):
        log_step(log, "evolve", 10 * i + step, 0.5 / i, iteration=i)
    log.append("improve", iteration=i, steps=2, loss=0.5 / i, total_steps=10 * i + 2, seconds=5.0)
    evaluation(
        log, "evolve", i, "validation", 0.5 + 0.05 * i, pass_at_k=0.9, k=16, reward_pass_at_k=0.7 + 0.01 * i,
        reward_k=2, best_of_n=0.7, weighted_vote=0.69, majority_vote=0.66,
    )  # fmt: skip
    evaluation(log, "evolve", i, "test", 0.49 + 0.05 * i)


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
        "annotation", queries=9, responses=144, steps=500, rollouts=4000, positive_share=0.6, without_steps=0,
        truncated=0, seconds=6.0,
    )  # fmt: skip
    log.append("stage", stage="annotate", seconds=6.5, peak_memory_bytes=300)
    log_step(log, "prm", 1, 0.6)
    log.append("prm_quality", accuracy=0.8, auc=0.85, steps=50, positive_share=0.6, threshold=0.5)
    log.append("skipped", what="image", where="a.png", reason=NASTY)
    for i in range(1, iterations + 1):
        log_iteration(log, i)
        write_rollouts(run_dir, i, queries)
    log.append("stage", stage="evolve", seconds=90.0, peak_memory_bytes=200)
    log.close()
    return run_dir


# The event log


def test_events_come_back_in_order_and_stamped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl")
    log.append("step", stage="prm", step=1, loss=0.5)
    log.append("stage", stage="prm", seconds=2.0)
    assert log.position() == 2
    events = read_metrics(log.path)  # readable while the log is open
    assert [event["event"] for event in events] == ["step", "stage"]
    assert all(event["time"] > 1.7e9 for event in events)
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_non_finite_numbers_stay_standard_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("step", loss=math.nan, nested={"a": [math.inf, -math.inf, 1.0]})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    event = json.loads(log.path.read_text(), parse_constant=refuse)
    assert math.isnan(number(event, "loss") or 0.0)
    assert [number({"x": value}, "x") for value in event["nested"]["a"]] == [math.inf, -math.inf, 1.0]
    assert number({"x": True}, "x") is None and number({"x": "3"}, "x") is None and number({}, "x") is None


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def work(log: MetricsLog, first: int, last: int) -> None:
        for step in range(first, last):
            log.append("step", step=step, loss=1 / step, seconds=step + id(log) % 7, by={"tokens_per_second": id(log)})

    whole = MetricsLog(tmp_path / "whole.jsonl")
    work(whole, 1, 9)
    killed = MetricsLog(tmp_path / "killed.jsonl")
    work(killed, 1, 4)
    checkpoint = killed.position()
    work(killed, 4, 7)
    killed.close()
    with open(killed.path, "ab") as file:
        file.write(b'{"event": "step", "st')
    resumed = MetricsLog(killed.path)
    assert resumed.position() == 6
    resumed.rewind(checkpoint)
    work(resumed, 4, 9)
    assert read_metrics(whole.path) != read_metrics(killed.path)
    assert comparable(read_metrics(whole.path)) == comparable(read_metrics(killed.path))
    assert comparable(read_metrics(whole.path))[0] == {"event": "step", "step": 1, "loss": 1.0, "by": {}}
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_an_empty_rewind_and_one_too_far(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("run", world_size=1)
    log.rewind(1)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 1 events.*after event 2"):
        log.rewind(2)
    log.rewind(0)
    assert log.position() == 0 and log.path.read_bytes() == b""


@pytest.mark.parametrize("bad", [b"\0\0\0", b'{"event": "st', b"[1]", b'{"no": 1}'])
def test_a_damaged_line_is_named(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "run"}\n' + bad + b'\n{"event": "stage"}\n')
    before = path.read_bytes()
    for read in (read_metrics, MetricsLog):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            read(path)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("run", world_size=1)

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:5])

    log._file.close()
    log._file = FullDisk(log.path, "ab")
    with pytest.raises(OSError, match="No space left"):
        log.append("step", step=1)
    assert [event["event"] for event in read_metrics(log.path)] == ["run"]
    assert log.path.read_bytes().endswith(b"}\n")


def test_the_silent_log_has_the_same_interface() -> None:
    def interface(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert interface(NullMetrics) == interface(MetricsLog)
    log = NullMetrics()
    log.append("step", step=1)
    log.rewind(5)
    assert log.position() == 0


# TensorBoard


def test_tensorboard_follows_the_log_through_a_rewind(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curve(tag: str) -> list[tuple[int, float]]:
        reader = EventAccumulator(str(tmp_path / "tb"))
        reader.Reload()
        return [(point.step, round(point.value, 5)) for point in reader.Scalars(tag)]

    log = MetricsLog(tmp_path / "metrics.jsonl", TensorBoardLog(tmp_path / "tb"))
    for step in (1, 2, 3):
        log_step(log, "evolve", step, 0.5, iteration=1)
    assert [step for step, _ in curve("evolve/loss")] == [1, 2, 3]
    log.close()

    log = MetricsLog(log.path, TensorBoardLog(tmp_path / "tb"))
    log.rewind(2)
    log_step(log, "evolve", 3, 0.25, iteration=1)
    evaluation(log, "evolve", 1, "test", 0.6)
    assert curve("evolve/loss") == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert curve("test/greedy_accuracy") == [(1, 0.6)]
    assert curve("test/by_kind/sum") == [(1, 0.6)]
    assert len([path for path in (tmp_path / "tb").iterdir() if path.stat().st_size]) == 1


def test_a_tensorboard_that_already_looks_forgets_what_was_rewound(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", TensorBoardLog(tmp_path / "tb"))
    reader = EventAccumulator(str(tmp_path / "tb"))
    for step in (1, 2, 3):
        log_step(log, "prm", step, 0.5)
    reader.Reload()
    log.rewind(1)
    log_step(log, "prm", 2, 0.25)
    reader.Reload()
    assert [(point.step, point.value) for point in reader.Scalars("prm/loss")] == [(1, 0.5), (2, 0.25)]


# Progress


def test_plain_progress_prints_few_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with Progress(True) as progress, progress.task("generate", 50, "queries", done=10) as task:
        for _ in range(40):
            now[0] += 0.5
            task.advance(1, correct=0.25)
        progress.say("[bold]done[/bold]")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "generate: 10 of 50 queries",
        "generate: 30 of 50 queries, 2 queries/s, 10.0 s left, correct 0.25",
        "generate: 50 queries in 20.0 s, 2 queries/s, correct 0.25",
        "[bold]done[/bold]",
    ]


def test_a_task_that_ends_early_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True) as progress:
        with progress.task("train", 9, "steps") as task:
            task.advance(4)
    assert capsys.readouterr().out.splitlines()[-1].startswith("train: 4 steps in ")


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", terminal)
    with Progress(True) as progress:
        task = progress.task("train [1]", 4, "steps")
        task.advance(2, loss=0.123456)
        assert progress.bars is not None
        assert progress.bars.tasks[0].completed == 2 and "loss 0.123" in progress.bars.tasks[0].fields["note"]
        task.advance(2)
        assert progress.bars.tasks == []
        progress.say("[red]text[/red]")
    assert "train [1]: 4 steps in" in terminal.getvalue() and "[red]text[/red]" in terminal.getvalue()


def test_a_disabled_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(False) as progress, progress.task("x", 2, "steps") as task:
        task.advance(1, loss=1.0)
        progress.say("nothing")
    assert capsys.readouterr().out == ""


def test_clock() -> None:
    assert [clock(s) for s in (8.21, 59.94, 59.96, 65, 7390.2)] == ["8.2 s", "59.9 s", "1:00", "1:05", "2:03:10"]


# The summary


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
    assert summary["queries_without_correct_response"] == 6
    assert summary["prm"] == {"accuracy": 0.8, "auc": 0.85} and summary["log_prob_gap_max"] == 2e-6
    assert list(summary["seconds"]) == PHASES
    assert list(summary["seconds"].values()) == [2.0, 6.0, 0.5, 6.0, 20.0, 8.0, 10.0, 12.0, 103.5]
    assert summary["peak_memory_bytes"] == 300


def test_summary_before_anything_has_happened(tmp_path: Path) -> None:
    summary = build_summary(tmp_path)
    assert list(summary) == SUMMARY_KEYS
    assert summary.pop("temperatures") == []
    leaves = [leaf for part in summary.values() for leaf in (part.values() if isinstance(part, dict) else [part])]
    assert len(leaves) == 27 and all(leaf is None for leaf in leaves)


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


# The page


class Page(HTMLParser):
    """Tags, their attributes, and the text of scripts, as a browser would read them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        self.text += data

    @property
    def samples(self) -> Any:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "finished")
    return run_dir, Page(write_report(run_dir))


def test_the_page_shows_the_run(finished: tuple[Path, Page]) -> None:
    _, page = finished
    for text in ("finished", "59.0%", "14.0 from 45.0%", "Reward-Pass@2", "samples_per_iteration: 4", "0.85", "a.png"):
        assert text in page.text, text
    figures = [attributes["id"] for tag, attributes in page.tags if tag == "figure"]
    names = "accuracy exploration answering temperature sweep kept kinds loss_warmup loss_prm loss_evolve time"
    assert figures == [f"plot-{name}" for name in names.split()]
    iterations = page.samples["iterations"]
    assert [entry["iteration"] for entry in iterations] == [1, 2]
    assert [len(entry["queries"]) for entry in iterations] == [4, 4]
    query = iterations[0]["queries"][0]
    assert [(r["index"], r["correct"], r["score"], r["selected"]) for r in query["responses"]] == [
        (0, True, 0.9, True), (1, False, 0.4, False), (2, False, None, False),
    ]  # fmt: skip
    assert query["images"][0] in page.samples["images"]


def test_text_of_the_run_never_becomes_markup(finished: tuple[Path, Page]) -> None:
    _, page = finished
    assert len(page.scripts) == 2
    assert not [attributes for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
    assert page.samples["iterations"][0]["queries"][0]["question"] == f"What is the sum? {NASTY}"
    assert "{{tiles}}" in page.text and "\u2028" not in page.scripts[0]
    assert "innerHTML" not in page.source


def test_the_page_needs_nothing_else(finished: tuple[Path, Page]) -> None:
    run_dir, page = finished
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith("#"), attributes
    assert "default-src 'none'" in page.source and "@import" not in page.source
    assert len(page.source) < 1_000_000
    assert write_report(run_dir).read_text(encoding="utf-8") == page.source  # and it is made the same again


def test_the_plots_fit_one_page(finished: tuple[Path, Page]) -> None:
    run_dir, page = finished
    plots = all_plots(load_run(run_dir))
    ids = [found for plot in plots for found in re.findall(r'\bid="([^"]+)"', plot.svg)]
    assert len(ids) == len(set(ids))
    for plot in plots:
        assert not re.search(r"#[157]e000\d", plot.svg) and "var(--muted)" in plot.svg
        assert plot.svg.startswith("<svg") and "viewBox" in plot.svg and plot.caption.endswith(".")
    labels = {plot.name: re.findall(r"<text[^>]*>([^<]+)</text>", plot.svg) for plot in plots}
    assert "greedy accuracy (%)" in labels["accuracy"] and "iteration" in labels["accuracy"]
    assert "loss (nats per token)" in labels["loss_warmup"] and "optimizer step" in labels["loss_warmup"]
    assert "Reward-Pass@2 (%)" in labels["sweep"] and "time (seconds)" in labels["time"]
    assert "cost in $" in labels["kinds"]


def test_steps_without_a_finite_loss_are_counted(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 1001):
        log_step(log, "warmup", step, math.nan if step == 500 else 1.0 / step)
    loss = next(plot for plot in all_plots(load_run(tmp_path)) if plot.name == "loss_warmup")
    assert "1 steps without a finite loss" in loss.caption and "mean of 4 steps" in loss.caption
    assert len(loss.svg) < 40_000


@pytest.mark.parametrize("lines", [1, 6, 9, 14, 17, 21])
def test_a_page_at_any_moment(tmp_path: Path, lines: int) -> None:
    run_dir = make_run(tmp_path / "run", iterations=1, queries=1)
    log = run_dir / "metrics.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:lines]) + b'{"event": "ha')
    page = Page(write_report(run_dir))
    assert "pill done" not in page.source and "Damaged" not in page.text
    build_summary(run_dir)


def test_a_page_of_nothing(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    for text in ("no events yet", "Nothing has been measured yet", "No responses yet", "No settings yet"):
        assert text in page.text
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        write_report(tmp_path / "nowhere")


def test_damage_becomes_a_notice(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    block = run_dir / "rollouts" / "iteration_0001" / "block_00000.jsonl"
    block.write_bytes(block.read_bytes()[:-40])
    for image in (run_dir / "images").glob("2-*.png"):
        image.write_bytes(b"not an image")
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(b"garbage\n")
    (run_dir / "config.yaml").write_text("seed: [1")
    page = Page(write_report(run_dir))
    notices = page.source.split('class="notice"')[1].split("</section>")[0]
    for text in ("block_00000.jsonl", "2-0.png of query q-2-0", "metrics.jsonl, line", "config.yaml: not YAML"):
        assert text in notices, text
    assert [(entry["iteration"], len(entry["queries"])) for entry in page.samples["iterations"]] == [(1, 1), (2, 6)]
    assert "59.0%" in page.text


def test_many_skipped_items_are_counted(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for i in range(250):
        log.append("skipped", what="image", where=f"{i}.png", reason="cut off")
    page = Page(write_report(tmp_path))
    assert "250 × image" in page.text and "199.png" in page.text and "50 more are listed" in page.text


def test_the_sample_does_not_depend_on_the_blocks(tmp_path: Path) -> None:
    choices = []
    for block in (2, 7):
        write_rollouts(tmp_path / str(block), 1, 14, block=block)
        directory = tmp_path / str(block) / "rollouts" / "iteration_0001"
        choices.append([group.query.id for group in choose_groups(directory, 1, 7, [])])
    assert choices[0] == choices[1] and len(choices[0]) == 7
    assert choices[0] != [f"q-1-{i}" for i in range(7)]


def test_of_many_blocks_only_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rollouts(tmp_path, 1, 10, block=1)
    reads: list[str] = []

    def read(path: Path) -> list[Group]:
        reads.append(path.name)
        return read_groups(path)

    monkeypatch.setattr(samples_module, "read_groups", read)
    assert len(choose_groups(tmp_path / "rollouts" / "iteration_0001", 1, 4, [])) == 4
    assert reads == [f"block_{i:05d}.jsonl" for i in (0, 2, 5, 7)]


def test_a_full_page_keeps_every_iteration_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path / "run", iterations=3)
    one = len(json.dumps(collect_samples(load_run(run_dir)).iterations[0]["queries"][0]))
    monkeypatch.setattr(samples_module, "MOST_BYTES", 5 * (one + 3000))
    samples = collect_samples(load_run(run_dir))
    kept = [len(entry["queries"]) for entry in samples.iterations]
    assert len(kept) == 3 and min(kept) >= 1 and 0 < samples.left_out == 12 - sum(kept)
    assert f"{samples.left_out} more sampled queries were left out" in Page(write_report(run_dir)).text


def test_images_are_embedded_small(tmp_path: Path) -> None:
    small = data_url(write_image(tmp_path / "small.png"), tmp_path)
    assert small.startswith("data:image/png;base64,")
    large = data_url(write_image(tmp_path / "large.png", (1600, 900)), tmp_path)
    with Image.open(io.BytesIO(base64.b64decode(large.split(",")[1]))) as image:
        assert image.size == (448, 252)
    moved = ImageRef("small.png", write_image(tmp_path / "small.png").digest)
    assert data_url(moved, tmp_path) and tmp_path != Path.cwd()
    (tmp_path / "small.png").write_bytes(b"other")
    with pytest.raises(ValueError, match="has changed"):
        data_url(moved, tmp_path)


def test_pieces_cover_the_whole_text() -> None:
    text = "Look:\nFirst. \nSecond.\nThe answer is 5."
    steps = [Step(0, 3, "First. \n", 0.5, 1.0), Step(3, 6, "Second.\n", math.nan)]
    assert pieces(Response(0, [], text, steps=steps)) == [
        ["Look:", False, None, None], ["First.", True, 0.5, 1.0], ["Second.", True, None, None],
        ["The answer is 5.", False, None, None],
    ]  # fmt: skip
    assert pieces(Response(0, [], "no steps")) == [["no steps", False, None, None]]
    assert pieces(Response(0, [], "x", steps=[Step(0, 1, "elsewhere", 0.1)]))[0] == ["elsewhere", True, 0.1, None]


def test_the_room_opens_without_torch_and_matplotlib() -> None:
    modules = "html metrics plots progress samples summary tensorboard".split()
    imports = ", ".join(f"mstar_mega.report.{module}" for module in modules)
    code = f"import sys, {imports}; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
