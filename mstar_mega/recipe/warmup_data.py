"""A warm-up set for a policy that answers without reasoning (paper section 3, 'CoT unlocking').

The policy is given question, image and gold answer and asked for the reasoning that leads there; responses whose final
answer is the gold one are kept, as responses to the plain question: the set is a ``data.warmup_file``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mstar_mega.data.types import Query, Response
from mstar_mega.data.written_out import write
from mstar_mega.platform.distributed import all_gather_objects, barrier
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.directory import on_main
from mstar_mega.recipe.rollouts import Actors, Sampling, rollout

SET_FILE = "warmup_set.jsonl"
NAME = "warmup_data"
"""Directory under ``rollouts``."""
# The paper's own wording is not public.
INSTRUCTION = (
    "The correct answer is: {answer}\n"
    "Work out in detail how one gets there from what can be seen and from the question, without mentioning that the "
    "answer was given. Write one step after another, with a blank line between two steps. Close with a line "
    "'# Answer', a blank line, and the answer alone."
)


def with_gold_answer(query: Query) -> Query:
    """The query that asks for the reasoning behind its own gold answer."""
    assert query.answer is not None, "only labelled queries can be asked"
    return replace(query, question=f"{query.question}\n\n{INSTRUCTION.format(answer=query.answer)}")


def kept_responses(responses: Sequence[Response], most: int) -> list[Response]:
    """The first ``most`` distinct responses that arrive at the gold answer in at least one step before it."""
    chosen: dict[str, Response] = {}
    for response in responses:
        if response.correct and not response.truncated and len(response.steps) > 1:
            chosen.setdefault(response.text, response)
    return list(chosen.values())[:most]


def make_warmup_set(job: Job, actors: Actors) -> Path:
    """Sample, judge and filter; writes ``warmup_set.jsonl`` in the run directory. Collective.

    Killed, the same command goes on from the blocks that are on disk. Raises ValueError where nothing was kept.
    """
    settings = job.config.warmup
    plain = {query.id: query for query in job.task.labelled[: settings.queries or None]}
    sampling = Sampling(NAME, settings.temperature, settings.responses)
    asked = [with_gold_answer(query) for query in plain.values()]
    mine: list[tuple[str, list[str]]] = []
    counted: Counter[str] = Counter()
    for group in rollout(job, actors, asked, sampling):
        mine.append((group.query.id, [each.text for each in kept_responses(group.responses, settings.keep)]))
        counted["drawn"] += len(group.responses)
        counted["right"] += sum(bool(each.correct) for each in group.responses)
        counted["cut"] += sum(each.truncated for each in group.responses)
    everyone = all_gather_objects((mine, counted))
    kept = sorted(each for part, _ in everyone for each in part)
    counted = sum((counts for _, counts in everyone), Counter())
    useful = [(plain[id], texts) for id, texts in kept if texts]
    path = job.dir / SET_FILE
    counts = (
        f"{counted['drawn']} responses to {len(kept)} queries: {counted['right']} with the gold answer, "
        f"{counted['cut']} cut at the length limit"
    )
    if not useful:
        raise ValueError(
            f"no warm-up set: {counts}, none of them with reasoning before the answer. Raise warmup.responses or "
            "generation.max_new_tokens, or start from a policy that follows instructions"
        )

    examples = [(query, text) for query, texts in useful for text in texts]
    on_main(job.layout.is_main, lambda: write(path, examples))
    barrier()
    job.progress.say(f"{counts}\nkept {len(examples)} of {len(useful)} queries; {len(kept) - len(useful)} have none")
    job.progress.say(f"warm-up set: {path} (train on it with --data.warmup_file {path})")
    return path
