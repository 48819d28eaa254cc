"""Question templates: what the policy reads."""

from __future__ import annotations

import pytest

from mstar_mega.data.prompts import ANSWER_MARKER, BENCHMARKS, LETTER_HINT, TRAINING_SETS, Template, lettered, render
from mstar_mega.rewards.answers import extract_answer


def test_multiple_choice_in_mathv360ks_shape() -> None:
    text = render(TRAINING_SETS["mathv360k"], "What colour?", lettered(["red", "{blue}"]), instruct=False)
    assert text == f"{LETTER_HINT}\nQuestion: What colour?\nChoices:\n(A) red\n(B) {{blue}}"


def test_a_rows_own_hint_wins_and_empty_parts_are_left_out() -> None:
    template = Template(("{hint}", "[{context}]", "{question}", "always", "{choices}"), hints={"": "default"})
    assert render(template, "q") == "default\nq\nalways"
    assert render(template, "q", hint="own", context="c") == "own\n[c]\nq\nalways"


@pytest.mark.parametrize("name", [name for name in (*TRAINING_SETS, *BENCHMARKS)])
def test_the_instruction_names_the_marker_that_extraction_finds(name: str) -> None:
    template = {**TRAINING_SETS, **BENCHMARKS}[name]
    asked, bare = render(template, "q"), render(template, "q", instruct=False)
    assert extract_answer(f"Because.\n\n{template.marker}\n\n7") == "7"
    assert asked.startswith(bare)
    assert (ANSWER_MARKER in asked) == (asked != bare)


def test_too_many_choices() -> None:
    assert lettered(["x", "y"]) == {"A": "x", "B": "y"}
    with pytest.raises(ValueError, match="27 choices"):
        lettered(["x"] * 27)
