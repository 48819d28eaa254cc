"""One row in the simple shape: ``{image, question, answer[, choices][, id]}``, from any table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from mstar_mega.data.rows import RowProblem

RIGHT_SHAPE = '{"image": "charts/7.png", "question": "How many bars?", "answer": "4"}'
"""The answer to a row in a wrong shape."""
WITH_CHOICES = '{"image": "charts/7.png", "question": "Which?", "choices": ["red", "blue"], "answer": "blue"}'
IMAGE_MARK = "<image>"


def is_simple(row: Mapping[str, Any]) -> bool:
    """Whether a row is meant to be in this shape."""
    return "conversations" not in row and "question" in row


def texts_of(row: Mapping[str, Any]) -> tuple[str, str, str, tuple[str, ...]]:
    """(id, question, answer, choices) of a row. Without an id of its own it gets one of its image, question and
    choices, so that neither the file's order nor its other rows matter.

    Raises RowProblem for what is missing or of another kind.
    """
    question = _text(row, "question").replace(IMAGE_MARK, "", 1 if row.get("image") is not None else 0).strip()
    if not question:
        raise RowProblem("question", "it is empty")
    if "answer" not in row:
        raise RowProblem("answer", f"there is no such field; a row in the right shape is {RIGHT_SHAPE}")
    choices = _choices(row.get("choices"))
    answer = _text(row, "answer")
    id = row.get("id")
    if id is None or id == "":
        named = json.dumps([row.get("image"), question, choices], ensure_ascii=False, default=str)
        id = blake2b(named.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    if not isinstance(id, str) or not id.strip():
        raise RowProblem("id", "it is no text")
    return id, question, answer, choices


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, bool):
        raise RowProblem(name, f"it is {str(value).lower()}, not a text: write yes or no")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowProblem(name, "it is no number")
    if isinstance(value, int | float):
        return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else str(value)
    if not isinstance(value, str):
        kind = "missing" if value is None else type(value).__name__
        raise RowProblem(name, f"it is {kind}, not a text; a row in the right shape is {RIGHT_SHAPE}")
    return value.strip()


def _choices(value: Any) -> tuple[str, ...]:
    """A list of texts; in a table of texts alone a JSON list, or texts with ``|`` between them."""
    if isinstance(value, str):
        value = _from_text(value)
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str | int | float) for each in value):
        raise RowProblem("choices", f"they are no list of texts; a row in the right shape is {WITH_CHOICES}")
    if len(value) == 1:
        raise RowProblem("choices", "there is only one")
    if len(value) > 26:
        raise RowProblem("choices", "there are more than the letters A to Z can name")
    return tuple(str(each).strip() for each in value)


def _from_text(text: str) -> Any:
    text = text.strip()
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return [part.strip() for part in text.split("|")] if text else None
