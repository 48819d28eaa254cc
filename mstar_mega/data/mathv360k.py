"""One row in MathV360K's shape: ``{id, image, conversations: [{from: human, value}, {from: gpt, value}]}``.

A row of ``{image, question, answer}`` is read as well (``simple.py``). The human's text holds ``<image>``, a hint line,
``Question: ...`` and, for multiple choice, ``Choices:`` with a line ``(A) ...`` for each; the answer reads ``The answer
is B``. The image path begins with the name of the source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mstar_mega.data.prompts import Template, lettered, letters, render
from mstar_mega.data.rows import RowProblem, has_surrogate
from mstar_mega.data.simple import IMAGE_MARK, RIGHT_SHAPE, is_simple, texts_of
from mstar_mega.data.types import ImageRef, Query

_CHOICES = re.compile(r"^[^\S\n]*(?:Choices:[^\S\n]*(?=$|\(A\)|A[.:)])|Options:\s*(?=\(A\)|A[.:)]))", re.MULTILINE)
_CHOICE = re.compile(r"^[^\S\n]*(?:\(([A-Z])\)|([A-Z])[.:)])[^\S\n]*", re.MULTILINE)
_ANYWHERE = re.compile(r"(?:^|(?<=\s))(?:\(([A-Z])\)|([A-Z])[.:)])(?:\s+|$)")
"""A choice's mark, also behind another choice on its line."""
_HINT = re.compile(r"\A\s*(Hint:[^\n]*)\n")
_QUESTION = re.compile(r"\A\s*Question:[^\S\n]*")
_ANSWER = re.compile(
    r"\A\s*(\*\*)?(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:(?:final|correct|right)\s+)?"
    r"(?:answer|option|choice|答案)(?:\s+is\b|\s*[:：]|是|为)[:\s]*(?(1)\*\*)",
    re.IGNORECASE,
)
_NAMED = re.compile(r"\A(?:option|choice)\s+(?=\(?[A-Z]\b)", re.IGNORECASE)
_BOLD = re.compile(r"\*\*([^*]+)\*\*")


@dataclass(frozen=True)
class Question:
    """A row, understood."""

    id: str
    image: str | None
    """Path below the image folder."""
    source: str
    hint: str
    question: str
    """Without hint and choices."""
    choices: tuple[str, ...]
    answer: str
    """A letter for multiple choice."""

    @property
    def kind(self) -> str:
        """Source and type, for breakdowns."""
        return f"{self.source or 'no source'}, {'multiple choice' if self.choices else 'free form'}"


def parse_row(row: Any) -> Question:
    """Understand a row. Raises RowProblem for what is missing, malformed or contradictory."""
    if not isinstance(row, dict):
        raise RowProblem("row", f"it is {_kind_of(row)}, not an object")
    if is_simple(row):
        return _simple(row)
    id = row.get("id")
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    if not isinstance(id, str) or not id.strip():
        raise RowProblem("id", "it is missing or empty")
    image = _image(row.get("image"))
    if "conversations" not in row:
        fields = ", ".join(map(str, row))[:100]
        raise RowProblem(
            "conversations", f"there is no such field (the row has {fields}); a row in the right shape is {RIGHT_SHAPE}"
        )
    human, answer = _turns(row["conversations"])
    marks = human.count(IMAGE_MARK)
    if marks > 1 or (marks == 1) != (image is not None):
        advice = f": write {IMAGE_MARK} where it belongs" if marks == 0 else ""
        raise RowProblem("image", f"the text shows {marks} images, the row names {0 if image is None else 1}{advice}")
    hint, question, choices = split_question(human.replace(IMAGE_MARK, "").strip())
    if not question:
        raise RowProblem("question", "it is empty")
    return Question(id, image, source_of(image), hint, question, choices, _gold(answer, choices))


def _simple(row: dict[str, Any]) -> Question:
    """A row of ``{image, question, answer[, choices][, id]}``."""
    id, question, answer, choices = texts_of(row)
    for name, text in (("id", id), ("question", question), ("answer", answer), ("choices", "".join(choices))):
        if has_surrogate(text):
            raise RowProblem(name, "it has a lone surrogate")
    image = _image(row["image"]) if row.get("image") not in (None, "") else None
    return Question(id, image, source_of(image), "", question, choices, _gold(answer, choices))


def to_query(question: Question, template: Template, images: tuple[ImageRef, ...], instruct: bool, hide: bool) -> Query:
    """The query that the policy gets; ``hide`` its answer from training."""
    return Query(
        id=question.id,
        question=render(template, question.question, lettered(question.choices), hint=question.hint, instruct=instruct),
        images=images,
        answer=None if hide else question.answer,
        choices=question.choices,
        kind=question.kind,
        hidden_answer=question.answer if hide else None,
    )


def source_of(image: str | None) -> str:
    """The source that an image path begins with: ``TabMWP/images/7.png`` and ``images/TabMWP/7.png`` are TabMWP's."""
    folders = PurePosixPath(image).parts[:-1] if image else ()
    return next((name for name in folders if name != "images"), "")


