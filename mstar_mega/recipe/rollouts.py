"""Generate and reward: sampled, judged and scored responses of queries, on disk block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from mstar_mega.data.types import Group, Query, Response
from mstar_mega.functions import is_path
from mstar_mega.generation.engine import Engine, Request, Sample, SampleSpec, SamplingAbandoned
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.fingerprint import fingerprint
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import cut_by_size
from mstar_mega.platform import stopping, watch
from mstar_mega.platform.distributed import all_gather_objects, from_lead, model_copy
from mstar_mega.recipe.blocks import Blocks, Made, OpenBlock, Wanted, all_finished, cut, stream_blocks
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.rewards.answers import extract_answer
from mstar_mega.rewards.process import score_groups
from mstar_mega.rewards.reader import PRM
from mstar_mega.rewards.reward import judge_response
from mstar_mega.rewards.steps import split_steps
from mstar_mega.rewards.voting import apply_pseudo_answers

VALIDATION_NOISE = "validation"
"""Names the random numbers of every measurement on validation queries. Sweeps, at all temperatures, and measurements
after all iterations share them: two of these differ by what temperature and training have changed."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    name: str
    """Directory under ``rollouts``."""
    temperature: float
    """0: greedy."""
    responses: int
    key: str = ""
    """Names the random numbers, with the query id and the sample index; empty: ``name`` does."""


LOOK_EVERY = 32
"""Decode steps between two looks at whether the time to finish a block is over."""


class _Patience:
    """Abandons a block that is not finished so many seconds after the job was asked to stop."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._steps = seconds, 0

    def __call__(self) -> None:
        self._steps += 1
        watch.beat()
        if self._steps % LOOK_EVERY == 0 and stopping.agreed(model_copy(), after=self._seconds):
            raise SamplingAbandoned


class Actors:
    """The policy's engine and the PRM (None where the settings need none)."""

    def __init__(self, job: Job, policy: LMM, prm: PRM | None) -> None:
        self.engine = Engine(policy, job.family, job.config.generation, job.config.seed)
        self.engine.between_steps = _Patience(job.config.run.grace_seconds)
        self.policy = policy
        self.use_prm(prm)

    def use_prm(self, prm: PRM | None) -> None:
        """Score with this PRM from now on. Collective over the model copy."""
        self.prm = prm
        read = f" read as {prm.reader.name}" if prm is not None and prm.reader.name else ""
        self._prm_fingerprint = "none" if prm is None else f"{fingerprint(prm.model)}{read}"

    def fingerprint(self) -> str:
        """Names the present weights of policy and PRM, and how that reads. Collective over the model copy."""
        return f"policy {fingerprint(self.policy)}, PRM {self._prm_fingerprint}"


def rollout(
    job: Job, actors: Actors, queries: Sequence[Query], sampling: Sampling, drawn_by: str | None = None
) -> Blocks:
    """Responses of this data-parallel rank's share of the queries: judged, and scored where there is a PRM.

    ``drawn_by`` names the actors that draw them, as they were; None: as they are now.
    """

    return rollouts(job, actors, queries, [sampling], drawn_by)[0]


def rollouts(
    job: Job, actors: Actors, queries: Sequence[Query], samplings: Sequence[Sampling], drawn_by: str | None = None
) -> list[Blocks]:
    """:func:`rollout` in several ways at once, for example at several temperatures: each image is encoded once for all.

    The responses are what they would be one rollout after the other.
    """

    def finish(made: list[list[Group]]) -> list[list[Group]]:
        if actors.prm is not None:
            timer = Timer(job)
            score_responses(job, actors.prm, _joined(made, job.config.generation.prefill_tokens))
            job.score_seconds += timer.seconds
        made = [[_with_answer(job, group) for group in groups] for groups in made]
        judge(job, [group for groups in made for group in groups])
        return made

    drawn_by = drawn_by or actors.fingerprint()
    wanted = [Wanted(job.rollouts / each.name, _origin(job, each, drawn_by)) for each in samplings]
    names = samplings[0].name if len(samplings) == 1 else f"{samplings[0].name} to {samplings[-1].name}"
    make = partial(sample_blocks, job, actors.engine, samplings, finish)
    return stream_blocks(job, queries, wanted, f"sample {names}", make)


def _joined(made: Sequence[Sequence[Group]], most_tokens: int) -> list[Group]:
    """The responses to each query together, whatever rollout they are of, in groups of about so many tokens."""
    found = []
    for of_query in zip(*made, strict=True):
        responses = [response for group in of_query for response in group.responses]
        parts = cut_by_size(responses, lambda response: len(response.tokens), most_tokens)
        found += [Group(of_query[0].query, part) for part in parts]
    return found


def sample_blocks(
    job: Job,
    engine: Engine,
    samplings: Sequence[Sampling],
    finish: Callable[[list[list[Group]]], list[list[Group]]],
    blocks: Iterator[tuple[int, Sequence[Query]]],
) -> Iterator[Made]:
    """Sample blocks of queries in all these ways, in one stream; ``finish`` completes a block's groups of each way."""
    on_the_way: dict[int, tuple[OpenBlock[list[Sample]], int]] = {}

    def requests() -> Iterator[Request]:
        number = 0
        for name, queries in blocks:
            block = OpenBlock[list[Sample]](name, queries)
            for place, query in enumerate(queries):
                on_the_way[number] = block, place
                number += 1
                specs = [
                    replace(spec, temperature=how.temperature)
                    for how in samplings
                    for spec in sample_specs(how.key or how.name, query, how.responses)
                ]
                yield Request(job.prompt(query), specs)

    for number, samples in engine.stream(requests(), samplings[0].temperature):
        block, place = on_the_way.pop(number)
        if block.add(place, samples):
            yield block.number, finish(_groups(job, samplings, block))


