"""How a PRM reads a query and its responses, and where its scores come from.

A PRM with the policy's tokenizer reads the sampled tokens themselves. One with another tokenizer, or one that wants a
mark behind each step, reads the same text in its own tokens; step ends are carried over by their places in the text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.data.prefetch import Ahead
from mstar_mega.data.tokenizer import Tokenizer
from mstar_mega.data.types import Query, Response
from mstar_mega.models.families.base import Family
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import Prompt, StepIndex
from mstar_mega.rewards.steps import places_of_steps, step_ends


@dataclass(frozen=True)
class Mark:
    """What is written behind each step, where the PRM judges it."""

    text: str
    control: int | None
    """Id, where it is a control symbol, which no text can spell; None: it is text like any other."""


@dataclass(frozen=True)
class Judgement:
    """A PRM without a score head says good or bad by its next token."""

    good: int
    bad: int
    mark: Mark | None = None
    """None: it is asked at the step's last token."""

    def logits(self, model: LMM, hidden: Tensor, steps: StepIndex) -> Tensor:
        """float32 [K]: log-odds of the good token against the bad one behind each step's end (last stage)."""
        rows = hidden[steps.position]
        count = rows.size(0)
        if not count:
            return hidden.new_zeros(0, dtype=torch.float32)
        words = torch.tensor([self.good] * count + [self.bad] * count, device=hidden.device)
        log_probs = model.log_probs(rows.repeat(2, 1), words)  # what both are normalised by cancels out
        return log_probs[:count] - log_probs[count:]


@dataclass(frozen=True)
class Reading:
    """A response as the PRM reads it."""

    tokens: list[int]
    ends: list[int]
    """One past the last token of each of the response's steps."""


@dataclass(frozen=True)
class Reader:
    """What stands between text and a PRM's weights."""

    prompt_of: Callable[[Query], Prompt]
    """A query as the PRM's own family reads it."""
    family: Family | None = None
    """Whose tokenizer the responses are read with; None: they are the policy's tokens as sampled."""
    judgement: Judgement | None = None
    """None: the model has a score head."""
    stop_tokens: frozenset[int] = frozenset()
    """The policy's, which a judgement by words is not asked behind."""
    name: str = ""
    """Tells readers apart whose scores differ though the weights are the same; empty: a run's PRM in that run."""

    def expect(self, queries: Iterable[Query]) -> None:
        """These will be asked for soon, in this order."""
        if isinstance(self.prompt_of, Ahead):
            self.prompt_of.expect(queries)

    def read(self, response: Response) -> Reading:
        """The response's tokens for the PRM and where its steps end in them; nothing of one without steps."""
        if self.family is None:
            return self._as_sampled(response)
        if not response.steps:
            return Reading([], [])
        if self.judgement is None:
            return _in_own_tokens(response, self.family)
        if self.judgement.mark is not None:
            return _with_marks(response, self.family.tokenizer, self.judgement.mark)
        return _ended(self.family.tokenizer, self.family.tokenizer.encode(response.text), response)

    def _as_sampled(self, response: Response) -> Reading:
        tokens, ends = response.tokens, [step.end for step in response.steps]
        if self.judgement is not None and tokens and tokens[-1] in self.stop_tokens:
            tokens = tokens[:-1]
        return Reading(tokens, [min(end, len(tokens)) for end in ends])

    def logits(self, model: LMM, hidden: Tensor, steps: StepIndex) -> Tensor:
        """float32 [K]: log-odds that each step is good (last stage)."""
        if self.judgement is None:
            return model.step_logits(hidden, steps)
        return self.judgement.logits(model, hidden, steps)


@dataclass(frozen=True)
class PRM:
    """A process reward model: weights, and how they are given something to read."""

    model: LMM
    reader: Reader


def _in_own_tokens(response: Response, family: Family) -> Reading:
    """As a score head is taught: with the stop token, which belongs to the last step, unless the response was cut."""
    tokenizer = family.tokenizer
    tokens = tokenizer.encode(response.text) if response.truncated else family.response_tokens(response.text)
    return _ended(tokenizer, tokens, response)


def _ended(tokenizer: Tokenizer, tokens: list[int], response: Response) -> Reading:
    starts = [begin for begin, _ in places_of_steps(response.text, response.steps)]
    return Reading(tokens, step_ends(tokenizer.offsets(tokens), [0, *starts[1:]]))


def _with_marks(response: Response, tokenizer: Tokenizer, mark: Mark) -> Reading:
    """The text with the mark directly behind each step's own, in front of the blank line that follows."""
    stops = [stop for _, stop in places_of_steps(response.text, response.steps)]
    parts = [response.text[begin:stop] for begin, stop in zip([0, *stops], stops, strict=False)]
    if mark.control is not None:
        return _around(tokenizer, parts, mark.control)
    text, places = "", []
    for part in parts:
        text += part + mark.text
        places.append(len(text))
    tokens = tokenizer.encode(text)
    offsets = tokenizer.offsets(tokens)
    return Reading(tokens, [bisect_left(offsets, place) + 1 for place in places])


def _around(tokenizer: Tokenizer, parts: Sequence[str], control: int) -> Reading:
    """A control symbol cuts the text: what lies between is encoded by itself, as Hugging Face's tokenizers do."""
    tokens: list[int] = []
    ends = []
    for part in parts:
        tokens += [*tokenizer.encode(part), control]
        ends.append(len(tokens))
    return Reading(tokens, ends)
