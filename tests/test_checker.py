"""The checker: symbolic equality in a worker that may hang, die or be missing, and hostile answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hostile import HOSTILE

from mstar_mega.rewards.answers import Verdict, answer_key, extract_answer
from mstar_mega.rewards.checker import AnswerChecker
from mstar_mega.rewards.steps import split_steps


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(timeout_seconds=1.0) as instance:
        yield instance


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("$2\\sqrt{3}$", "\\sqrt{12}", True),
        ("2\u221a3", "sqrt(12)", True),
        ("2\u03c0", "2 pi", True),
        ("2(x+1)", "2x + 2", True),
        ("x**2", "x^2", True),
        ("sin(x)/cos(x)", "\\tan x", True),
        ("2x+1", "2x-1", False),
        ("f'", "f+0", False),
        ("3 cm", "3 kg", False),
        ("\\sqrt{4}, 3", "2, 3+0", True),
        ("3+0, 2", "2, 3+0", False),
        ("(2,1)", "(5,3)", False),
        ("\\{\\sqrt{4},1\\}", "\\{1,2\\}", True),
        ("((((x", "x+1", False),
    ],
)
def test_symbolic(checker: AnswerChecker, answer: str, gold: str, correct: bool) -> None:
    assert checker.check(answer, gold) == Verdict(correct, "symbolic" if correct else "none")


def test_plain_verdicts_never_start_a_worker() -> None:
    with AnswerChecker() as checker:
        assert checker.check("5.0", "5") == Verdict(True, "numeric")
        assert checker.check("no", "No") == Verdict(True, "exact")
        assert checker.check("B. 12", "B", ("7", "12")) == Verdict(True, "choice")
        assert checker.check(None, "5") == Verdict(False, "none")
        assert checker.check("9**9**9**9", "5") == Verdict(False, "none")
        assert checker._worker is None
        assert checker.counts == {"numeric": 1, "exact": 1, "choice": 1, "none": 2}


def test_hostile_answers_neither_hang_nor_crash() -> None:
    start = time.perf_counter()
    with AnswerChecker(timeout_seconds=0.5) as checker:
        for text in HOSTILE:
            assert not checker.check(text, "x^2+7").correct, text[:40]
            assert checker.check(text, "A", ("7", text)) == Verdict(False, "none"), text[:40]
            if "# Answer" not in text:
                assert extract_answer(f"a\n\n# Answer\n\n{text}") == (text.strip() or None)
            assert [step.end for step in split_steps([0], [len(text)], text)] == ([1] if text.strip() else [])
            assert answer_key(text) == answer_key(text)
        assert checker.counts["error"] == 0
    assert time.perf_counter() - start < 60


def test_runaway_algebra_times_out_and_the_next_answer_is_judged_as_ever(checker: AnswerChecker) -> None:
    before = checker.counts["timeout"]
    start = time.perf_counter()
    assert checker.check("x<999999999!", "x<3y") == Verdict(False, "timeout")
    assert time.perf_counter() - start < 55, "not by the wall clock"
    assert checker.check("x+3", "3+x") == Verdict(True, "symbolic")
    start = time.perf_counter()
    assert checker.check("x<999999999!", "x<3y") == Verdict(False, "timeout"), "remembered"
    assert time.perf_counter() - start < 0.1
    assert checker.counts["timeout"] == before + 2


def test_a_killed_worker_does_not_change_the_verdict(checker: AnswerChecker) -> None:
    assert checker.check("x+4", "4+x").correct
    assert checker._worker is not None
    os.kill(checker._worker.pid, signal.SIGKILL)
    checker._worker.wait()
    assert checker.check("x+5", "5+x") == Verdict(True, "symbolic")


def test_a_worker_that_always_dies_counts_as_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with AnswerChecker() as checker:
        start = checker._start

        def start_and_kill() -> subprocess.Popen[bytes]:
            worker = start()
            worker.kill()
            worker.wait()
            return worker

        monkeypatch.setattr(checker, "_start", start_and_kill)
        assert checker.check("x+1", "1+x") == Verdict(False, "error")
        assert checker.counts == {"error": 1}


def test_a_stopped_worker_meets_the_wall_clock_limit() -> None:
    with AnswerChecker(wall_seconds=0.5) as checker:
        worker = checker._start()
        os.kill(worker.pid, signal.SIGSTOP)
        start = time.perf_counter()
        assert checker.check("x+1", "1+x") == Verdict(False, "timeout")
        assert 0.4 < time.perf_counter() - start < 20
        assert worker.poll() is not None, "killed"


def test_worker_sees_no_torch_and_nothing_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    monkeypatch.setenv("RANK", "0")
    with AnswerChecker() as checker:
        worker = checker._start()
        with open(f"/proc/{worker.pid}/environ", "rb") as file:
            names = {entry.split(b"=")[0] for entry in file.read().split(b"\0")}
        with open(f"/proc/{worker.pid}/maps", encoding="utf-8") as file:
            assert "libtorch" not in file.read()
        assert not names & {b"MASTER_ADDR", b"RANK", b"WORLD_SIZE", b"LOCAL_RANK"}
    assert worker.poll() is not None
    code = "import sys, mstar_mega.rewards.checker, mstar_mega.evaluation.command; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_missing_library_is_said_and_a_bad_limit_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    with AnswerChecker() as checker:
        monkeypatch.setattr(sys, "executable", getattr(sys, "_base_executable", sys.executable))
        with pytest.raises(RuntimeError, match="math[-_]verify"):
            checker.check("x+1", "1+x")
    with pytest.raises(ValueError, match="timeout_seconds"):
        AnswerChecker(0)
