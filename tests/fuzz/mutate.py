"""Mutations: of a JSON tree, of the text of a file, and of its bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

STEERING = "\x1b[2J\x1b]0;title\x07 \u202e evil \u2066 \x9b31m\r"
DEEP = "[" * 100_000 + "]" * 100_000


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**7, 10**9, 2**31, 2**40, 2**63, 2**70, 10**400, -(2**70), 0.0, 0.5, -1.5,
    1e18, 1e308, -1e308, 1e-320, float("nan"), float("inf"), -float("inf"),
    "", " ", "x", "0", "-1", "1e9", "NaN", "Infinity",
    "../../etc/passwd", "/dev/zero", "a" * 300, "charts_from_annual_reports_2019_2024 (all of them), multiple choice",
    "two\nlines", "tab\tbed", "nul\x00", STEERING, "</script><script>alert(1)</script>", "{{tiles}}",
    "$x^2$ %s {0}", "\u2028",
    [], {}, [None], [0], ["x"], [[]], [{}], {"": None}, {"x": 1}, {"a": {}}, [1e309, "x", None], _nested(150),
    _nested(250), list(range(300)), {str(i): i for i in range(300)},
]  # fmt: skip


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value of a tree but its root."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return []
    return [path for key, value in items for path in ((*at, key), *places(value, (*at, key)))]


def mutated(tree: Any, random: random.Random) -> Any:
    """A copy of the tree with one to three values replaced, removed, doubled, renamed or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        known = places(tree)
        if not known or random.random() < 0.02:
            return random.choice(VALUES)
        *above, last = random.choice(known)
        parent = tree
        for key in above:
            parent = parent[key]
        way = random.random()
        if way < 0.65:
            parent[last] = copy.deepcopy(random.choice(VALUES))
        elif way < 0.75:
            del parent[last]
        elif way < 0.85 and isinstance(parent, dict):
            parent[random.choice(("", "x" * 400, STEERING, "a\nb", "\x00", "__class__", "10"))] = parent.pop(last)
        elif way < 0.92 and isinstance(parent, list):
            parent += [copy.deepcopy(parent[last])] * random.choice((1, 50))
        else:
            *_, other = random.choice(known)
            source = parent
            if isinstance(parent, dict) and other in source:
                parent[last] = copy.deepcopy(source[other])
    return tree


def as_text(tree: Any, random: random.Random, indent: int | None = None) -> str:
    """JSON; now and then not quite."""
    text = json.dumps(tree, indent=indent)
    way = random.random()
    if way < 0.88:
        return text
    if way < 0.91:
        return text[: random.randrange(len(text) + 1)]
    if way < 0.94:
        return text.replace(
            random.choice(('"', ":", "}", ",", "1")), random.choice(("", DEEP, "\\ud800", "9" * 5000)), 1
        )
    if way < 0.97:
        return DEEP
    return random.choice(
        ("", "\ufeff" + text, "null", text + text, text.replace("{", '{"format": 1, "format": 2, ', 1))
    )


def flipped(content: bytes, random: random.Random) -> bytes:
    """A few bytes changed, cut or doubled."""
    found = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        if not found:
            break
        at = random.randrange(len(found))
        way = random.random()
        if way < 0.6:
            found[at] ^= 1 << random.randrange(8)
        elif way < 0.75:
            found[at] = random.choice((0, 0x1B, 0xFF, 0x80, 0x7F))
        elif way < 0.85:
            del found[at:]
        else:
            found[at:at] = found[at : at + random.randrange(1, 50)]
    return bytes(found)
