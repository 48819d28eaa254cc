"""The generate phase of an iteration, and the check that generating and training agree on log-probs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
import torch.distributed as dist

from mstar_mega.data.types import Group
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.inference import from_last_stage, inference, run_packed
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import next_token_targets, pack
from mstar_mega.platform.devices import to_device
from mstar_mega.platform.distributed import device, sum_over_data
from mstar_mega.recipe.blocks import Blocks
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.recipe.fit import Position
from mstar_mega.recipe.intervals import Interval, next_interval
from mstar_mega.recipe.method import resolve_method
from mstar_mega.recipe.rollouts import Actors, Sampling, all_on_disk, drawn, rollout
from mstar_mega.rewards.steps import warn_stepless


def iteration_directory(number: int) -> str:
    """Where an iteration's rollouts lie, under ``rollouts``."""
    return f"iteration_{number:04d}"


def iteration_sampling(job: Job, number: int, temperature: float | None) -> Sampling:
    """How the responses of an iteration are drawn."""
    if temperature is None:  # no sweep has been yet: sft has none, and a run may go on from it with another method
        temperature = job.config.temperature.value
    return Sampling(iteration_directory(number), temperature, job.config.evolve.responses)


def generate(job: Job, actors: Actors, now: Interval, position: Position) -> Blocks:
    """Sample, judge and score the interval's responses; they are on disk.

    Notes in ``position`` who draws them. Resumed inside the iteration, the responses are those on disk.
    """
    position.drawn_by = position.drawn_by if position.step else actors.fingerprint()
    timer, score_before = Timer(job), job.score_seconds
    sampling = iteration_sampling(job, now.number, position.temperature)
    temperature = sampling.temperature
    groups = rollout(job, actors, now.queries, sampling, position.drawn_by)
    counts = sum_over_data(_counts(job, now, groups))
    whole = {name: int(value) for name, value in sorted(counts.items()) if " " not in name}
    checker, vote = (
        {name.removeprefix(of): int(value) for name, value in sorted(counts.items()) if name.startswith(of)}
        for of in ("checker ", "vote ")
    )
    score_seconds = round(job.score_seconds - score_before, 3)
    job.log(
        "generation",
        iteration=now.number,
        temperature=temperature,
        **whole,
        checker=checker,
        **({"vote": vote} if vote else {}),
        unlabelled_queries=len(now.unlabelled),
        seconds=round(timer.seconds - score_seconds, 3),
        score_seconds=score_seconds,
    )
    judged = {name: whole[name] - vote.get(name, 0) for name in ("queries", "responses")}
    job.say(
        f"   iteration {now.number}: {whole['responses']} responses at temperature {temperature}, "
        f"{100 * whole['correct'] / max(1, judged['responses']):.1f}% correct, "
        f"{whole['queries_without_correct']} of {judged['queries']} queries without a correct one"
    )
    if vote:
        job.say(
            f"   vote on {vote['queries']} unlabelled queries: right for {vote['answers_right']} of the "
            f"{vote['answers_known']} whose answer is known, {vote['agreeing']} of {vote['responses']} responses agree"
        )
    warning = warn_stepless(whole["without_steps"], whole["responses"])
    if warning:
        job.say(warning)
    return groups


def _counts(job: Job, now: Interval, blocks: Blocks) -> Counter[str]:
    """What the event ``generation`` says of these groups; the verdicts as ``checker HOW``.

    What agrees with a vote's pseudo answer is not counted as correct: it stands under ``vote WHAT``.
    """
    names = ("queries", "responses", "tokens", "truncated", "without_steps", "correct", "queries_without_correct")
    counts = Counter(dict.fromkeys(names, 0))
    voting = job.config.prompts.unlabelled == "voting"
    for groups, places in blocks.read_blocks():
        counts.update(drawn(groups))
        for group, (position, _) in zip(groups, places, strict=True):
            correct = sum(bool(response.correct) for response in group.responses)
            counts["queries"] += 1
            counts["truncated"] += sum(response.truncated for response in group.responses)
            counts["without_steps"] += sum(not response.steps for response in group.responses)
            if voting and position >= len(now.labelled):
                counts.update(_vote_counts(job, group, agreeing=correct))
            else:
                counts["correct"] += correct
                counts["queries_without_correct"] += not correct
                counts.update(f"checker {response.verdict}" for response in group.responses)
    return counts


def _vote_counts(job: Job, group: Group, agreeing: int) -> dict[str, int]:
    """The vote on one unlabelled query against its hidden answer, which nothing else reads."""
    voted, hidden = group.query.answer, group.query.hidden_answer
    right = None not in (voted, hidden) and job.checker.check(str(voted), str(hidden), group.query.choices).correct
    return {
        "vote queries": 1,
        "vote responses": len(group.responses),
        "vote agreeing": agreeing,
        "vote answers_known": hidden is not None,
        "vote answers_right": right,
    }


