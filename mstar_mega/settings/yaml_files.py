"""YAML of settings: no key twice, no more than settings need, whatever the file holds."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mstar_mega.platform.inputs import read_input

MOST_BYTES = 1 << 18
MOST_NODES = 20_000
"""Values of a file, those that an alias repeats counted each time."""
MOST_DEPTH = 40


def read_yaml(file: Path) -> Any:
    """The content of a settings file. Raises ValueError naming the file and what is wrong, and OSError as open does."""
    try:
        return parse_yaml(read_input(file, MOST_BYTES).decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"the settings file {file} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ValueError(f"the settings file {file} is not valid YAML: {_problem(error)}") from None


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text. Raises yaml.YAMLError, also for one that would become too large."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {}, ())
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a date that is none, a number of too many digits
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and drops the first without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises yaml.constructor.ConstructorError on a repeated key."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain value", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _weigh(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values below a node, with what aliases repeat."""
    if id(node) in above:
        raise yaml.YAMLError("an alias stands inside what it names")
    if len(above) > MOST_DEPTH:
        raise yaml.YAMLError("it is nested too deeply")
    if id(node) not in known:
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for each in below for part in (each if isinstance(each, tuple) else (each,))]
        known[id(node)] = 1 + sum(_weigh(part, known, (*above, id(node))) for part in parts)
    if known[id(node)] > MOST_NODES:
        raise yaml.YAMLError(f"it has more than {MOST_NODES:,} values")
    return known[id(node)]


def _problem(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark and problem else " ".join(str(error).split())
