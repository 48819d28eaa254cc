"""Ask a policy the questions of a benchmark, and score its responses by the benchmark's rules.

Responses are drawn block by block like all rollouts, so a killed run goes on where it was; scores and page are made
from them anew each time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from mstar_mega.config import BenchmarkConfig, Config, ModelConfig
from mstar_mega.data.pictures import PictureReading
from mstar_mega.data.types import Group, Response, Task
from mstar_mega.evaluation.asking import Asked, ask
from mstar_mega.evaluation.benchmarks import Benchmark, find, load_problems
from mstar_mega.evaluation.files import files_of
from mstar_mega.evaluation.passk import pass_at_k, sample_accuracy
from mstar_mega.evaluation.problem import Problem, Reading, Rules
from mstar_mega.evaluation.scoring import Prediction, Predictions, Scores, read, score, tally
from mstar_mega.models.build import build_model
from mstar_mega.models.description import MODEL_FILES, family_from_hf
from mstar_mega.models.lmm import LMM
from mstar_mega.platform.distributed import barrier
from mstar_mega.platform.files import sha256_file, write_text_atomic
from mstar_mega.platform.inputs import read_object, refuse_links_out
from mstar_mega.recipe.blocks import Wanted, stream_blocks
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.directory import on_main
from mstar_mega.recipe.fit import load_start
from mstar_mega.recipe.opening import newest_policy, open_job
from mstar_mega.recipe.outside_prm import load_outside_prm
from mstar_mega.recipe.prm import load_prm
from mstar_mega.recipe.rollouts import Actors, Sampling, gather_groups, sample_blocks, sampling_limits, score_responses
from mstar_mega.report.benchmark_page import write_page
from mstar_mega.rewards.reader import PRM
from mstar_mega.rewards.voting import best_winner, majority_winner, weighted_winner
from mstar_mega.settings import CONFIG_FILE, load

PREDICTIONS, SCORES, PAGE = "predictions.jsonl", "scores.json", "index.html"


@dataclass(frozen=True)
class Request:
    """What is evaluated on what."""

    checkpoint: Path
    """A run directory, or a converted checkpoint."""
    benchmark: str
    data: Path
    out: Path
    limit: int | None
    """Only the first so many questions (circles, where there are any)."""
    settings: BenchmarkConfig


def evaluate(config: Config, request: Request) -> None:
    """Draw the responses that are missing, and write predictions, scores and the page.

    ``config`` comes from :func:`settings_of` the checkpoint.

    Raises ValueError for what the user can mend.
    """
    benchmark = find(request.benchmark)
    if request.out.resolve() == request.checkpoint.resolve():
        raise ValueError(f"--out {request.out} is the checkpoint's own directory: choose another")
    _check_out(request)
    config = replace(config, run=replace(config.run, dir=str(request.out)))
    with open_job(config, lambda *_: Task([], [], [], [], [])) as job, job.quiet(True):
        asked = on_main(job.layout.is_main, lambda: prepare(benchmark, request, config.data.instruct))
        for left, what in (
            (asked.skipped, "rows are left out"),
            (asked.without_image, "are asked without their image"),
        ):
            if left:
                job.warn(f"{len(left)} {what}: {left[0].where}: {left[0].reason}{' ...' if len(left) > 1 else ''}")
        policy, prm = load_policy(job, request.checkpoint)
        actors = Actors(job, policy, prm)
        groups, weights = draw(job, actors, asked, request), actors.fingerprint()
        if job.layout.is_main:
            job.progress.say(write_results(job, benchmark, request, asked, groups, weights))
        barrier()


def _evaluated(request: Request) -> dict[str, Any]:
    """What tells one evaluation from another."""
    names = ("responses", "temperature") if request.settings.responses > 1 else ("responses",)
    return {
        "benchmark": request.benchmark,
        "checkpoint": str(request.checkpoint),
        "data": str(request.data),
        "limit": request.limit,
        **{name: getattr(request.settings, name) for name in names},
    }


def _check_out(request: Request) -> None:
    """Raise ValueError where the results of another evaluation would be written over."""
    try:
        before = dict(read_object(request.out / SCORES)["evaluated"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = _evaluated(request)
    other = [f"{name} {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value]
    if other:
        raise ValueError(
            f"--out {request.out} has the scores of another evaluation ({'; '.join(other)}): choose another folder, or "
            f"delete its {SCORES}"
        )


def settings_of(checkpoint: Path) -> Config:
    """A run's settings, or the defaults with a converted checkpoint's family. Raises ValueError where it is neither."""
    if (checkpoint / MODEL_FILES).is_dir():
        family = family_from_hf(checkpoint / MODEL_FILES, with_tokenizer=False)
        return Config(model=ModelConfig(family=family.name, checkpoint=str(checkpoint)))
    if checkpoint.is_dir():
        refuse_links_out(checkpoint, "what it leads to would be read")
    if not (checkpoint / CONFIG_FILE).is_file():
        raise ValueError(
            f"{checkpoint} is neither a run directory (it has no {CONFIG_FILE}) nor a checkpoint that `mstar convert "
            f"hf-to-megatron` made (it has no folder {MODEL_FILES})"
        )
    return load(checkpoint)


def load_policy(job: Job, checkpoint: Path) -> tuple[LMM, PRM | None]:
    """The newest policy of a run directory, and its PRM where it has a finished one; or a converted checkpoint, with
    the PRM that the settings name."""
    if (checkpoint / MODEL_FILES).is_dir():
        model = build_model(job.config, job.family, draw=False)
        load_start(job, model)
        return model, None if job.config.prm.checkpoint is None else load_outside_prm(job)
    run = replace(job, dir=checkpoint)
    policy, position = newest_policy(run)
    return policy, load_prm(run, policy, position.refreshed)


def prepare(benchmark: Benchmark, request: Request, instruct: bool) -> Asked:
    """The problems to ask, as queries."""
    loaded = load_problems(benchmark, request.data, request.settings)
    problems = first(loaded.problems, request.limit)
    asked = ask(benchmark.name, problems, request.data, request.out, request.settings, instruct)
    return replace(asked, skipped=loaded.skipped, notes=loaded.notes)


def first(problems: Sequence[Problem], limit: int | None) -> Sequence[Problem]:
    """The first ``limit`` questions; all rotations of a question are one."""
    if limit is None:
        return problems
    keys = list(dict.fromkeys(problem.circle or problem.id for problem in problems))[:limit]
    return [problem for problem in problems if (problem.circle or problem.id) in set(keys)]


def draw(job: Job, actors: Actors, asked: Asked, request: Request) -> list[Group]:
    """All responses to the queries, on every rank, in the order of their ids."""
    settings = request.settings
    greedy = settings.responses == 1
    name = f"{request.benchmark}_{'greedy' if greedy else f'sampled_{settings.responses}'}"
    sampling = Sampling(name, 0.0 if greedy else settings.temperature, settings.responses)

    def finish(made: list[list[Group]]) -> list[list[Group]]:
        if actors.prm is not None and not greedy:
            score_responses(job, actors.prm, made[0])
        return made

    texts = json.dumps(
        [[query.id, query.question, [image.digest for image in query.images]] for query in asked.queries]
    )
    origin = {
        "drawn_by": actors.fingerprint(),
        "temperature": sampling.temperature,
        "responses": sampling.responses,
        "reduction": job.config.prm.reduction,
        "queries": sha256(texts.encode()).hexdigest(),
        **sampling_limits(job),
    }
    make = partial(sample_blocks, job, actors.engine, [sampling], finish)
    wanted = [Wanted(job.rollouts / name, origin)]
    return gather_groups(stream_blocks(job, asked.queries, wanted, f"ask {name}", make)[0])


def write_results(
    job: Job, benchmark: Benchmark, request: Request, asked: Asked, groups: Sequence[Group], weights: str
) -> str:
    """Write predictions, scores and page (rank 0); returns what to print. ``weights`` names those that answered."""
    rules = Rules(replace(request.settings, marker=True))
    known = {problem.id: problem for problem in asked.problems}
    lines: list[dict[str, Any]] = []
    for group in groups:
        for response in group.responses:
            prediction = Prediction(group.query.id, response.text)
            reading = read(benchmark, known[group.query.id], prediction, rules, job.checker)
            response.correct = reading.correct
            response.answer = candidate(known[group.query.id], reading, rules)
            lines.append(
                {
                    "id": group.query.id,
                    "sample": response.index,
                    "response": response.text,
                    "reading": asdict(reading),  # not beside the response: `mstar score` reads that by its own rules
                    "truncated": response.truncated,
                    "process_score": response.score,
                }
            )
    firsts = Predictions({group.query.id: Prediction(group.query.id, group.responses[0].text) for group in groups})
    scores = score(benchmark, asked.problems, firsts, rules, notes=asked.notes)
    result = scores.to_json() | {
        "evaluated": _evaluated(request) | {"weights": weights, "data_sha256": _digests(request.data)},
        "scored": "greedy response" if request.settings.responses == 1 else "first response",
        "truncated": sum(response.truncated for group in groups for response in group.responses),
        "left_out": [asdict(each) for each in asked.skipped],
        "without_image": [asdict(each) for each in asked.without_image],
        "samples": sample_measures(asked.problems, groups) if request.settings.responses > 1 else None,
    }
    out = request.out
    write_text_atomic(out / PREDICTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text_atomic(out / SCORES, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    values = {
        problem.id: [value for values in problem.groups.values() for value in values] for problem in asked.problems
    }
    readings = {(line["id"], line["sample"]): line["reading"] for line in lines}
    write_page(out / PAGE, result, groups, readings, values, PictureReading.of(job.config.data))
    return summary(scores, result, out)


def _digests(data: Path) -> dict[str, str]:
    """SHA-256 by name of the benchmark's file, or of those of its folder."""
    return {file.name: sha256_file(file) for file in files_of(data)}


