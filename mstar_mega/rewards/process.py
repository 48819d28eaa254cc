"""Process scores: the PRM reads each query's image and prompt once and scores the steps of all its responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch

from mstar_mega.config import Reduction
from mstar_mega.data.types import Group, Step
from mstar_mega.functions import is_path, load, number
from mstar_mega.kernels.dispatch import is_on
from mstar_mega.kernels.process_scores import reduce_steps
from mstar_mega.models.inference import from_last_stage, inference, run_packed
from mstar_mega.models.packing import Prompt, cut_by_size, pack, step_index
from mstar_mega.platform import watch
from mstar_mega.platform.devices import to_device
from mstar_mega.platform.distributed import device
from mstar_mega.rewards.reader import PRM, Reading
from mstar_mega.rewards.steps import check_finite, reduce_scores


@dataclass(frozen=True)
class _Read:
    """A group as the PRM reads it."""

    group: Group
    prompt: Prompt
    responses: list[Reading]

    @property
    def tokens(self) -> int:
        return len(self.prompt.tokens) + sum(len(response.tokens) for response in self.responses)


def score_groups(prm: PRM, groups: Sequence[Group], reduction: Reduction | str, max_tokens: int) -> int:
    """Fill ``Step.score`` and ``Response.score`` in place, on every rank of the model copy.

    A response without any step keeps the score None. At most about ``max_tokens`` tokens go through the PRM at once.
    Returns the number of responses that are, with their prompt, longer than the PRM's context: it has not read them,
    and their steps have the worst score, 0.
    """
    prm.reader.expect(group.query for group in groups)
    read = (_read(prm, group) for group in groups)  # each prompt is made when its turn comes
    too_long = 0
    with inference(prm.model):
        for part in cut_by_size(read, lambda each: each.tokens, max_tokens):
            too_long += _score(prm, part)
            watch.beat()
    reduce_groups(groups, reduction)
    return too_long


def _read(prm: PRM, group: Group) -> _Read:
    return _Read(group, prm.reader.prompt_of(group.query), [prm.reader.read(each) for each in group.responses])


def reduce_groups(groups: Sequence[Group], reduction: Reduction | str) -> None:
    """Fill ``Response.score`` from the scores of its steps, in place; None where there are none.

    Raises ValueError for a score that is not a finite number.
    """
    responses = [response for group in groups for response in group.responses]
    scores = [[step.score for step in response.steps if step.score is not None] for response in responses]
    if is_path(reduction):
        function = load("prm.reduction", reduction)
        for of_response in scores:
            check_finite(of_response)
        reduced = [
            number("prm.reduction", reduction, function(of_response)) if of_response else None for of_response in scores
        ]
    elif not is_on("step_scores"):
        reduced = [reduce_scores(of_response, cast(Reduction, reduction)) for of_response in scores]
    else:
        for of_response in scores:
            check_finite(of_response)
        offsets = to_device([0, *accumulate(map(len, scores))], device())
        flat = to_device([score for of_response in scores for score in of_response], device(), torch.float64)
        values = reduce_steps(flat, offsets, cast(Reduction, reduction)).tolist()
        reduced = [value if of_response else None for value, of_response in zip(values, scores, strict=True)]
    for response, score in zip(responses, reduced, strict=True):
        response.score = score


def _score(prm: PRM, part: list[_Read]) -> int:
    """Score the steps of these groups; returns how many responses are too long to be read."""
    model = prm.model
    context = model.size.context if prm.reader.name else None  # the policy's own bounds are kept by the policy
    tokens: list[list[list[int]]] = [[] for _ in part]
    ends: list[list[list[int]]] = [[] for _ in part]
    steps: list[Step] = []
    too_long = 0
    for g, each in enumerate(part):
        for response, reading in zip(each.group.responses, each.responses, strict=True):
            if context is not None and len(each.prompt.tokens) + len(reading.tokens) > context:
                too_long += 1
                for step in response.steps:
                    step.score = 0.0
                continue
            tokens[g].append(reading.tokens)
            ends[g].append(reading.ends)
            steps += response.steps
    if not steps:
        return too_long
    where = next(model.parameters()).device
    batch = pack(
        [each.prompt for each in part], tokens, model.stream_multiple, model.rope.regimes, device=where,
        unpadded=model.unpadded_prompts,
    )  # fmt: skip
    hidden = run_packed(model, batch)
    scores = torch.empty(len(steps), device=where)
    if hidden is not None:
        scores = torch.sigmoid(prm.reader.logits(model, hidden, step_index(batch, tokens, ends)))
    for step, score in zip(steps, from_last_stage(scores).tolist(), strict=True):
        step.score = score
    return too_long