def _groups(job: Job, samplings: Sequence[Sampling], block: OpenBlock[list[Sample]]) -> list[list[Group]]:
    """A block's groups of each way of sampling, not judged, not scored."""
    made: list[list[Group]] = []
    first = 0
    for how in samplings:
        drawn = [samples[first : first + how.responses] for samples in block.in_order()]
        made.append([to_group(job, *of_query) for of_query in zip(block.queries, drawn, strict=True)])
        first += how.responses
    return made


def score_responses(job: Job, prm: PRM, groups: Sequence[Group]) -> None:
    """Process scores of the groups, in place; warns of responses that the PRM cannot read."""
    settings = job.config
    too_long = score_groups(prm, groups, settings.prm.reduction, settings.generation.prefill_tokens)
    if too_long and job.writes_files:
        job.warn(
            f"{too_long} responses from query {groups[0].query.id} on are too long for the PRM, whose context is "
            f"{prm.model.size.context} tokens: they have the worst process score, 0"
        )


def all_on_disk(job: Job, queries: Sequence[Query], sampling: Sampling, drawn_by: str) -> bool:
    """Whether a rollout by these actors (see :meth:`Actors.fingerprint`) is on disk, every block of it whole."""
    return all_finished(job, cut(job, queries, job.rollouts / sampling.name), _origin(job, sampling, drawn_by))


def sampling_limits(job: Job) -> dict[str, Any]:
    """The engine's settings that change what is drawn."""
    generation = job.config.generation
    return {"max_new_tokens": generation.max_new_tokens, "top_k": generation.top_k, "top_p": generation.top_p}


def _origin(job: Job, sampling: Sampling, drawn_by: str) -> dict[str, Any]:
    """What a rollout's responses depend on, besides the queries and the seed."""
    return {
        "drawn_by": drawn_by,
        "temperature": sampling.temperature,
        "responses": sampling.responses,
        **({"noise": sampling.key} if sampling.key else {}),
        "reduction": job.config.prm.reduction,
        "unlabelled": job.config.prompts.unlabelled,
        **({"reward": asdict(job.config.reward)} if is_path(job.config.reward.function) else {}),
        **sampling_limits(job),
    }


def sample_groups(job: Job, engine: Engine, queries: Sequence[Query], sampling: Sampling) -> list[Group]:
    """Sample responses and split them into steps; not judged, not scored."""
    key = sampling.key or sampling.name
    requests = [Request(job.prompt(query), sample_specs(key, query, sampling.responses)) for query in queries]
    drawn = engine.generate(requests, sampling.temperature)
    return [to_group(job, query, samples) for query, samples in zip(queries, drawn, strict=True)]


def sample_specs(name: str, query: Query, count: int) -> list[SampleSpec]:
    """``count`` fresh samples of a query; their random numbers are named by (name, query id, sample index)."""
    return [SampleSpec(key_of(name, query.id, i)) for i in range(count)]


def to_group(job: Job, query: Query, samples: Sequence[Sample]) -> Group:
    """A query with its responses, not judged, not scored."""
    return Group(query, [to_response(job, i, sample) for i, sample in enumerate(samples)])


def to_response(job: Job, index: int, sample: Sample) -> Response:
    """Text, answer and steps of a drawn sample."""
    tokenizer = job.family.tokenizer
    text = tokenizer.decode(sample.tokens)
    steps = split_steps(sample.tokens, tokenizer.offsets(sample.tokens), text)
    return Response(index, sample.tokens, text, sample.log_probs, sample.truncated, extract_answer(text), steps=steps)


def judge(job: Job, groups: Sequence[Group]) -> None:
    """Compare every response's answer with its query's, in place.

    One rank of a model copy asks the checker and tells the others, so that a time-out cannot divide them.
    """
    pairs = [(group.query, response) for group in groups for response in group.responses]
    verdicts = []
    if job.writes_files:
        verdicts = [judge_response(query, response, job.config.reward, job.checker) for query, response in pairs]
    for (_, response), verdict in zip(pairs, from_lead(verdicts), strict=True):
        verdict.note(response)


def _with_answer(job: Job, group: Group) -> Group:
    """Give an unlabelled query the answer that the settings let it have (paper section 5)."""
    if group.query.answer is not None:
        return group
    if job.config.prompts.unlabelled == "oracle":
        return Group(replace(group.query, answer=group.query.hidden_answer), group.responses)
    return apply_pseudo_answers(group)


def drawn(groups: Iterable[Group]) -> Counter[str]:
    """How much was generated: ``responses`` and their ``tokens``."""
    counts = Counter(responses=0, tokens=0)
    for group in groups:
        counts["responses"] += len(group.responses)
        counts["tokens"] += sum(len(response.tokens) for response in group.responses)
    return counts


def gather_groups(groups: Iterable[Group]) -> list[Group]:
    """All data-parallel ranks' groups, by query id: for evaluation sets, which are small."""
    everyone = [group for part in all_gather_objects(list(groups)) for group in part]
    return sorted(everyone, key=lambda group: group.query.id)
