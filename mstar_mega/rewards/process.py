"""Process scores: the PRM reads each query's image and prompt once and scores the steps of all its responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from mstar_mega.config import Reduction
from mstar_mega.data.types import Group, Query
from mstar_mega.kernels.dispatch import is_on
from mstar_mega.kernels.process_scores import reduce_steps
from mstar_mega.models.inference import from_last_stage, inference, run_packed
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import Prompt, cut_by_size, pack, step_index
from mstar_mega.rewards.steps import check_finite, reduce_scores


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
    pairs = ((group, prompt_of(group.query)) for group in groups)  # each prompt is made when its turn comes
    with inference(prm):
        for part in cut_by_size(pairs, _tokens_of, max_tokens):
            _score(prm, [group for group, _ in part], [prompt for _, prompt in part])
    reduce_groups(groups, reduction)


def reduce_groups(groups: Sequence[Group], reduction: Reduction) -> None:
    """Fill ``Response.score`` from the scores of its steps, in place; None where there are none.

    Raises ValueError for a score that is not a finite number.
    """
    responses = [response for group in groups for response in group.responses]
    scores = [[step.score for step in response.steps if step.score is not None] for response in responses]
    if not is_on("step_scores"):
        reduced = [reduce_scores(of_response, reduction) for of_response in scores]
    else:
        for of_response in scores:
            check_finite(of_response)
        offsets = torch.tensor([0, *accumulate(map(len, scores))])
        flat = torch.tensor([score for of_response in scores for score in of_response], dtype=torch.float64)
        values = reduce_steps(flat, offsets, reduction).tolist()
        reduced = [value if of_response else None for value, of_response in zip(values, scores, strict=True)]
    for response, score in zip(responses, reduced, strict=True):
        response.score = score


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


def _tokens_of(pair: tuple[Group, Prompt]) -> int:
    group, prompt = pair
    return len(prompt.tokens) + sum(len(response.tokens) for response in group.responses)
