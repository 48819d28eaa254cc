"""Answers, the checker's worker, steps, selection and voting."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction

import pytest

from mstar_mega.config import SelectionConfig
from mstar_mega.data.types import Group, Query, Response, Step
from mstar_mega.rewards.answers import (
    Number,
    Verdict,
    answer_key,
    answers_equal,
    extract_answer,
    normalize,
    parse_number,
    plain_verdict,
    resolve_choice,
    to_latex,
)
from mstar_mega.rewards.checker import AnswerChecker
from mstar_mega.rewards.selection import SelectionSummary, select
from mstar_mega.rewards.steps import count_stepless, reduce_scores, split_steps, warn_stepless
from mstar_mega.rewards.voting import apply_pseudo_answers, best_of_n, majority_vote, vote


def make_response(
    index: int, score: float | None = None, correct: bool | None = None, answer: str | None = None
) -> Response:
    return Response(index, [], "", score=score, correct=correct, answer=answer)


def make_group(
    responses: list[Response], name: str = "q", answer: str | None = None, choices: tuple[str, ...] = ()
) -> Group:
    return Group(Query(name, "?", (), answer, choices), responses)


# ------------------------------------------------------------------------------------------------------ extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First.\n\nSecond.\n\n# Answer\n\n12", "12"),
        ("First.\n# Answer\n12\n\n\n", "12"),
        ("# answer\n\n  No  ", "No"),
        ("a\r\n\r\n#ANSWER:\r\n\r\nB\r\n", "B"),
        ("a\n\n## **Answer** 7", "7"),
        ("a\n\n  # Answer: 3/4", "3/4"),
        ("# Answer\n\n1\n\n# Answer\n\n2", "2"),
        ("# Answer\n\n1\n\n# Answer\n\n", None),
        ("# Answer\n\n  \n", None),
        ("the # Answer 5", None),
        ("# Answers\n\n5", None),
        ("#Answering", None),
        ("Answer\n\n5", None),
        ("", None),
        ("# Answer\n\n5\n\nBecause.", "5\n\nBecause."),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("  The CAT. ", "the cat"),
        ("$\\boxed{12}$", "12"),
        ("\\boxed{\\text{no}}", "no"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("**`B`**", "b"),
        ('"yes!"', "yes"),
        ("5!", "5!"),
        (".5", ".5"),
        ("\\[ x + 1 \\]", "x+1"),
        ("\\left( 1 , 2 \\right)", "(1,2)"),
        ("50\\%", "50%"),
        ("\u221212", "-12"),
        ("1\u200b2", "12"),
        ("1\x002", "1 2"),
        ("...", ""),
    ],
)
def test_normalize(raw: str, plain: str) -> None:
    assert normalize(raw) == plain


def test_normalize_is_idempotent_and_total_on_random_strings() -> None:
    rng = random.Random(0)
    pieces = ["\\boxed{", "\\text{", "{", "}", "$", "**", "_", '"', ".", "!", " ", "\n", "\\", "5", "ab", "\\%", ","]
    pieces += ["#", "\x00", "\u0663", "\u00df", "\u0130", "\U0001f600", "\ud800", "{,}", "\\,", "te", "xt{", "("]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        once = normalize(text)
        assert normalize(once) == once, repr(text)
        parse_number(once)
        to_latex(once)
        assert answers_equal(text, text) == bool(text.strip()), repr(text)


# ---------------------------------------------------------------------------------------------------- plain equality


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("+12.0", 12),
        ("-0.50", Fraction(-1, 2)),
        (".5", Fraction(1, 2)),
        ("12.", 12),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("3 \\times 10^{4}", 30000),
        ("-10^2", -100),
        ("3/4", Fraction(3, 4)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("\\frac12", Fraction(1, 2)),
        ("2 1/2", Fraction(5, 2)),
        ("2\\frac{1}{2}", Fraction(5, 2)),
        ("45^\\circ", 45),
        ("007", 7),
    ],
)
def test_parse_number(text: str, value: int | Fraction) -> None:
    assert parse_number(normalize(text)) == Number(Fraction(value))


@pytest.mark.parametrize(
    "text",
    ["", "x", "1,23", "12,3456", "1.2.3", "1/0", "--1", "1e", "\u0661\u0662", "1_000", "inf", "nan", "0x10", "1 2",
     "5 cm", "1e999999999", "1e-99999", "10^{999}", "9" * 129, "9" * 10_000_000, "1/" + "9" * 200],
)  # fmt: skip
def test_not_a_number_or_too_large_for_one(text: str) -> None:
    start = time.perf_counter()
    assert parse_number(normalize(text)) is None
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("NO", "No", True),
        ("\\boxed{20}", "20", True),
        ("20.0", "20", True),
        ("1,000", "1000", True),
        ("$1{,}000$", "1000", True),
        ("0.5", "1/2", True),
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("50", "50%", True),
        ("50", "0.5", False),
        ("5%", "50%", False),
        ("0.333", "1/3", False),
        ("x = 5", "5", True),
        ("x=5", "y=5", False),
        ("3+5", "8", False),
        ("2-1", "1", False),
        ("5 cm", "5 kg", False),
        ("20", "twenty", False),
        ("12", "1 2", False),
        ("\u0665", "5", False),
        ("", "5", False),
        ("...", "5", False),
        ("?", "?", True),
        ("(B)", "B", True),
        ("b.", "B", True),
        ("A or B", "B", False),
        ("x+1", "1+x", False),
    ],
)
def test_answers_equal(answer: str, gold: str, equal: bool) -> None:
    assert answers_equal(answer, gold) is equal


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(b)", "B"), ("[B]", "B"), ("B.", "B"), ("B)", "B"), ("**B**", "B"), ("Option B", "B"),
        ("B. 12", "B"), ("(B) 12", "B"), ("B: 12.0", "B"), ("12", "B"), ("12.0", "B"), ("\\boxed{\\text{B}}", "B"),
        ("red", "C"), ("Red.", "C"), ("1/2", "D"), ("0.5", "D"),
        ("B. 7", None), ("A. 12", None), ("A or B", None), ("AB", None), ("E", None), ("13", None), ("", None),
        ("B is wrong", None), ("the red one", None), ("blue", None),
    ],
)  # fmt: skip
def test_resolve_choice(answer: str, letter: str | None) -> None:
    assert resolve_choice(answer, ("7", "12", "Red", "$\\frac{1}{2}$")) == letter


def test_choice_verdicts_and_ambiguity() -> None:
    assert plain_verdict("12", "B", ("7", "12")) == Verdict(True, "choice")
    assert plain_verdict("7", "B", ("7", "12")) == Verdict(False, "none")
    assert not answers_equal("12", "A", ("12", "12")), "the same text twice is ambiguous"
    assert answers_equal("A", "A", ("12", "12"))
    labels = ("D", "A", "C", "B")
    assert answers_equal("B", "B", labels) and not answers_equal("B", "D", labels), "a lone letter is the letter"
    assert answers_equal("0.5", "B", ("1/2", "0.5")) and answers_equal("1/2", "A", ("1/2", "0.5"))
    assert answers_equal("B", "12", ("7", "12")), "a gold answer given as the choice's text"
    with pytest.raises(ValueError, match="27 choices"):
        resolve_choice("A", ("x",) * 27)


def test_undecided_only_where_both_are_short_mathematics() -> None:
    assert plain_verdict("x+1", "1+x") is None
    assert plain_verdict("2\\sqrt{3}", "\\sqrt{12}") is None
    for answer, gold in [("cat+dog", "1+x"), ("x+1", "a cat"), ("x+1", "3"), ("x" + "+1" * 400, "1+x"), ("y", "x")]:
        assert plain_verdict(answer, gold) == Verdict(False, "none")


def test_answer_key_agrees_with_equality() -> None:
    answers = ["5", "5.0", "+5", "10/2", "\\boxed{5}", "five", "Five.", "50%", "0.5", "1/2", "...", "(5)", "x=5"]
    for first, second in itertools.product(answers, repeat=2):
        if answer_key(first) == answer_key(second):
            assert answers_equal(first, second)
    assert len({answer_key(answer) for answer in answers[:5]}) == 1
    assert answer_key("B. 12", ("7", "12")) == answer_key("12", ("7", "12")) == answer_key("(b)", ("7", "12"))


# ------------------------------------------------------------------------------------------------------ the checker


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
        ("\\{1,2\\}", "\\{2,1\\}", True),
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


HOSTILE = [
    "9^{9^{9^{9}}}", "1e999999999", "9" * 10_000_000, "x" * 1_000_000, "(" * 1_000_000, "{" * 500_000,
    "\\boxed{" * 200_000, "\\te" * 100 + "xt{" * 100, "(" * 250 + "x" + ")" * 250, "\\frac{" * 80 + "x" + "}{2}" * 80,
    "%s%n{0.__class__}", "{x!r:>999999999}", "\x00\x01\x02x+1", "\u0661+\u0662", "\uff11\uff0b\uff12", "\ud800+1",
    "__import__('os').system('true')", "$" * 100_000, "\n" * 1_000_000, " " * 1_000_000 + "!", "_" * 100_001,
    "x" + "!" * 500, "-" * 500 + "1x", "1" + "+1" * 60 + "+x", "\\\\\\", "x_{", "|" * 513 + "1",
]  # fmt: skip


def test_hostile_answers_neither_hang_nor_crash() -> None:
    start = time.perf_counter()
    with AnswerChecker(timeout_seconds=0.5) as checker:
        for text in HOSTILE:
            assert not checker.check(text, "x^2+7").correct, text[:40]
            assert checker.check(text, "A", ("7", text)) == Verdict(False, "none"), text[:40]
            assert extract_answer(f"a\n\n# Answer\n\n{text}") == (text.strip() or None)
            assert [step.end for step in split_steps([0], [len(text)], text)] == ([1] if text.strip() else [])
            assert answer_key(text) == answer_key(text)
        assert checker.counts["error"] == 0
    assert time.perf_counter() - start < 60


def test_runaway_algebra_times_out_and_the_next_answer_is_judged_as_ever(checker: AnswerChecker) -> None:
    before = checker.counts["timeout"]
    start = time.perf_counter()
    assert checker.check("999999999!", "3x") == Verdict(False, "timeout")
    assert time.perf_counter() - start < 55, "not by the wall clock"
    assert checker.check("x+3", "3+x") == Verdict(True, "symbolic")
    start = time.perf_counter()
    assert checker.check("999999999!", "3x") == Verdict(False, "timeout"), "remembered"
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
    code = "import sys, mstar_mega.rewards.checker, mstar_mega.evaluation.passk; sys.exit('torch' in sys.modules)"
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


# ------------------------------------------------------------------------------------------------------------ steps


def by_pieces(*pieces: str) -> list[Step]:
    """Split a response whose tokens are these pieces of text."""
    return split_steps(range(len(pieces)), list(itertools.accumulate(map(len, pieces))), "".join(pieces))


def ranges(steps: list[Step]) -> list[tuple[int, int, str]]:
    return [(step.start, step.end, step.text) for step in steps]


def test_steps_of_a_plain_response() -> None:
    steps = by_pieces("One", ".", "\n\n", "Two", "\n\n", "# Answer", "\n\n", "12", "")
    assert ranges(steps) == [(0, 3, "One."), (3, 5, "Two"), (5, 9, "# Answer\n\n12")]


@pytest.mark.parametrize("gap", ["\n\n", "\n \n", "\n\n\n\n", "\r\n\r\n", "\n\t\n ", "\n\n    "])
def test_separators(gap: str) -> None:
    steps = by_pieces(*f"one\nstill one{gap}two{gap}# Answer{gap}3{gap}")
    assert [step.text for step in steps] == ["one\nstill one", "two", f"# Answer{gap}3".strip()]


def test_single_line_breaks_do_not_separate() -> None:
    assert len(by_pieces(*"a\nb\r\nc\n")) == 1
    with_answer = by_pieces(*"a\nb\n# Answer\nc")
    assert [step.text for step in with_answer] == ["a\nb", "# Answer\nc"], "except before the answer"


def test_answer_blocks() -> None:
    assert len(by_pieces(*"# Answer\n\n5\n\nmore\n\nmore")) == 1
    twice = by_pieces(*"\n\n# Answer\n\n1\n\n# Answer\n\n2")
    assert [step.text for step in twice] == ["# Answer", "1", "# Answer\n\n2"], "the last heading opens the block"
    assert [step.text for step in by_pieces(*"a\n\n  # Answer\n\n")] == ["a", "# Answer"]


def test_straddling_tokens_belong_to_the_step_they_end_in() -> None:
    assert ranges(by_pieces("a", ".\n\nB", "b")) == [(0, 1, "a."), (1, 3, "Bb")]
    assert ranges(by_pieces("a", ".\n", "\nB", "b")) == [(0, 2, "a."), (2, 4, "Bb")]
    assert ranges(by_pieces("a\n\nb\n\nc", "d")) == [(0, 2, "a\n\nb\n\ncd")], "steps without a token join the next"
    assert ranges(by_pieces("x\n\n", "a\n\nb")) == [(0, 1, "x"), (1, 2, "a\n\nb")]


def test_tokens_without_characters() -> None:
    assert ranges(by_pieces("", "a\n\n", "", "", "\u4e2d", "", "")) == [(0, 2, "a"), (2, 7, "\u4e2d")]


@pytest.mark.parametrize("text", ["", " ", "\n\n", " \r\n \t\n"])
def test_no_step(text: str) -> None:
    assert by_pieces(*text, "") == []


def test_step_ranges_tile_random_responses() -> None:
    rng = random.Random(1)
    alphabet = ["a", "b ", "\n", "\n\n", " ", "\r\n", "# Answer", "\n# Answer\n", "\t", "7", "", "\u4e2d", "c\n\nd"]
    for _ in range(3000):
        pieces = rng.choices(alphabet, k=rng.randrange(1, 14))
        steps = by_pieces(*pieces)
        text = "".join(pieces)
        assert bool(steps) == bool(text.strip())
        if not steps:
            continue
        assert steps[0].start == 0 and steps[-1].end == len(pieces)
        assert all(a.end == b.start for a, b in itertools.pairwise(steps))
        assert all(step.start < step.end and step.text == step.text.strip() != "" for step in steps)
        assert "".join("".join(step.text.split()) for step in steps) == "".join(text.split()), "no text is lost"
        answer = extract_answer(text)
        if answer is not None:
            assert steps[-1].text.endswith(answer)
        if all(len(piece) == 1 for piece in pieces):
            for step in steps:
                assert text[step.start : step.end].strip() == step.text


def test_malformed_offsets_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="2 tokens"):
        split_steps([1, 2], [1], "a")
    with pytest.raises(AssertionError, match="decrease"):
        split_steps([1, 2], [2, 1], "ab")


def test_reduce_scores() -> None:
    scores = [0.5, 0.25, 1.0]
    assert [reduce_scores(scores, how) for how in ("min", "prod", "mean", "last")] == [0.25, 0.125, 1.75 / 3, 1.0]
    assert all(reduce_scores([], how) is None for how in ("min", "prod", "mean", "last"))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            reduce_scores([0.5, bad], "min")
    with pytest.raises(ValueError, match="reduction"):
        reduce_scores([0.5], "max")  # type: ignore[arg-type]


def test_stepless_responses_are_counted_and_said() -> None:
    group = make_group([make_response(0), make_response(1)])
    group.responses[1].steps = [Step(0, 1, "a")]
    assert count_stepless([group, group]) == 2
    assert warn_stepless(0, 9) is None
    assert warn_stepless(1, 9) == "1 of 9 responses have no step and no process score."
    assert "HALF" in (warn_stepless(5, 9) or "") and "HALF" not in (warn_stepless(4, 8) or "")
    assert "NO RESPONSE" in (warn_stepless(9, 9) or "")


# -------------------------------------------------------------------------------------------------------- selection


def picked(group: Group, rule: str, k: int = 2, threshold: float = 0.5, seed: int = 0) -> list[int]:
    chosen = select(group, SelectionConfig(rule, k, threshold), seed)  # type: ignore[arg-type]
    assert chosen == [response for response in sorted(group.responses, key=lambda r: r.index) if response.selected]
    return [response.index for response in chosen]


def test_selection_rules() -> None:
    scores = [0.9, 0.2, 0.7, 0.7, 0.99, 0.7]
    right = [True, True, True, True, False, True]
    group = make_group([make_response(i, s, c) for i, (s, c) in enumerate(zip(scores, right, strict=True))])
    assert picked(group, "all_correct") == [0, 1, 2, 3, 5]
    assert picked(group, "top_k", 1) == [0]
    assert picked(group, "top_k", 2) == [0, 2], "ties go to the lower index"
    assert picked(group, "top_k", 99) == [0, 1, 2, 3, 5]
    assert picked(group, "threshold", threshold=0.7) == [0], "above, not at"
    assert picked(group, "threshold", threshold=0.1) == [0, 1, 2, 3, 5]
    group.responses.reverse()
    assert picked(group, "top_k", 3) == [0, 2, 3]
    assert picked(make_group([make_response(0, 0.5, False)]), "top_k") == []


def test_random_k_depends_on_seed_query_and_index_only() -> None:
    responses = [make_response(i, correct=i % 3 != 0) for i in range(16)]
    first = picked(make_group(responses, "q1"), "random_k")
    assert len(first) == 2 and all(i % 3 for i in first)
    assert first == picked(make_group(responses[::-1], "q1"), "random_k")
    picks = [tuple(picked(make_group(responses, f"q{i}"), "random_k")) for i in range(300)]
    assert len(set(picks)) > 30
    counts = [sum(i in pick for pick in picks) for i in range(16)]
    assert all(counts[i] == 0 if i % 3 == 0 else 30 < counts[i] < 95 for i in range(16)), "about uniform (60 expected)"
    assert picks != [tuple(picked(make_group(responses, f"q{i}"), "random_k", seed=1)) for i in range(300)]


def test_selection_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match="not been judged"):
        picked(make_group([make_response(0, 0.5)]), "top_k")
    for score in (None, float("nan")):
        with pytest.raises(ValueError, match="process score"):
            picked(make_group([make_response(0, score, True)]), "top_k")
    with pytest.raises(ValueError, match="selection.k"):
        picked(make_group([make_response(0, 0.5, True)]), "random_k", 0)
    with pytest.raises(ValueError, match="selection.rule"):
        picked(make_group([make_response(0, 0.5, True)]), "best")
    assert picked(make_group([make_response(0, None, True)]), "all_correct") == [0], "needs no scores"


def test_summary_adds_merges_and_survives_json() -> None:
    rng = random.Random(2)
    groups = [
        make_group([make_response(i, rng.random(), rng.random() < 0.3) for i in range(4)], f"q{n}") for n in range(40)
    ]
    whole, left, right = SelectionSummary(), SelectionSummary(), SelectionSummary()
    for number, group in enumerate(groups):
        picked(group, "threshold", threshold=0.4)
        whole.add(group)
        (left if number % 3 else right).add(group)
    left.merge(right)
    assert left == whole == SelectionSummary.from_json(json.loads(json.dumps(whole.to_json())))
    everything = [response for group in groups for response in group.responses]
    assert (whole.queries, whole.responses) == (40, 160)
    assert whole.correct == sum(bool(r.correct) for r in everything) > whole.selected
    assert whole.selected == sum(r.selected for r in everything) == sum(k * n for k, n in whole.kept_per_query.items())
    assert whole.kept_per_query[0] == whole.queries_without_selection > whole.queries_without_correct > 0


# ----------------------------------------------------------------------------------------------------------- voting


def ballots(*pairs: tuple[str | None, float | None]) -> list[Response]:
    return [make_response(i, score, answer=answer) for i, (answer, score) in enumerate(pairs)]


def test_votes() -> None:
    responses = ballots(("7", 0.9), ("5", 0.5), (None, None), ("5.0", 0.3), ("\\boxed{5}", 0.2), ("8", 0.95))
    assert vote(responses) == majority_vote(responses) == "5"
    assert best_of_n(responses) == "8"
    responses[1].score = 0.1
    assert vote(responses) == "8" and majority_vote(responses) == "5"
    assert vote(responses[::-1]) == "8" and majority_vote(responses[::-1]) == "5"


def test_vote_ties_and_edges() -> None:
    assert vote(ballots(("1", 0.5), ("2", 0.25), ("2", 0.25))) == "2", "equal sums: more votes"
    assert vote(ballots(("1", 0.5), ("2", 0.5))[::-1]) == "1", "then first seen, by sample index"
    assert majority_vote(ballots(("2", None), ("1", None))) == "2"
    assert best_of_n(ballots(("1", 0.5), ("2", 0.5))) == "1"
    assert vote(ballots((None, 0.5))) is majority_vote([]) is best_of_n([]) is None
    assert best_of_n(ballots((None, 0.9), ("1", 0.5))) is None, "the best response has no answer"
    assert best_of_n(ballots(("1", None), ("2", 0.0))) == "2", "unscored ranks last"
    assert vote(ballots(("12", 0.4), ("B", 0.4), ("A", 0.5)), ("7", "12")) == "B"
    with pytest.raises(ValueError, match="process score"):
        vote(ballots(("1", None)))
    with pytest.raises(ValueError, match="NaN"):
        best_of_n(ballots(("1", float("nan"))))


def test_vote_matches_brute_force() -> None:
    rng = random.Random(3)
    for _ in range(500):
        responses = ballots(*((rng.choice("123"), rng.choice([0.25, 0.5, 1.0])) for _ in range(rng.randrange(1, 8))))
        best = None
        for candidate in "123":
            mine = [r for r in responses if r.answer == candidate]
            if mine:
                key = (sum(r.score or 0 for r in mine), len(mine), -mine[0].index)
                best = max(best, (key, candidate)) if best else (key, candidate)
        assert best is not None
        assert vote(rng.sample(responses, len(responses))) == best[1]


def test_pseudo_answers() -> None:
    group = make_group(ballots(("7", 0.9), ("5", 0.1)))
    group.responses[0].selected = True
    group.responses[1].correct = True
    voted = apply_pseudo_answers(group)
    assert voted.query.answer == "7" and group.query.answer is None
    assert all(r.correct is None and not r.selected for r in voted.responses)
    assert group.responses[0].selected and group.responses[1].correct, "the original is untouched"
    assert apply_pseudo_answers(make_group(ballots((None, 0.1)))).query.answer is None
    with pytest.raises(ValueError, match="labelled"):
        apply_pseudo_answers(make_group(ballots(("7", 0.9)), answer="7"))