def split_question(text: str) -> tuple[str, str, tuple[str, ...]]:
    """(hint line, question, choices) of a human's text. Raises RowProblem where the letters are not A, B, C ..."""
    hint = ""
    if found := _HINT.match(text):
        hint, text = found[1].strip(), text[found.end() :]
    text = _QUESTION.sub("", text, count=1)
    headings = list(_CHOICES.finditer(text))
    if not headings:
        return hint, text.strip(), ()
    heading = headings[-1]  # a question may speak of choices itself
    listed = text[heading.end() :]
    marks = _marks(listed)
    names = [mark[1] or mark[2] for mark in marks]
    if not names:
        raise RowProblem("choices", "no line below 'Choices:' begins with (A), A., A: or A)")
    if names != letters(min(len(names), 26)):
        raise RowProblem("choices", f"they are lettered {', '.join(names)}, not A, B, C ...")
    if len(names) == 1:
        raise RowProblem("choices", "there is only one")
    ends = [mark.start() for mark in marks[1:]] + [len(listed)]
    choices = tuple(listed[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True))
    for separator in ",;":  # (A) 10, (B) 12
        if all(choice.endswith(separator) for choice in choices[:-1]):
            choices = tuple(choice.removesuffix(separator).rstrip() for choice in choices)
    return hint, text[: heading.start()].strip(), choices


def _marks(listed: str) -> list[re.Match[str]]:
    """Where each choice begins: at the beginning of lines or, where lines hold several, also behind white space."""
    marks = list(_CHOICE.finditer(listed))
    if len(marks) > 1 and [mark[1] or mark[2] for mark in marks] == letters(min(len(marks), 26)):
        return marks
    found: list[re.Match[str]] = []
    for mark in _ANYWHERE.finditer(listed):
        alike = not found or (mark[1] is None) == (found[0][1] is None)
        if alike and (mark[1] or mark[2]) == chr(ord("A") + len(found)):
            found.append(mark)
    starts = {mark.start(1) if mark[1] else mark.start(2) for mark in found}
    covers = all((mark.start(1) if mark[1] else mark.start(2)) in starts for mark in marks)
    return found if len(found) > 1 and covers else marks


def _image(image: Any) -> str | None:
    if image is None:
        return None
    if not isinstance(image, str) or not image.strip():
        raise RowProblem("image", f"it is {_kind_of(image)}, not a path")
    path = PurePosixPath(image)
    if path.is_absolute() or ".." in path.parts or "\x00" in image:
        raise RowProblem("image", "its path leads out of the image folder")
    return image


def _turns(conversations: Any) -> tuple[str, str]:
    """The human's and the model's text."""
    if not isinstance(conversations, list) or len(conversations) != 2:
        raise RowProblem("conversations", "they are not one question and one answer")
    texts = []
    for turn, speaker in zip(conversations, ("human", "gpt"), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            said = repr(turn.get("from"))[:40] if isinstance(turn, dict) else "no object"
            raise RowProblem("conversations", f"where the turn from {speaker!r} should be is {said}")
        if not isinstance(turn.get("value"), str):
            kind = type(turn.get("value")).__name__
            raise RowProblem("conversations", f"the value from {speaker!r} is no text (it is of type {kind})")
        if has_surrogate(turn["value"]):
            raise RowProblem("conversations", f"the text from {speaker!r} has a lone surrogate")
        texts.append(turn["value"])
    return texts[0], texts[1]


def _plain(answer: str) -> str:
    """Without the emphasis around the whole of it, and without a full stop."""
    answer = answer.strip()
    for _ in range(2):
        if answer.endswith(".") and not answer.endswith(".."):
            answer = answer[:-1].rstrip()
        if bold := _BOLD.fullmatch(answer):
            answer = bold[1].strip()
    return answer


def _gold(text: str, choices: tuple[str, ...]) -> str:
    answer = _plain(_ANSWER.sub("", _plain(text), count=1))
    if not answer:
        raise RowProblem("answer", "it is empty")
    if not choices:
        return answer
    valid = letters(len(choices))
    answer = _NAMED.sub("", answer)
    named = _CHOICE.match(answer)
    letter = answer if answer in valid else (named[1] or named[2]) if named else ""
    if letter in valid:
        text = answer[named.end() :].strip().casefold() if named else ""
        others = [name for name, choice in zip(valid, choices, strict=True) if text and choice.casefold() == text]
        if others and letter not in others:
            raise RowProblem("answer", f"{answer[:40]!r} names {letter}, but its text is that of {others[0]}")
        if not choices[valid.index(letter)]:
            raise RowProblem("answer", f"choice {letter}, which it names, is empty")
        return letter
    same = [name for name, choice in zip(valid, choices, strict=True) if choice.casefold() == answer.casefold()]
    if len(same) == 1:
        return same[0]
    if answer.upper() in valid:
        return answer.upper()
    raise RowProblem("answer", f"{answer[:40]!r} is none of the choices {', '.join(valid)}")


def _kind_of(value: Any) -> str:
    if isinstance(value, str) and not value.strip():
        return "empty"
    return {type(None): "missing", str: "text", list: "a list", dict: "an object"}.get(type(value), repr(value)[:40])
