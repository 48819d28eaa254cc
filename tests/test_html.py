"""The page of a run: its plots, samples and images, at any moment and of damaged runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import NASTY, evaluation, log_step, make_run

from mstar_mega.report.html import write_report
from mstar_mega.report.metrics import MetricsLog
from mstar_mega.report.plots import all_plots
from mstar_mega.report.run import load_run
from mstar_mega.report.summary import build_summary

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
    names = "accuracy exploration answering temperature sweep pass_at_most_k_by_temperature"
    names += " reward_pass_at_k_by_temperature kept kinds loss_warmup loss_prm loss_evolve time"
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
    sweeps = next(plot.caption for plot in plots if plot.name == "sweep")
    assert "Iteration 2: temperature 1 is chosen by Reward-Pass@2, 70.0%; +5.0 ± 1.0 points" in sweeps
    assert "Reward-Pass@2 (%)" in labels["sweep"] and "time (seconds)" in labels["time"]
    assert "cost in $" in labels["kinds"]
    assert {"Pass@16", "Reward-Pass@2", "Pass@2", "greedy"} <= set(labels["exploration"])
    exploration = next(plot.caption for plot in plots if plot.name == "exploration")
    assert "the PRM's choice is +7.0 ± 2.0 points from random" in exploration
    by_temperature = labels["pass_at_most_k_by_temperature"]
    assert {"Pass@16 (%)", "0.5", "1", "80.0", "90.0"} <= set(by_temperature), "each temperature's line and its end"


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
    for text in ("block_00000.jsonl", ".png of query q-2-", "metrics.jsonl, line", "config.yaml: not YAML"):
        assert text in notices, text
    assert [(entry["iteration"], len(entry["queries"])) for entry in page.samples["iterations"]] == [(1, 1), (2, 6)]
    assert "59.0%" in page.text


def test_many_skipped_items_are_counted(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for i in range(250):
        log.append("skipped", what="image", where=f"{i}.png", reason="cut off")
    page = Page(write_report(tmp_path))
    assert "250 × cut off" in page.text and "199.png" in page.text and "50 more are listed" in page.text


def test_the_prm_stands_beside_what_is_free(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")))
    section = page.source.split('id="prm"')[1].split("</section>")[0]
    assert section.count("<tr>") == 2 * 5 + 3, "after training, at the start, two iterations; among the correct; rules"
    assert "0.660 ± 0.020" in section and "<td>+0.160 ± 0.025</td>" in section
    assert "<b>+0.050 ± 0.025</b>" in section, "not above two standard errors"
    assert "75.0%" in section and "top k by PRM" in section
    assert "0.660" in page.text and "the best free score, policy log-prob: 0.610" in page.text


def test_a_prm_without_anything_to_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("prm_quality", stage="prm", iteration=0, split="held_out", within_query_auc=None, mixed_queries=0)
    log.append("prm_quality", accuracy=0.9)  # of an older version
    assert "no query has right and wrong responses" in Page(write_report(tmp_path)).text


def test_plots_say_what_they_show_and_shares_have_errors(finished: tuple[Path, Page]) -> None:
    run_dir, page = finished
    named = [attributes["aria-label"] or "" for tag, attributes in page.tags if attributes.get("role") == "img"]
    plots = all_plots(load_run(run_dir))
    assert len(named) == len(plots) and all(re.match(r".+\. .*\d", name) for name in named), named
    assert "Accuracy. greedy accuracy (%): validation 50.0 in iteration 0, 60.0 in iteration 2" in named[0]
    shares = [plot for plot in plots if not plot.name.startswith(("loss", "time", "temperature"))]
    assert all("standard error" in plot.caption for plot in shares), [plot.name for plot in shares]
    labels = [attributes for tag, attributes in page.tags if tag in ("input", "select")]
    assert len(labels) == 2 and labels[1]["type"] == "search" and labels[1]["aria-label"]


def test_questions_by_kind_have_errors_where_they_were_counted(tmp_path: Path) -> None:
    def drawn(counted: dict[str, int]) -> str:
        log = MetricsLog(tmp_path / "metrics.jsonl")
        evaluation(log, "evolve", 1, "test", 0.5, kind_queries=counted)
        log.close()
        plot = next(plot for plot in all_plots(load_run(tmp_path)) if plot.name == "kinds")
        (tmp_path / "metrics.jsonl").unlink()
        return plot.caption + plot.svg

    few, many = drawn({"sum": 10, "cost in $": 10}), drawn({"sum": 1000, "cost in $": 1000})
    assert "± one standard error" in few and few != many and "standard error" not in drawn({})


def test_a_kind_without_a_share_is_not_said_to_have_none_right(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    evaluation(log, "evolve", 1, "test", 0.5, by_kind={"sum": 0.25, "count": float("nan")})
    log.close()
    plot = next(plot for plot in all_plots(load_run(tmp_path)) if plot.name == "kinds")
    assert plot.described == "now: sum 25%" and "count" not in plot.svg


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_runs_the_script_that_the_policy_allows(finished: tuple[Path, Page], tmp_path: Path) -> None:
    run_dir, _ = finished
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    page = (run_dir / "report.html").resolve().as_uri()
    seen = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=60, check=True).stdout
    assert seen.count('class="card response') == 3 and "all (4)" in seen and "1 of 4" in seen


def test_the_room_opens_without_torch_and_matplotlib() -> None:
    modules = "html images metrics plots progress samples summary tensorboard".split()
    imports = ", ".join(f"mstar_mega.report.{module}" for module in modules)
    code = f"import sys, {imports}; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_lost_selection_is_told_and_the_page_may_be_written_elsewhere(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    events = {event["iteration"] for event in load_run(run_dir).of("selection")}
    assert events and "selected.json is missing" not in Page(write_report(run_dir)).text
    lost = next(run_dir.glob("rollouts/iteration_0001/selected.json"))
    lost.unlink()
    (run_dir / "report.html").unlink()
    page = Page(write_report(run_dir, tmp_path / "elsewhere.html"))
    assert "iteration_0001/selected.json is missing" in page.text
    assert not (run_dir / "report.html").exists()


def test_a_change_has_a_colour_only_beyond_two_standard_errors() -> None:
    from mstar_mega.report.headline import change_tile
    from mstar_mega.report.summary import share_error

    assert share_error(0.5, 100) == 0.05 and share_error(None, 9) is share_error(0.5, None) is None
    for start, end, queries, kind in (
        (0.5, 0.7, 100, "up"),
        (0.5, 0.6, 100, ""),
        (0.7, 0.5, 100, "down"),
        (0.5, 0.7, 9, ""),
        (0.1, 0.9, None, ""),
    ):
        assert f'class="note {kind}"' in change_tile("a", start, end, queries), (start, end, queries)
