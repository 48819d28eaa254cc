"""Steps of reasoning: where they begin and end in a response, and how their scores become one.

Steps are separated by blank lines. The final answer block, heading and answer together, is one last step, so that the
minimum over steps also judges the answer.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from mstar_mega.config import Reduction
from mstar_mega.data.types import Group, Step
from mstar_mega.rewards.answers import find_answer_heading

_SEPARATOR = re.compile(r"\n[^\S\n]*\n\s*")
"""One or more blank lines (``\\r`` and other white space allowed in them) with the next line's indentation."""


def _step_starts(text: str) -> list[int]:
    """Character positions where steps begin, the first at 0; empty when the text is blank.

    Every step [start, next start) holds something other than white space.
    """
    if not text.strip():
        return []
    heading = find_answer_heading(text)
    block = heading.start() if heading else len(text)
    # A separator that ends the text, or that begins it, separates nothing; those inside the answer block do not count.
    first = len(text) - len(text.lstrip())
    starts = [0, *(match.end() for match in _SEPARATOR.finditer(text) if first < match.end() < block)]
    if first < block < len(text) and text[starts[-1] : block].strip():
        starts.append(block)
    return starts


def _owners(offsets: Sequence[int], starts: Sequence[int]) -> list[int]:
    """For each token the index of its step: the one that holds the token's last character.

    Tokens without characters (pieces of a character not yet complete) go with the token that follows, and at the end
    (the stop token) with the last step.
    """
    owners = [len(starts) - 1] * len(offsets)
    step = len(starts) - 1
    for index in range(len(offsets) - 2, -1, -1):
        if offsets[index] > (offsets[index - 1] if index else 0):
            while starts[step] >= offsets[index]:
                step -= 1
        owners[index] = step
    return owners


def split_steps(tokens: Sequence[int], offsets: Sequence[int], text: str) -> list[Step]:
    """Split a response into steps whose token ranges tile ``tokens``; [] when there is no text.

    ``offsets[i]`` is the number of characters of ``text`` that the first i + 1 tokens cover (never decreasing). A
    step's range includes the separator after it, the last step's also the stop token. A token that holds the end of one
    step and the beginning of the next belongs to the step that it ends in, so that a step's score never has seen the
    next step. A step that owns no token at all is joined to its successor. ``Step.text`` is without the separators.
    """
    assert len(tokens) == len(offsets), f"{len(tokens)} tokens but {len(offsets)} offsets"
    assert all(a <= b for a, b in zip(offsets, offsets[1:], strict=False)), "offsets decrease"
    starts = _step_starts(text)
    if not starts:
        return []
    assert tokens, "text without tokens"
    owners = _owners(offsets, starts)
    ends = [*starts[1:], len(text)]
    steps: list[Step] = []
    token, char = 0, 0
    for step in range(len(starts)):
        end = token
        while end < len(owners) and owners[end] <= step:
            end += 1
        if end > token:
            steps.append(Step(token, end, text[char : ends[step]].strip()))
            token, char = end, ends[step]
    return steps


def step_ends(offsets: Sequence[int], starts: Sequence[int]) -> list[int]:
    """One past the last token of each step, in whatever tokens the text is in; a step's range is as
    :func:`split_steps` has it.

    ``offsets``: characters that the tokens so far cover. ``starts``: where the steps begin in the text, the first at 0.
    A step that owns no token ends where the one before it does, the first behind the first token.
    """
    owners = _owners(offsets, starts)
    return [max(1, bisect_right(owners, step)) for step in range(len(starts))]


def places_of_steps(text: str, steps: Sequence[Step]) -> list[tuple[int, int]]:
    """[begin, end) in characters of each step's own text, without separators, in its response's."""
    places, after = [], 0
    for step in steps:
        begin = text.index(step.text, after)
        after = begin + len(step.text)
        places.append((begin, after))
    return places


def reduce_scores(scores: Sequence[float], how: Reduction) -> float | None:
    """The response's process score from its steps' scores; None when there are none.

    Raises ValueError for a score that is not a finite number: comparisons with NaN would make the result depend on the
    order of the steps.
    """
    check_finite(scores)
    if not scores:
        return None
    if how == "min":
        return min(scores)
    if how == "prod":
        return math.prod(scores)
    if how == "mean":
        return math.fsum(scores) / len(scores)
    if how == "last":
        return scores[-1]
    raise ValueError(f"prm.reduction is {how!r}; it must be min, prod, mean or last")


def check_finite(scores: Sequence[float]) -> None:
    """Raises ValueError for a score that is not a finite number."""
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"step scores {list(scores)} are not all finite; the process reward model has diverged")


def count_stepless(groups: Iterable[Group]) -> int:
    """Number of responses without any step (their steps having been split)."""
    return sum(not response.steps for group in groups for response in group.responses)


def warn_stepless(count: int, total: int) -> str | None:
    """What to tell the person when ``count`` of ``total`` responses have no step; None when all have one."""
    if count == 0:
        return None
    text = f"{count} of {total} responses have no step and no process score"
    if count == total:
        return f"WARNING: NO RESPONSE HAS A STEP. {text}: the policy writes nothing but white space."
    if 2 * count > total:
        return f"WARNING: MORE THAN HALF OF THE RESPONSES HAVE NO STEP. {text}."
    return f"{text}."
