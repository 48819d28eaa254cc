"""Questions about scenes of digits, their exact answers, and a written-out chain of thought for each.

Several kinds can be answered rightly by luck (multiple choice, yes/no, either/or, small counts). That is on purpose:
there a wrong chain of thought reaches the gold answer, which only a process reward model can tell.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mstar_mega.data.digits.render import LAYOUTS, Handwriting, Layout, Scene, draw_scene

ORDINALS = ("first", "second", "third", "fourth")
LETTERS = "ABC"
COUNTS: dict[Layout, tuple[int, ...]] = {"row": (2, 3, 3), "column": (2, 3, 3), "grid": (4,), "scattered": (3, 4)}
"""How many digits a layout has; what stands twice is twice as likely."""
READINGS = {"row": "Left to right", "column": "Top to bottom", "grid": "Row by row", "scattered": "Row by row"}


@dataclass(frozen=True)
class Problem:
    """A scene with a question. ``steps`` are the chain of thought without the answer block."""

    scene: Scene
    kind: str
    question: str
    answer: str
    steps: tuple[str, ...]
    choices: tuple[str, ...] = ()

    @property
    def chain_of_thought(self) -> str:
        """The response the warm-up trains on."""
        return "\n\n".join((*self.steps, "# Answer", self.answer))


@dataclass(frozen=True)
class _Draft:
    """Question, answer and the computation's steps, before choices are added."""

    question: str
    answer: str
    steps: tuple[str, ...]


def _reading(scene: Scene, by_colour: bool) -> str:
    if by_colour:
        return ", ".join(f"{digit.colour} {digit.value}" for digit in scene.digits)
    return f"{READINGS[scene.layout]}: " + ", ".join(str(value) for value in scene.values)


def _names(scene: Scene) -> list[str]:
    """What a question calls each digit: its colour where the digits are scattered, else its place."""
    if scene.layout == "scattered":
        return [digit.colour for digit in scene.digits]
    return list(ORDINALS[: len(scene.digits)])


def _add_up(values: list[int]) -> tuple[int, list[str]]:
    """The running sum of at least one value, one step per addition."""
    total, steps = values[0], []
    for value in values[1:]:
        steps.append(f"{total} + {value} = {total + value}")
        total += value
    return total, steps


def _sum(rng: random.Random, scene: Scene) -> _Draft | None:
    total, steps = _add_up(scene.values)
    return _Draft("What is the sum of the digits?", str(total), tuple(steps))


def _colour_sum(rng: random.Random, scene: Scene) -> _Draft | None:
    colour = rng.choice([digit.colour for digit in scene.digits])
    values = [digit.value for digit in scene.digits if digit.colour == colour]
    if len(values) < 2:
        return None
    total, steps = _add_up(values)
    return _Draft(f"What is the sum of the {colour} digits?", str(total), tuple(steps))


def _difference(rng: random.Random, scene: Scene) -> _Draft | None:
    high, low = max(scene.values), min(scene.values)
    steps = (f"largest {high}, smallest {low}", f"{high} - {low} = {high - low}")
    return _Draft("What is the largest digit minus the smallest?", str(high - low), steps)


def _extreme(rng: random.Random, scene: Scene) -> _Draft | None:
    word = rng.choice(("largest", "smallest"))
    value = max(scene.values) if word == "largest" else min(scene.values)
    return _Draft(f"What is the {word} digit?", str(value), (f"{word} {value}",))


def _count(rng: random.Random, scene: Scene) -> _Draft | None:
    limit = rng.randint(2, 7)
    tests: tuple[tuple[str, Callable[[int], bool]], ...] = (
        ("even", lambda value: value % 2 == 0),
        ("odd", lambda value: value % 2 == 1),
        (f"greater than {limit}", lambda value: value > limit),
    )
    word, test = rng.choice(tests)
    kept = [str(value) for value in scene.values if test(value)]
    steps = (f"{word}: " + (", ".join(kept) or "none"), f"count {len(kept)}")
    return _Draft(f"How many digits are {word}?", str(len(kept)), steps)


def _colour_count(rng: random.Random, scene: Scene) -> _Draft | None:
    colour = rng.choice([digit.colour for digit in scene.digits])
    kept = [str(digit.value) for digit in scene.digits if digit.colour == colour]
    steps = (f"{colour}: " + ", ".join(kept), f"count {len(kept)}")
    return _Draft(f"How many digits are {colour}?", str(len(kept)), steps)


def _larger(rng: random.Random, scene: Scene) -> _Draft | None:
    names = _names(scene)
    i, j = rng.sample(range(len(names)), 2)
    a, b = scene.values[i], scene.values[j]
    if a == b:
        return None
    steps = (f"{names[i]} {a}, {names[j]} {b}", f"{a} > {b}" if a > b else f"{b} > {a}")
    return _Draft(f"Which digit is larger, the {names[i]} or the {names[j]}?", names[i] if a > b else names[j], steps)


