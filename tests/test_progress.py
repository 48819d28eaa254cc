"""Progress: plain lines, bars on a terminal, silence."""

from __future__ import annotations

import io
import sys

import pytest

from mstar_mega.report import progress as progress_module
from mstar_mega.report.progress import Progress, clock


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


def test_an_interrupted_task_does_not_look_finished(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(True) as progress, progress.task("train", 9, "steps") as task:
        task.advance(4)
        raise KeyboardInterrupt
    assert capsys.readouterr().out.splitlines()[-1].startswith("train: interrupted after 4 of 9 steps in ")


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
