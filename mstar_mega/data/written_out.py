"""Written-out chains of thought: JSON lines ``{"id": ..., "response": ...}`` that name labelled queries of a set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mstar_mega.data.prompts import ANSWER_MARKER, Template
from mstar_mega.data.rows import Row, has_surrogate, read_rows
from mstar_mega.data.types import Query, Skipped, Task
from mstar_mega.platform.files import write_text_atomic


@dataclass(frozen=True)
class Named:
    """What a set says of a query that a row names."""

    split: str
    images: tuple[str, ...]
    """Digests."""


def bare_answer(answer: str) -> str:
    """The response that holds the answer in the answer block, and no reasoning."""
    return f"{ANSWER_MARKER}\n\n{answer}"


def write(path: Path, examples: Iterable[tuple[Query, str]]) -> None:
    """Write queries with their responses as such a file (atomically).

    The digests of the images are noted, as the ids of sets that are made anew for each seed name other queries then.
    """
    rows = (
        {"id": query.id, "images": [image.digest for image in query.images], "response": response}
        for query, response in examples
    )
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def id_of(row: Row) -> str | None:
    """The id that a row names; None where it names none."""
    id = row.value.get("id") if isinstance(row.value, dict) else None
    return id if isinstance(id, str) else None


def problem_of(row: Row, found: Named | None, template: Template) -> tuple[str, str] | None:
    """(field, what is wrong with it) of a row that cannot be used; None for one that can. ``found``: what the set has
    under the row's id."""
    fields = row.value if isinstance(row.value, dict) else {}
    response = fields.get("response")
    if row.problem or id_of(row) is None or not isinstance(response, str):
        return "row", row.problem or "it is not an object with the texts id and response"
    if found is None:
        return "id", "the training set has no usable query with this id"
    if found.split != "labelled":
        return "id", f"it is a query of the {found.split} split, whose answers training must not see"
    if fields.get("images", list(found.images)) != list(found.images):
        return "images", "the query of this id has another image: the file was made for another set, or another seed"
    if has_surrogate(response):
        return "response", "it has half a character (a lone surrogate)"
    if template.marker not in response:
        return "response", f"it has no {template.marker!r}"
    return None


def name_of(row: Row) -> str:
    """The id that a row gives, for messages; empty where it gives none."""
    id = row.value.get("id") if isinstance(row.value, dict) else None
    return json.dumps(id)[:80] if id is not None else ""


def with_written_out(task: Task, path: Path, template: Template, limit: int | None) -> Task:
    """A task in memory whose warm-up examples are those of a file, at most ``limit`` of them."""
    sets: dict[str, Sequence[Query]] = {
        "warm-up": [query for query, _ in task.warmup],
        **{name: getattr(task, name) for name in ("test", "validation", "unlabelled", "labelled")},
    }
    named = {
        query.id: (query, Named(split, tuple(image.digest for image in query.images)))
        for split, queries in sets.items()
        for query in queries
    }
    examples: list[tuple[Query, str]] = []
    skipped: list[Skipped] = []
    for row in read_rows(path):
        id = id_of(row)
        found = None if id is None else named.get(id)
        problem = problem_of(row, found and found[1], template)
        if problem is None:
            assert found is not None, "it has no problem"
            examples.append((found[0], row.value["response"]))
        else:
            name = name_of(row)
            skipped.append(Skipped(f"row {row.number}{f' (id {name})' if name else ''}", str(path), ": ".join(problem)))
    return replace(task, warmup=examples[:limit], skipped=[*task.skipped, *skipped])
