"""Steps of a response, the reduction of their scores, and responses without any."""

from __future__ import annotations

import itertools
import random

import pytest
from groups import make_group, make_response

from mstar_mega.data.types import Step
from mstar_mega.rewards.answers import extract_answer
from mstar_mega.rewards.steps import count_stepless, reduce_scores, split_steps, warn_stepless


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
