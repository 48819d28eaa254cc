"""Questions about scenes of digits, their exact answers, and the chains of thought that the warm-up is trained on.

What makes this task behave like the paper's: the warm-up's chains are kept by their answer alone, as the paper keeps
its own. Their writer is hasty: he likes to leave out the last digit that he sees, and to add up many numbers in one
go. Where the answer can be reached by luck (yes or no, a choice, the largest, a count) such chains get through, so the
warm-up policy has learnt both habits: one that is often right for the wrong reasons and is the likelier one, and the
careful one. There are several right ways to write every chain.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from mstar_mega.data.digits.render import LAYOUTS, Handwriting, Layout, Scene, draw_scene

LETTERS = "ABC"
COUNTS: dict[Layout, tuple[int, ...]] = {"row": (3,), "column": (3,), "grid": (4,), "scattered": (3, 4, 5)}
"""How many digits a layout has."""
READINGS = {"row": "Left to right", "column": "Top to bottom", "grid": "Row by row", "scattered": "Row by row"}
BACKWARDS = "Backwards"
HASTE = 0.8
"""How often the writer overlooks a digit."""
WORDINGS = ((" + ", " = "), (" and ", " make "))
"""Two ways to write an addition."""
CLOSING = "the result is "


@dataclass(frozen=True)
class Way:
    """How a chain of thought is written."""

    backwards: bool = False
    """The digits are read from the last to the first."""
    wording: int = 0
    leap: bool = False
    """All numbers are added up at once."""
    closing: bool = False
    """Ends with a sentence that states the result."""
    overlooks: bool = False
    """The last digit that is read is left out: such a chain is wrong even where its answer is right."""


Solve = Callable[[Sequence[int], Way], tuple[list[str], str]]
"""Steps and result from the digits as they are read, written in one way."""


@dataclass(frozen=True)
class Problem:
    """A scene with a question."""

    scene: Scene
    kind: str
    question: str
    choices: tuple[str, ...]
    chain_of_thought: str
    """The hasty writer's."""
    answer: str
    solve: Solve
    is_solved: bool = True
    """Whether the writer has reached the answer."""

    def chain(self, way: Way) -> str:
        """The whole response, written in one way."""
        steps, result = _think(self.scene, self.solve, self.choices, way)
        return _text(steps, result)

    def right_chains(self) -> frozenset[str]:
        """Every right way to write it, among those that the warm-up's writer knows, by whatever name it gives the order
        in which the digits are read: three scattered ones can look like a column."""
        own, names = READINGS[self.scene.layout], tuple(READINGS.values())
        chains = [self.chain(way).split(": ", 1) for way in careful_ways()]
        return frozenset(f"{name}: {rest}" for order, rest in chains for name in (names if order == own else [order]))


def careful_ways() -> Iterator[Way]:
    """Every way of writing that leaves out no digit."""
    for backwards, wording, leap, closing in product((False, True), range(len(WORDINGS)), (False, True), (False, True)):
        yield Way(backwards, wording, leap, closing)


def hasty_way(rng: random.Random) -> Way:
    """How the writer of the warm-up's chains likes to write: backwards where he takes care."""
    overlooks = rng.random() < HASTE
    return Way(
        backwards=rng.random() < (0.1 if overlooks else 0.5),
        wording=rng.randrange(len(WORDINGS)),
        leap=rng.random() < 0.2,
        closing=rng.random() < 0.3,
        overlooks=overlooks,
    )


def _text(steps: Sequence[str], result: str) -> str:
    return "\n\n".join((*steps, "# Answer", result))


def _think(scene: Scene, solve: Solve, choices: tuple[str, ...], way: Way) -> tuple[list[str], str]:
    """Steps and answer; an answer that is none of the choices is the empty text."""
    values = scene.values[::-1] if way.backwards else scene.values
    if way.overlooks:
        values = values[:-1]
    reading = BACKWARDS if way.backwards else READINGS[scene.layout]
    steps, result = solve(values, way)
    steps = [f"{reading}: " + ", ".join(map(str, values)), *steps]
    if way.closing:
        steps.append(CLOSING + result)
    if choices:
        letter = LETTERS[choices.index(result)] if result in choices else ""
        return [*steps, f"{result} is {letter}"], letter
    return steps, result


def _add_up(values: Sequence[int], way: Way) -> tuple[int, list[str]]:
    """The sum of at least one value, one step per addition or all in one."""
    plus, equals = WORDINGS[way.wording]
    if way.leap and len(values) > 2:
        return sum(values), [plus.join(map(str, values)) + f"{equals}{sum(values)}"]
    total, steps = values[0], []
    for value in values[1:]:
        steps.append(f"{total}{plus}{value}{equals}{total + value}")
        total += value
    return total, steps


def _listed(name: str, values: Sequence[int]) -> str:
    return f"{name}: " + (", ".join(map(str, values)) or "none")


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


Draft = tuple[str, Solve]
"""A question and how it is solved."""


def _sum(rng: random.Random, scene: Scene) -> Draft:
    def solve(values: Sequence[int], way: Way) -> tuple[list[str], str]:
        total, steps = _add_up(values, way)
        return steps, str(total)

    return "What is the sum of the digits?", solve


