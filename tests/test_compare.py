"""Runs side by side: entries over seeds, curves with errors, paired differences, a page and a CSV."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from groups import make_group, make_response

from mstar_mega import cli, settings
from mstar_mega.config import Config
from mstar_mega.data.records import write_groups
from mstar_mega.report.compare import curve, differing_settings, estimate, paired, read_entries
from mstar_mega.report.compare_page import render
from mstar_mega.report.metrics import MetricsLog


def make_run(folder: Path, name: str, seed: int, k: int, accuracies: list[float], right: str) -> Path:
    """A run with so many iterations; ``right`` has a 1 for each test question that its last policy answers."""
    run = folder / name
    run.mkdir()
    config = Config(seed=seed)
    config.run.dir, config.selection.k, config.parallel.tensor = str(run), k, 1 + seed
    (run / "config.yaml").write_text(settings.dump(config))
    log = MetricsLog(run / "metrics.jsonl")
    for i, accuracy in enumerate(accuracies):
        stage = "evolve" if i else "warmup"
        for split in ("test", "validation"):
            log.append(
                "evaluation", stage=stage, iteration=i, split=split, greedy_accuracy=accuracy, standard_error=0.05,
                queries=len(right), responses=len(right), tokens=9, by_kind={}, seconds=1.0,
            )  # fmt: skip
    log.close()
    where = run / "rollouts" / f"evaluation_{len(accuracies) - 1:04d}_test_greedy"
    where.mkdir(parents=True)
    groups = [make_group([make_response(0, correct=mark == "1")], f"q{i}") for i, mark in enumerate(right)]
    write_groups(where / "block_00000.jsonl", groups)
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path, "a0", 0, 2, [0.4, 0.5, 0.75], "1110"),
        make_run(tmp_path, "a1", 1, 2, [0.4, 0.6, 0.25], "1000"),
        make_run(tmp_path, "b0", 0, 4, [0.4, 0.3], "0100"),
        make_run(tmp_path, "b1", 1, 4, [0.4, 0.3], "0000"),
    ]


def test_runs_of_one_setting_are_one_entry_whatever_their_seed_and_layout(runs: list[Path]) -> None:
    entries = read_entries(runs)
    assert [(entry.label, entry.seeds) for entry in entries] == [("k 2", "0, 1"), ("k 4", "0, 1")]
    assert differing_settings([entry.runs[0] for entry in entries]) == {"selection.k": [2, 4]}
    (together,) = read_entries(runs, ["selection."])
    assert together.seeds == "0, 1, 0, 1"
    points, errors = curve(entries[0], "test", "greedy_accuracy")
    assert points == {0: 0.4, 1: pytest.approx(0.55), 2: 0.5} and errors[0] == 0.0
    assert errors[2] == pytest.approx(0.25) and errors[1] == pytest.approx(0.05)
    final = estimate(entries[0], "evolve", "test", "greedy_accuracy")
    assert final is not None and (final.value, final.runs) == (0.5, 2) and final.error == pytest.approx(0.25)
    (alone,) = [entry for entry in read_entries([runs[0], runs[2]]) if entry.label == "k 2"]
    single = estimate(alone, "evolve", "test", "greedy_accuracy")
    assert single is not None and single.error == 0.05, "of one run: over its queries"


def test_the_final_accuracies_are_paired_by_question_and_seed(runs: list[Path]) -> None:
    entries = read_entries(runs)
    found = paired(*entries)
    assert found is not None and (found.questions, found.seeds) == (8, 2)
    gaps = [1, 0, 1, 0, 1, 0, 0, 0]
    spread = math.sqrt(sum((gap - 3 / 8) ** 2 for gap in gaps) / 7 / 8)
    assert found.difference == pytest.approx(3 / 8) and found.error == pytest.approx(spread)
    assert found.error_over_seeds == pytest.approx(0.125) and found.is_clear == (3 / 8 > 2 * spread)
    # Other seeds have nothing to pair with.
    assert paired(*read_entries([runs[0], runs[3]])) is None


def test_the_page_and_the_table(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, table = tmp_path / "page.html", tmp_path / "all.csv"
    assert cli.main(["compare", *map(str, runs), "--out", str(page), "--csv", str(table)]) == 0
    said = capsys.readouterr().out
    assert "k 2 (seed 0, 1): final test accuracy 50.0 ± 25.0%" in said and "k 2 - k 4: +37.5 ± 18.3 points" in said
    text = page.read_text()
    assert text.count("<svg") == 2 and "http://" not in text.replace("http://www.w3.org", "") and "{{" not in text
    for part in (
        "selection.k",
        "37.5 points",
        "<td>clear</td>",
        'aria-label="Test accuracy. queries (%): k 2 40.0 in iteration 0, 50.0 in iteration 2',
        "50.0 ± 25.0%",
    ):
        assert part in text, part
    rows = list(csv.DictReader(table.open()))
    wanted = {"entry": "k 4", "seed": "1", "iteration": "1", "split": "test", "measure": "greedy_accuracy"}
    (row,) = [row for row in rows if row.items() >= wanted.items()]
    assert float(row["value"]) == 0.3 and float(row["standard_error"]) == 0.05
    before = sorted(path.name for path in runs[0].iterdir())
    assert "page.html" not in before and "report.html" not in before, "nothing is written into a run"


def test_what_a_run_says_cannot_leave_its_place_on_the_page(runs: list[Path]) -> None:
    for run, rule in zip(runs[::2], ("</script><script>alert(1)</script>{{style}}", "b"), strict=True):
        text = (run / "config.yaml").read_text().replace("rule: top_k", f"rule: {rule!r}")
        (run / "config.yaml").write_text(text)
    page = render(read_entries([runs[0], runs[2]]))
    assert "<script>alert" not in page and "{{style}}" in page.replace("&lt;", "<").replace("&gt;", ">")


def test_damaged_and_missing_runs(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for given, said in (
        ([runs[0]], "give at least two run directories"),
        ([runs[0], runs[0]], "is named twice"),
        ([runs[0], tmp_path / "none"], "none is not a directory"),
        ([runs[0], tmp_path / "empty"], "empty is not the directory of a run"),
    ):
        assert cli.main(["compare", *map(str, given)]) == 2
        assert said in capsys.readouterr().err
    (block,) = runs[0].rglob("block_*.jsonl")
    block.write_bytes(block.read_bytes()[:-9])
    page = render(read_entries([runs[0], runs[2]]))
    assert "is cut off or altered" in page and "there is nothing to pair" in page.replace("\n", " ")