def _compare(rng: random.Random, scene: Scene) -> _Draft | None:
    names = _names(scene)
    picked = rng.sample(range(len(names)), min(3, len(names)))
    a, b = scene.values[picked[0]], scene.values[picked[1]]
    if len(picked) == 3:
        limit, limit_text = scene.values[picked[2]], f"the {names[picked[2]]}"
        total, step = abs(a - b), f"{max(a, b)} - {min(a, b)} = {abs(a - b)}"
        question = f"Is the difference of the {names[picked[0]]} digit and the {names[picked[1]]}"
    else:
        limit = rng.randint(5, 13)
        limit_text, total, step = str(limit), a + b, f"{a} + {b} = {a + b}"
        question = f"Is the sum of the {names[picked[0]]} digit and the {names[picked[1]]}"
    answer = "yes" if total > limit else "no"
    return _Draft(f"{question} greater than {limit_text}?", answer, (step, f"{total} > {limit}: {answer}"))


def _expression(rng: random.Random, scene: Scene) -> _Draft | None:
    names = _names(scene)
    picked = rng.sample(range(len(names)), min(3, len(names)))
    a, b = scene.values[picked[0]], scene.values[picked[1]]
    if rng.random() < 0.5:
        value, words, steps = a * b, f"times the {names[picked[1]]}", [f"{a} * {b} = {a * b}"]
    else:
        value, words, steps = a + b, f"plus the {names[picked[1]]}", [f"{a} + {b} = {a + b}"]
    if len(picked) == 3:
        c = scene.values[picked[2]]
        word, sign, after = ("plus", "+", value + c) if rng.random() < 0.5 or c > value else ("minus", "-", value - c)
        words += f" {word} the {names[picked[2]]}"
        steps.append(f"{value} {sign} {c} = {after}")
        value = after
    return _Draft(f"What is the {names[picked[0]]} digit {words}?", str(value), tuple(steps))


@dataclass(frozen=True)
class _Kind:
    name: str
    share: float
    make: Callable[[random.Random, Scene], _Draft | None]
    choices_share: float = 0.0
    """How many are multiple choice. Only kinds whose answers have one digit: matching a longer value with its letter
    takes a small model many times as many steps to learn."""
    layouts: tuple[Layout, ...] = LAYOUTS
    colours: Literal["", "any", "distinct"] = ""
    """Whether the question is about the colours of scattered digits, and whether these must differ to name a digit."""


KINDS = (
    _Kind("sum", 0.32, _sum),
    _Kind("colour sum", 0.02, _colour_sum, layouts=("scattered",), colours="any"),
    _Kind("difference", 0.22, _difference, choices_share=0.12),
    _Kind("extreme", 0.06, _extreme, choices_share=0.4),
    _Kind("count", 0.05, _count, choices_share=0.1),
    _Kind("colour count", 0.01, _colour_count, layouts=("scattered",), colours="any"),
    _Kind("larger", 0.02, _larger, colours="distinct"),
    _Kind("compare", 0.03, _compare, colours="distinct"),
    _Kind("expression", 0.27, _expression, colours="distinct"),
)


def draw_problem(rng: random.Random, part: Handwriting) -> Problem:
    """A random scene in the handwriting of ``part`` with a random question whose answer is exact and unambiguous."""
    kind = rng.choices(KINDS, [kind.share for kind in KINDS])[0]
    while True:
        layout = rng.choice(kind.layouts)
        count = rng.choice(COUNTS[layout])
        scene = draw_scene(rng, part, layout, count, kind.colours == "distinct" and layout == "scattered")
        draft = kind.make(rng, scene)
        if draft is not None:
            break
    steps = (_reading(scene, bool(kind.colours) and scene.layout == "scattered"), *draft.steps)
    if rng.random() < kind.choices_share:
        return _with_choices(rng, scene, kind.name, draft, steps)
    return Problem(scene, kind.name, draft.question, draft.answer, steps)


def _with_choices(rng: random.Random, scene: Scene, kind: str, draft: _Draft, steps: tuple[str, ...]) -> Problem:
    """The multiple-choice form: near misses beside the right value, the answer is the letter."""
    value = int(draft.answer)
    near = [value + offset for offset in (-4, -3, -2, -1, 1, 2, 3, 4) if 0 <= value + offset <= 9]
    values = [value, *rng.sample(near, len(LETTERS) - 1)]
    rng.shuffle(values)
    letter = LETTERS[values.index(value)]
    choices = tuple(str(choice) for choice in values)
    lines = "\n".join(f"{name}. {choice}" for name, choice in zip(LETTERS, choices, strict=True))
    return Problem(
        scene, f"{kind}, choices", f"{draft.question}\n{lines}", letter, (*steps, f"{value} is {letter}"), choices
    )