def _sum_above(rng: random.Random, scene: Scene) -> Draft:
    limit = max(1, sum(scene.values) + rng.choice((-5, -4, -3, -2, -1, -1, 0, 1, 3)))

    def solve(values: Sequence[int], way: Way) -> tuple[list[str], str]:
        total, steps = _add_up(values, replace(way, leap=False))
        answer = _yes(total > limit)
        return [*steps, f"{total} > {limit}: {answer}"], answer

    return f"Is the sum of the digits greater than {limit}?", solve


def _difference(rng: random.Random, scene: Scene) -> Draft:
    def solve(values: Sequence[int], way: Way) -> tuple[list[str], str]:
        high, low = max(values), min(values)
        return [f"largest {high}, smallest {low}", f"{high} - {low} = {high - low}"], str(high - low)

    return "What is the largest digit minus the smallest?", solve


def _extreme(rng: random.Random, scene: Scene) -> Draft:
    word = rng.choice(("largest", "smallest"))

    def solve(values: Sequence[int], way: Way) -> tuple[list[str], str]:
        value = max(values) if word == "largest" else min(values)
        return [f"{word} {value}"], str(value)

    return f"What is the {word} digit?", solve


def _test(rng: random.Random) -> tuple[str, Callable[[int], bool]]:
    """A property of digits by its name."""
    limit = rng.randint(1, 3)
    tests: tuple[tuple[str, Callable[[int], bool]], ...] = (
        ("even", lambda value: value % 2 == 0),
        ("odd", lambda value: value % 2 == 1),
        (f"greater than {limit}", lambda value: value > limit),
    )
    return rng.choice(tests)


def _count(rng: random.Random, scene: Scene) -> Draft:
    word, test = _test(rng)

    def solve(values: Sequence[int], way: Way) -> tuple[list[str], str]:
        kept = [value for value in values if test(value)]
        return [_listed(word, kept), f"count {len(kept)}"], str(len(kept))

    return f"How many digits are {word}?", solve


def _all(rng: random.Random, scene: Scene) -> Draft:
    word, test = _test(rng)

    def solve(values: Sequence[int], way: Way) -> tuple[list[str], str]:
        others = [value for value in values if not test(value)]
        return [_listed(f"not {word}", others)], _yes(not others)

    return f"Are all digits {word}?", solve


def _more(rng: random.Random, scene: Scene) -> Draft:
    one, other = rng.sample(("even", "odd"), 2)

    def solve(values: Sequence[int], way: Way) -> tuple[list[str], str]:
        of = {"even": [v for v in values if v % 2 == 0], "odd": [v for v in values if v % 2]}
        answer = _yes(len(of[one]) > len(of[other]))
        compared = f"{len(of[one])} > {len(of[other])}: {answer}"
        return [_listed(one, of[one]), _listed(other, of[other]), compared], answer

    return f"Are more digits {one} than {other}?", solve


@dataclass(frozen=True)
class _Kind:
    name: str
    share: float
    make: Callable[[random.Random, Scene], Draft]
    choices_share: float = 0.0
    """How many are multiple choice. Only kinds whose answers have one digit: matching a longer value with its letter
    takes a small model many times as many steps to learn."""


KINDS = (
    _Kind("sum", 0.15, _sum),
    _Kind("sum above", 0.28, _sum_above),
    _Kind("difference", 0.32, _difference, choices_share=0.15),
    _Kind("extreme", 0.15, _extreme, choices_share=0.15),
    _Kind("count", 0.06, _count, choices_share=0.15),
    _Kind("all", 0.02, _all),
    _Kind("more", 0.02, _more),
)


def draw_problem(rng: random.Random, part: Handwriting) -> Problem:
    """A random scene in the handwriting of ``part`` with a random question whose answer is exact and unambiguous."""
    kind = rng.choices(KINDS, [kind.share for kind in KINDS])[0]
    layout = rng.choice(LAYOUTS)
    scene = draw_scene(rng, part, layout, rng.choice(COUNTS[layout]))
    question, solve = kind.make(rng, scene)
    name = kind.name
    choices: tuple[str, ...] = ()
    if rng.random() < kind.choices_share:
        _, result = solve(scene.values, Way())
        name, choices = f"{kind.name}, choices", _choices(rng, int(result))
        question += "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    _, answer = _think(scene, solve, choices, Way())
    steps, reached = _think(scene, solve, choices, hasty_way(rng))
    return Problem(scene, name, question, choices, _text(steps, reached), answer, solve, reached == answer)


def draw_reading(rng: random.Random, part: Handwriting) -> Problem:
    """A scene full of digits that are only to be read: what the warm-up learns to see by."""
    layout = rng.choice(LAYOUTS)
    scene = draw_scene(rng, part, layout, {"row": 3, "column": 3, "grid": 4, "scattered": rng.randint(5, 9)}[layout])

    def solve(values: Sequence[int], way: Way) -> tuple[list[str], str]:
        return [], ", ".join(map(str, values))

    steps, answer = _think(scene, solve, (), Way(backwards=rng.random() < 0.5))
    return Problem(scene, "reading", "Which digits are there?", (), _text(steps, answer), answer, solve)


def _choices(rng: random.Random, value: int) -> tuple[str, ...]:
    """The right value among near misses."""
    near = [value + offset for offset in (-2, -1, 1, 2) if 0 <= value + offset <= 9]
    values = [value, *rng.sample(near, len(LETTERS) - 1)]
    rng.shuffle(values)
    return tuple(map(str, values))
