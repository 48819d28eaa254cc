"""The settings of ``config/`` one by one: names, types, defaults and docs, as ``--help`` and the checks need them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mstar_mega.config import Config


@dataclass(frozen=True)
class Leaf:
    """One setting: its dotted name, resolved type, default, and the docstring under its field."""

    name: str
    type: Any
    default: Any
    doc: str


@functools.cache
def leaves() -> tuple[Leaf, ...]:
    """Every setting of the tree, in the order of ``Config``."""
    return tuple(_walk(Config(), "", field_docs()))


def flatten(config: Config) -> dict[str, Any]:
    """Dotted name -> value, for every setting."""
    return {leaf.name: leaf.default for leaf in _walk(config, "", {})}


def _walk(node: Any, prefix: str, docs: Mapping[tuple[str, str], str]) -> Iterator[Leaf]:
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{field.name}.", docs)
        else:
            doc = docs.get((type(node).__name__, field.name), "")
            yield Leaf(prefix + field.name, hints[field.name], value, doc)


def _nodes(node: Any) -> Iterator[Any]:
    """The tree's dataclasses."""
    yield node
    for field in dataclasses.fields(node):
        if dataclasses.is_dataclass(child := getattr(node, field.name)):
            yield from _nodes(child)


@functools.cache
def field_docs() -> dict[tuple[str, str], str]:
    """(class, field) -> the string literal that follows the field; (class, "") -> the class docstring."""
    docs: dict[tuple[str, str], str] = {}
    modules = {type(node).__module__: None for node in _nodes(Config())}
    parsed = [ast.parse(inspect.getsource(sys.modules[name])) for name in modules]
    for node in [node for module in parsed for node in module.body]:
        if not isinstance(node, ast.ClassDef):
            continue
        docs[node.name, ""] = ast.get_docstring(node) or ""
        for field, after in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                docs[node.name, field.target.id] = " ".join(str(after.value.value).split())
    return docs


def shown(value: Any) -> str:
    """A value as a message shows it, cut when long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
