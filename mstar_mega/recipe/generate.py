"""The generate phase of an iteration, and the check that generating and training agree on log-probs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice

import torch
import torch.distributed as dist

from mstar_mega.data.types import Group
from mstar_mega.models.inference import from_last_stage, inference, run_packed
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import next_token_targets, pack
from mstar_mega.platform.distributed import sum_over_data
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


def check_log_probs(job: Job, policy: LMM, now: Interval, groups: Iterable[Group], temperature: float | None) -> None:
    """Score some responses again with the training forward; stop the run where the two disagree beyond the limit.

    Raises ValueError with the gap and what it means.
    """
    settings = job.config.generation
    temperature = iteration_sampling(job, now.number, temperature).temperature
    limit = settings.log_prob_gap_limit
    if limit is None:
        # bfloat16 rounds logits, and a low temperature spreads them: what is rounding at 1 is more below.
        limit = 1e-3 if job.config.model.precision == "float32" else 0.5 / min(1.0, temperature)
    chosen = islice((group for group in groups if group.responses), settings.log_prob_gap_queries)
    gaps = torch.cat([torch.zeros(0), *(_gaps(job, policy, group, temperature) for group in chosen)]).double()
    largest = torch.tensor(float(gaps.max()) if gaps.numel() else 0.0, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    total = sum_over_data({"sum": float(gaps.sum()), "tokens": gaps.numel()})
    mean = total["sum"] / max(1.0, total["tokens"])
    tokens = int(total["tokens"])
    job.log("log_prob_gap", iteration=now.number, largest=float(largest), mean=mean, tokens=tokens, limit=limit)
    if not float(largest) <= limit:
        raise ValueError(
            f"iteration {now.number}: the log-prob of a generated token differs by {float(largest):.2e} between the "
            f"generation engine and the training forward (mean {mean:.2e}, limit {limit:.0e}). The responses do not "
            "come from the policy that is trained: this is a defect of the engine or of the hardware, not of the data. "
            "Raise generation.log_prob_gap_limit only if you know why they differ"
        )


def _gaps(job: Job, policy: LMM, group: Group, temperature: float) -> torch.Tensor:
    """|generated - recomputed| log-prob of a group's tokens, float32 [tokens].

    Tokens that were drawn before their sequence grew into another rotary regime (``Rope``) are left out: training sees
    the whole sequence, so that the two rightly differ.
    """
    tokens = [[response.tokens for response in group.responses]]
    batch = pack([job.prompt(group.query)], tokens, policy.stream_multiple, policy.rope.regimes)
    source, target = next_token_targets(batch, tokens)
    with inference(policy):
        hidden = run_packed(policy, batch)
        again = torch.empty(target.numel())
        if hidden is not None:
            again = policy.log_probs(hidden[source], target, temperature)
        again = from_last_stage(again)
    generated = torch.tensor([value for response in group.responses for value in response.log_probs])
    gaps = (again.float() - generated).abs()
    regimes = policy.rope.regimes
    if regimes is None:
        return gaps
    start = len(job.family.prompt(group.query).tokens)
    alike = [regimes(start + t) == regimes(start + len(r)) for r in tokens[0] for t in range(len(r))]
    return gaps[torch.tensor(alike, dtype=torch.bool)]