def candidate(problem: Problem, reading: Reading, rules: Rules) -> str | None:
    """The answer that a response votes for; None where the rules found none (M3CoT's FAILED, MMBench's Z).

    The answer reward takes what stands in the answer block as it is, and so does the vote under its rules.
    """
    found = reading.prediction or None
    if rules.settings.rules == "reward" or not problem.options:
        return found
    return found if found in problem.options or found in problem.options.values() else None


def sample_measures(problems: Sequence[Problem], groups: Sequence[Group]) -> dict[str, Any]:
    """Pass@K of single questions, and what each way to choose among the responses reaches.

    Process scores are used where every response that could vote has one.
    """
    count = min(len(group.responses) for group in groups)
    ks = [k for k in (1 << power for power in range(count.bit_length())) if k <= count]
    ks += [count] if count not in ks else []
    picks: dict[str, Callable[[Group], Response | None]] = {
        "majority_vote": lambda group: majority_winner(group.responses, group.query.choices)
    }
    if all(response.score is not None for group in groups for response in group.responses if response.steps):
        if any(response.score is not None for group in groups for response in group.responses):
            picks["best_of_n"] = lambda group: best_winner(group.responses)
            picks["weighted_vote"] = lambda group: weighted_winner(_scored(group.responses), group.query.choices)
    chosen = {}
    for name, pick in picks.items():
        right = {group.query.id: bool((found := pick(group)) and found.correct) for group in groups}
        overall, by_group = tally(problems, [right[problem.id] for problem in problems])
        chosen[name] = {
            "overall": overall.to_json(),
            "groups": {name: {v: t.to_json() for v, t in values.items()} for name, values in by_group.items()},
        }
    return {
        "responses": count,
        "sample_accuracy": sample_accuracy(groups),
        "pass_at_k": {str(k): pass_at_k(groups, k) for k in ks},
        **chosen,
    }


def _scored(responses: Sequence[Response]) -> list[Response]:
    """Responses without any step have no process score and no vote that is weighted by it."""
    return [response for response in responses if response.score is not None]


def summary(scores: Scores, result: dict[str, Any], out: Path) -> str:
    """A few lines for the person who waited."""
    overall = scores.overall
    share = 100 * overall.correct / overall.total if overall.total else 0.0
    text = "".join(f"NOTE: {note}\n" for note in scores.notes)
    text += f"{scores.benchmark}, {result['scored']}: {share:.2f}% ({overall.correct} of {overall.total})"
    measures = result["samples"] or {}
    for name in ("majority_vote", "best_of_n", "weighted_vote"):
        if name in measures:
            text += f"\n{name.replace('_', ' ')}: {100 * measures[name]['overall']['accuracy']:.2f}%"
    for k, value in measures.get("pass_at_k", {}).items():
        text += f"\nPass@{k}: {100 * value:.2f}%"
    return f"{text}\nscores: {out / SCORES}\npage:   {out / PAGE}"