def can_resume(job: Job, position: Position) -> bool:
    """Whether a checkpoint taken at ``position`` can go on: inside an iteration the responses must all be on disk.

    The weights that drew them are gone by then, so a missing one could only be drawn again from the iteration's start.
    """
    if position.step == 0 or job.config.evolve.method == "sft":
        return True
    now = next_interval(job, resolve_method(job.config.evolve), position)
    if now is None:
        return True
    sampling = iteration_sampling(job, now.number, position.temperature)
    return all_on_disk(job, now.queries, sampling, position.drawn_by)


MOST_ABOVE = 1e-3
"""In bfloat16: share of the tokens whose gap may be above the limit. The largest of them grows with their number; this
share, a high quantile read the other way round, does not. One response of 128 from a wrong cache is far beyond it."""


def check_log_probs(job: Job, policy: LMM, now: Interval, groups: Blocks, temperature: float | None) -> None:
    """Score some responses again with the training forward; stop the run where the two disagree beyond the limit.

    In float32 no token may be above the limit, in bfloat16 :data:`MOST_ABOVE` of them. Raises ValueError with the gap
    and what it means.
    """
    settings = job.config.generation
    temperature = iteration_sampling(job, now.number, temperature).temperature
    limit = settings.log_prob_gap_limit
    if limit is None:
        # bfloat16 rounds logits, and a low temperature spreads them: what is rounding at 1 is more below.
        limit = 1e-3 if job.config.model.precision == "float32" else 0.5 / min(1.0, temperature)
    chosen = spread_over_blocks(groups, settings.log_prob_gap_queries, (job.config.seed, "log_prob_gap", now.number))
    found = [_gaps(job, policy, group, temperature) for group in chosen]
    gaps = torch.cat([torch.zeros(0, device=device()), *found]).double()
    largest = gaps.max() if gaps.numel() else gaps.new_zeros(())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    # A NaN is above every limit.
    above = int((~(gaps <= limit)).sum())
    total = sum_over_data({"sum": float(gaps.sum()), "tokens": gaps.numel(), "above": above})
    mean, above_share = (total[name] / max(1.0, total["tokens"]) for name in ("sum", "above"))
    allowed = 0.0 if job.config.model.precision == "float32" else MOST_ABOVE
    measured = {"largest": float(largest), "mean": mean, "above_limit": above_share, "tokens": int(total["tokens"])}
    job.log("log_prob_gap", iteration=now.number, **measured, limit=limit)
    if above_share > allowed:
        raise ValueError(
            f"iteration {now.number}: the log-prob of a generated token differs by {float(largest):.2e} between the "
            f"generation engine and the training forward (mean {mean:.2e}; {above_share:.1e} of the tokens are above "
            f"the limit, {limit:.0e}). The responses do not come from the policy that is trained: a defect of "
            "the engine or of the hardware, not of the data. "
            "Raise generation.log_prob_gap_limit only if you know why they differ"
        )


def spread_over_blocks(blocks: Blocks, most: int, key: tuple[object, ...]) -> list[Group]:
    """At most so many of this rank's groups with responses, as evenly over its blocks as they go, by hash in each.

    A block's first queries are decoded in slots that are used for the first time: these alone would show little.
    """
    ranked = []
    for block in blocks.mine:
        first = block * blocks.size
        order = sorted(range(len(blocks.of(block))), key=lambda row: key_of(*key, blocks.queries[first + row].id))
        ranked += [(turn, key_of(*key, "block", block), block, row) for turn, row in enumerate(order)]
    chosen: dict[int, set[int]] = {}
    for _, _, block, row in sorted(ranked)[:most]:
        chosen.setdefault(block, set()).add(row)
    found = []
    for block in sorted(chosen):
        groups, _ = next(replace(blocks, mine=range(block, block + 1)).read_blocks())
        found += [group for row, group in enumerate(groups) if row in chosen[block] and group.responses]
    return found


def _gaps(job: Job, policy: LMM, group: Group, temperature: float) -> torch.Tensor:
    """|generated - recomputed| log-prob of a group's tokens, float32 [tokens].

    Tokens that were drawn before their sequence grew into another rotary regime (``Rope``) are left out: training sees
    the whole sequence, so that the two rightly differ.
    """
    tokens = [[response.tokens for response in group.responses]]
    batch = pack(
        [job.prompt(group.query)], tokens, policy.stream_multiple, policy.rope.regimes, device=device(),
        unpadded=policy.unpadded_prompts,
    )  # fmt: skip
    source, target = next_token_targets(batch, tokens)
    with inference(policy):
        hidden = run_packed(policy, batch)
        again = torch.empty(target.numel(), device=target.device)
        if hidden is not None:
            again = policy.log_probs(hidden[source], target, temperature)
        again = from_last_stage(again)
    drawn_with = [value for response in group.responses for value in response.log_probs]
    generated = to_device(drawn_with, again.device, torch.float32)
    gaps = (again.float() - generated).abs()
    regimes = policy.rope.regimes
    if regimes is None:
        return gaps
    start = len(job.family.prompt(group.query).tokens)
    alike = [regimes(start + t) == regimes(start + len(r)) for r in tokens[0] for t in range(len(r))]
    return gaps[torch.tensor(alike, dtype=torch.bool, device=gaps.device)]
