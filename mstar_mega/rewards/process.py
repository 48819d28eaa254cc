"""Process scores: the PRM reads each query's image and prompt once and scores the steps of all its responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from mstar_mega.config import Reduction
from mstar_mega.data.types import Group, Query
from mstar_mega.models.inference import from_last_stage, inference, run_packed
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import Prompt, pack, step_index
from mstar_mega.rewards.steps import reduce_scores


def score_groups(
    prm: LMM,
    prompt_of: Callable[[Query], Prompt],
    groups: Sequence[Group],
    reduction: Reduction,
    max_tokens: int,
) -> None:
    """Fill ``Step.score`` and ``Response.score`` in place, on every rank of the model copy.

    A response without any step keeps the score None. At most about ``max_tokens`` tokens go through the PRM at once.
    """
    with inference(prm):
        for part, prompts in _by_tokens(groups, prompt_of, max_tokens):
            _score(prm, part, prompts)
    for group in groups:
        for response in group.responses:
            scores = [step.score for step in response.steps if step.score is not None]
            response.score = reduce_scores(scores, reduction)


def _score(prm: LMM, groups: list[Group], prompts: list[Prompt]) -> None:
    tokens = [[response.tokens for response in group.responses] for group in groups]
    ends = [[[step.end for step in response.steps] for response in group.responses] for group in groups]
    steps = [step for group in groups for response in group.responses for step in response.steps]
    batch = pack(prompts, tokens, prm.stream_multiple, prm.rope.regimes)
    hidden = run_packed(prm, batch)
    scores = torch.empty(len(steps))
    if hidden is not None:
        scores = torch.sigmoid(prm.step_logits(hidden, step_index(batch, tokens, ends)))
    for step, score in zip(steps, from_last_stage(scores).tolist(), strict=True):
        step.score = score


def _by_tokens(
    groups: Sequence[Group], prompt_of: Callable[[Query], Prompt], max_tokens: int
) -> Iterator[tuple[list[Group], list[Prompt]]]:
    part: list[Group] = []
    prompts: list[Prompt] = []
    room = max_tokens
    for group in groups:
        prompt = prompt_of(group.query)
        size = len(prompt.tokens) + sum(len(r.tokens) for r in group.responses)
        if part and size > room:
            yield part, prompts
            part, prompts, room = [], [], max_tokens
        part.append(group)
        prompts.append(prompt)
        room -= size
    if part:
        yield part, prompts
