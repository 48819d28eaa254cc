"""How a question becomes the text that the policy reads: one template for each training set and each benchmark.

A template lists the parts of the text in order. Every part shows one field of the row (hint, context, question,
choices) or the instruction to reason; a part whose field is empty is left out. Chat roles and image tokens are the
policy family's and come around this text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter

from mstar_mega.functions import load

ANSWER_MARKER = "# Answer"
"""The heading of a response's last block, which holds the answer alone; ``rewards.answers`` finds it."""

REASON_STEP_BY_STEP = (
    "Look at the image closely and explain your analysis step by step, with the reason for each step, in short "
    "paragraphs with a blank line between them. End with a line '{marker}', a blank line, and the final answer alone."
)
"""The paper adds one sentence that asks for thorough step-by-step reasons with the answer at the end; these words are
ours."""

LETTER_HINT = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
"""MathVista's hint line for multiple choice, which MathV360K's rows carry as well."""


@dataclass(frozen=True)
class Template:
    """Question template, instruction and answer marker of one set."""

    parts: tuple[str, ...]
    """Lines or paragraphs, joined by a newline; each may name fields of :func:`render`, as in ``Question: {question}``.
    A part is left out when all fields that it names are empty."""
    choice: str = "({letter}) {text}"
    """One line of ``{choices}``."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Hint line by the kind of answer that is wanted, for rows that bring none of their own."""
    instruction: str = ""
    """What ``{instruction}`` shows when reasoning is asked for; ``{marker}`` in it is the answer marker."""
    marker: str = ANSWER_MARKER
    make: Callable[[str, Mapping[str, str], str, bool], str] | None = None
    """A function of the user's that makes the whole text of (question, choices by letter, hint, whether to ask for
    reasons); the parts are not looked at."""


DIGITS = Template(("{question}",))
"""The built-in task and the small policy speak few words: questions come ready, and nobody has to ask for steps."""

EASY_VQA = Template(("{question}",))
"""As for the digits: a policy that is trained from scratch knows no other way to answer."""

MATHV360K = Template(
    ("{hint}", "Question: {question}", "Choices:\n{choices}", "{instruction}"),
    hints={
        "choice": LETTER_HINT,
        "": "Hint: Please answer the question and provide the final answer at the end.",
    },
    instruction=REASON_STEP_BY_STEP,
)

PLAIN = Template(("{question}", "{choices}"))
"""Nothing but what the row says: for a policy that is trained from scratch."""

TRAINING_SETS = {"digits": DIGITS, "easy_vqa": EASY_VQA, "mathv360k": MATHV360K}
"""Template by ``data.name``."""


def template_of(name: str) -> Template:
    """The template of a named training set, or one whose text a function of the user's makes (``data.template``)."""
    if name in TRAINING_SETS or name == "plain":
        return PLAIN if name == "plain" else TRAINING_SETS[name]
    return Template((), make=load("data.template", name))


_OPTIONS = Template(
    (
        "Hint: {hint}",
        "Question: {question}",
        "Options:\n{choices}",
        "Please select the correct answer from the options above.",
        "{instruction}",
    ),
    choice="{letter}. {text}",
    instruction=REASON_STEP_BY_STEP,
)
"""VLMEvalKit's prompt for multiple choice."""

BENCHMARKS = {
    "mathvista": Template(
        ("{hint}", "Question: {question}", "Choices:\n{choices}", "{instruction}"),
        hints={
            "choice": LETTER_HINT,
            "integer": "Hint: Please answer the question requiring an integer answer and provide the final value, "
            "e.g., 1, 2, 3, at the end.",
            "float 1": "Hint: Please answer the question requiring a floating-point number with one decimal place and "
            "provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
            "float 2": "Hint: Please answer the question requiring a floating-point number with two decimal places "
            "and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
            "list": "Hint: Please answer the question requiring a Python list as an answer and provide the final list, "
            "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
        },
        instruction=REASON_STEP_BY_STEP,
    ),
    "m3cot": Template(
        ("[Context]\n{context}", "[Question]\n{question}", "[Choices]\n{choices}", "\n{instruction}"),
        instruction=REASON_STEP_BY_STEP,
    ),
    "mmstar": Template(("{question}", "{instruction}"), instruction=REASON_STEP_BY_STEP),
    "mmbench": _OPTIONS,
    "ai2d": _OPTIONS,
}
"""Template by the benchmark's name."""


def render(
    template: Template,
    question: str,
    choices: Mapping[str, str] | None = None,
    *,
    hint: str = "",
    context: str = "",
    instruct: bool = True,
) -> str:
    """The text of a question. ``choices`` are texts by letter (:func:`lettered`); ``hint`` is the row's own hint line;
    ``instruct`` asks for step-by-step reasons.
    """
    choices = choices or {}
    if template.make is not None:
        text = template.make(question, choices, hint, instruct)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"data.template returned {str(text)[:40]!r}: it must return the text for the policy")
        return text
    fields = {
        "hint": hint or template.hints.get("choice" if choices else "", ""),
        "context": context,
        "question": question,
        "choices": "\n".join(template.choice.format(letter=letter, text=text) for letter, text in choices.items()),
        "instruction": template.instruction.format(marker=template.marker) if instruct else "",
    }
    return "\n".join(part.format(**fields) for part in template.parts if _is_wanted(part, fields))


def letters(count: int) -> list[str]:
    """``A``, ``B``, ... Raises ValueError for more than 26."""
    if count > 26:
        raise ValueError(f"{count} choices are more than the letters A to Z can name")
    return [chr(ord("A") + i) for i in range(count)]


def lettered(texts: Sequence[str]) -> dict[str, str]:
    """The texts by letter, ``A`` first. Raises ValueError for more than 26."""
    return dict(zip(letters(len(texts)), texts, strict=True))


def _is_wanted(part: str, fields: Mapping[str, str]) -> bool:
    names = [name for _, name, _, _ in Formatter().parse(part) if name]
    return not names or any(fields[name] for name in names)
