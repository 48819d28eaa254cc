"""``mstar data check`` and ``mstar data show``: look at a training set before training on it."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image

from mstar_mega.config import BenchmarkConfig, Config, DataConfig, ModelConfig
from mstar_mega.data import disk, lengths
from mstar_mega.data.check import (
    EvaluationItem,
    FileReport,
    Found,
    digest_of,
    places,
    report_on,
    to_text,
    unusable_rows,
)
from mstar_mega.data.disk import DiskQueries, Source, existing, open_source
from mstar_mega.data.lengths import limits_of
from mstar_mega.data.mathv360k import RowProblem, split_question
from mstar_mega.data.order import shuffled
from mstar_mega.data.splits import SPLITS, SplitError, question_key
from mstar_mega.data.task import build
from mstar_mega.data.types import Query, Task
from mstar_mega.evaluation import benchmarks
from mstar_mega.models.build import FAMILIES, build_family
from mstar_mega.models.families.base import Family
from mstar_mega.models.packing import Prompt
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.rewards.answers import WRONG, extract_answer, plain_verdict

SAMPLE = 200
"""Prompts that are made to estimate what a set costs."""
CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English prose; formulas and numbers take more tokens."""
SHOWN = 5
"""Unusable rows of the warm-up file that are shown."""
AROUND = 6
"""Tokens shown before and after an image."""


@dataclass(frozen=True)
class Cost:
    """What one family at one size spends on the set's prompts, estimated on a seeded sample."""

    family: str
    size: str
    queries: int
    prompts: int
    """In the sample."""
    tokens: float
    """Mean per prompt, image tokens included."""
    longest: int
    image_tokens: float
    tiles: float
    characters: float = 0.0
    """Mean of the questions."""
    limit: int = 0
    """Tokens that a prompt may have."""
    too_long: Found = field(default_factory=Found)
    """Of all usable queries, those with more: training leaves them out."""
    problem: str = ""

    def to_text(self) -> str:
        """One line."""
        name = f"  {self.family + ' ' + self.size:<22}"
        if self.problem:
            return f"{name}cannot be measured: {self.problem}"
        return (
            f"{name}{self.tokens:.1f} tokens a prompt ({self.image_tokens:.1f} for images; longest {self.longest}), "
            f"{self.tiles:.2f} tiles; {self.tokens * self.queries / 1e6:.2f} M tokens and "
            f"{self.tiles * self.queries:.0f} tiles in all{_too_long_text(self.limit, self.too_long)}"
        )


@dataclass(frozen=True)
class PublishedCost:
    """What a family at its published size spends: on images exactly, by their sizes; on text by an estimate."""

    family: str
    tiles: int
    image_tokens: int
    """Features, without the marks around them."""
    text_tokens_estimate: int
    """Characters of the questions over ``CHARACTERS_PER_TOKEN``; no tokenizer is read."""
    limit: int
    """Tokens that a prompt may have, by the settings and the published model's context."""
    too_long_estimate: Found

    def to_text(self) -> str:
        """One line."""
        return (
            f"  {self.family:<22}{self.tiles} tiles, {self.image_tokens / 1e6:.2f} M image tokens (exact); "
            f"about {self.text_tokens_estimate / 1e6:.2f} M text tokens (estimate)"
            f"{_too_long_text(self.limit, self.too_long_estimate)}"
        )


def _too_long_text(limit: int, found: Found) -> str:
    """A line of its own for prompts that do not fit; empty where all do."""
    if not found.count:
        return ""
    return (
        f"\n    {found.count} prompts have more than {limit} tokens and are left out in training: {places(found)}. "
        "Shorten them, or see data.max_prompt_tokens and generation.max_new_tokens"
    )


@dataclass(frozen=True)
class WarmupReport:
    """The facts about a file of written-out responses."""

    path: str
    usable: int
    skipped: list[str]
    """Rows that cannot be used, as a job lists them."""
    other_answers: Found
    """Usable ones that arrive at another answer than the gold one, by plain comparison."""

    def to_text(self) -> str:
        """A few lines."""
        lines = [f"warm-up file {self.path}: {self.usable} usable responses"]
        lines += [f"  left out: {each}" for each in self.skipped[:SHOWN]]
        if len(self.skipped) > SHOWN:
            lines.append(f"  and {len(self.skipped) - SHOWN} more lines like these")
        if self.other_answers.count:
            lines.append(
                f"  {self.other_answers.count} arrive at another answer than the gold one, and teach it: "
                f"{places(self.other_answers)}"
            )
        return "\n".join(lines)


def check(config: Config, against: Sequence[str], out: str | None) -> tuple[str, bool]:
    """The text of ``mstar data check``, and whether a job can use what the settings name.

    With ``out``, the same facts as JSON. ``against``: ``BENCHMARK=FILE`` each. Raises ValueError for unreadable files.
    """
    with tempfile.TemporaryDirectory() as work:
        source, note = _open(config.data, Path(config.data.dir or work))
        report = report_on(source, [item for each in against for item in _evaluation_items(each)])
        models = _models(config.model) if report.usable else ()
        costs = [_cost(source, replace(config, model=model)) for model in models]
        published = _published_costs(source, config, costs[0].characters * costs[0].queries) if costs else []
        warmup = _warmup(config, source, Path(config.data.dir or work)) if config.data.warmup_file else None
        if out is not None:
            facts = {**report.to_json(), "unusable_rows": [*unusable_rows(source)], "warmup": warmup and asdict(warmup)}
            facts |= {"costs": [*map(asdict, costs)], "published_costs": [*map(asdict, published)]}
            write_text_atomic(out, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    lines = [to_text(report), *([warmup.to_text()] if warmup else [])]
    if report.usable:
        lines = [*note, *lines, f"cost of all usable queries, from {costs[0].prompts} of them:"]
        lines += [cost.to_text() for cost in costs]
        lines.append(f"at the published sizes, text at {CHARACTERS_PER_TOKEN} characters a token:")
        lines += [cost.to_text() for cost in published]
    refusals = [*_refusals(config.data, report, warmup)]
    return "\n".join([*lines, *(f"FAILED: {each}" for each in refusals)]), not refusals


def _refusals(config: DataConfig, report: FileReport, warmup: WarmupReport | None) -> Iterator[str]:
    """Why a job cannot train on the files, a line each."""
    unusable, skipped = (
        sum(found.count for found in report.problems.values()),
        (warmup.skipped if warmup and warmup.usable else []),
    )
    if not report.usable:
        yield f"nothing is usable: none of the {report.rows} rows can be trained on"
    if warmup is not None and not warmup.usable:
        yield f"no response of the warm-up file {warmup.path} is usable"
    if config.bad_rows == "refuse" and (unusable or skipped):
        yield f"data.bad_rows is 'refuse': {unusable} rows and {len(skipped)} responses cannot be used"


def _warmup(config: Config, source: Source, work: Path) -> WarmupReport:
    """What the warm-up file holds; it may still have to be made."""
    path = str(config.data.warmup_file)
    if not Path(path).is_file():
        return WarmupReport(path, 0, ["there is no such file yet"], Found())
    examples, skipped = disk.examples(replace(config.data, warmup_examples=None), source, work)
    other = Found()
    for query, response in examples:
        answer = extract_answer(response)
        verdict = WRONG if answer is None else plain_verdict(answer, query.answer or "", query.choices)
        if verdict is not None and not verdict.correct:  # None: algebra would have to decide
            other.add(f"{query.id}: {(answer or 'no answer')[:40]!r}, not {query.answer!r}")
    return WarmupReport(path, len(examples), [f"{each.what}: {each.reason}" for each in skipped], other)


def _open(config: DataConfig, work: Path) -> tuple[Source, list[str]]:
    try:
        return open_source(config, work), []
    except SplitError as error:
        # Too small a file for the splits that were asked for can still be looked at.
        note = f"NOTE: the settings' splits do not fit the file: {error}"
        return open_source(replace(config, validation_queries=0, test_queries=0), work), [note]


def _evaluation_items(argument: str) -> Iterator[EvaluationItem]:
    """The questions of an evaluation set: a benchmark's file, or one in MathV360K's shape without a name before it."""
    name, equals, file = argument.partition("=")
    if not equals:
        raise ValueError(f"--against {argument}: give it as BENCHMARK=FILE, as in mathvista=testmini.json")
    benchmark = benchmarks.find(name)  # before the file is looked for: the name may be what is wrong
    path = existing(file, f"--against {name}")
    loaded = benchmarks.load_problems(benchmark, path, BenchmarkConfig(bad_rows="skip"))
    for problem in loaded.problems:
        question, choices = problem.question, tuple(problem.options.values())
        if problem.ready:
            try:
                _, question, choices = split_question(question)
            except RowProblem:
                pass
        picture = problem.picture
        digest = ""
        if picture is not None and picture.data is not None:
            digest = sha256(picture.data).hexdigest()[:16]
        elif picture is not None and picture.path is not None:
            digest = digest_of(path.parent / picture.path)
        yield EvaluationItem(name, problem.id, question_key(question, choices), digest)


def _models(chosen: ModelConfig) -> Iterator[ModelConfig]:
    """Every family at every size that it has by name, and the settings' own checkpoint."""
    for name, family in FAMILIES.items():
        for size in getattr(sys.modules[family.__module__], "SIZES", {}):
            yield ModelConfig(family=name, size=size)
    if chosen.checkpoint:
        yield chosen


def _published_costs(source: Source, config: Config, characters: float) -> list[PublishedCost]:
    """Every family, over the images of all usable queries; ``characters``: of all questions."""
    sql = (
        "SELECT width, height, count(*) FROM places JOIN rows USING (number) JOIN images ON images.path = rows.image "
        "GROUP BY width, height"
    )
    with source.file.opened() as (index, _):
        sizes = index.execute(sql).fetchall()
    found = []
    for name, family in FAMILIES.items():
        spent = [(count, *family.published_image_cost(width, height)) for width, height, count in sizes]
        tiles, tokens = (sum(each[0] * each[i] for each in spent) for i in (1, 2))
        limit = limits_of(config, family.published_context).prompt
        too_long = _too_long_estimate(source, family, limit)
        found.append(PublishedCost(name, tiles, tokens, round(characters / CHARACTERS_PER_TOKEN), limit, too_long))
    return found


def _too_long_estimate(source: Source, family: type[Family], limit: int) -> Found:
    """Prompts that seem to have more tokens than ``limit`` at the published size."""
    found = Found()
    for queries in _usable(source):
        for extent in queries.extents():
            features = sum(family.published_image_cost(*size)[1] for size in extent.sizes)
            if features + extent.bytes / CHARACTERS_PER_TOKEN <= limit:
                continue
            tokens = features + len(queries[extent.position].question) // CHARACTERS_PER_TOKEN
            if tokens > limit:
                found.add(f"row {extent.number} (id {extent.id}) about {tokens}")
    return found


def _usable(source: Source) -> list[DiskQueries]:
    return [DiskQueries(source, split) for split in SPLITS]


def _cost(source: Source, config: Config) -> Cost:
    model = config.model
    name, size = model.family, "checkpoint" if model.checkpoint else model.size
    usable = _usable(source)
    total = sum(map(len, usable))
    sample = [query for queries in usable for query in shuffled(queries, "cost")[: -(-SAMPLE * len(queries) // total)]]
    characters = statistics.fmean(len(query.question) for query in sample)
    try:
        family = build_family(config)
        prompts = [family.prompt(query) for query in sample]
        limits = limits_of(config, family.language.context)
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        return Cost(name, size, total, len(sample), 0.0, 0, 0.0, 0.0, characters, problem=problem)
    too_long = Found()
    for queries in usable:
        for each in lengths.too_long(queries, family, limits):
            too_long.add(f"row {each.extent.number} (id {each.extent.id}) {each.tokens}")
    return Cost(
        name, size, total, len(prompts),
        tokens=statistics.fmean(len(prompt.tokens) for prompt in prompts),
        longest=max(len(prompt.tokens) for prompt in prompts),
        image_tokens=statistics.fmean(len(prompt.image_positions) for prompt in prompts),
        tiles=statistics.fmean(0 if prompt.pixels is None else prompt.pixels.size(0) for prompt in prompts),
        characters=characters, limit=limits.prompt, too_long=too_long,
    )  # fmt: skip


def show(config: Config, id: str, out: str | None) -> str:
    """The text of ``mstar data show``: a query, the exact prompt, its token ids around the image.

    With ``out`` the tiles are written there. Raises ValueError where no set of the settings has such a query.
    """
    family = build_family(config)
    with tempfile.TemporaryDirectory() as work:
        task, note = _sets(config, Path(config.data.dir or work))
        split, query = find_query(task, id)
        prompt = family.prompt(query)
    decode = family.tokenizer.decode
    answer = query.answer if query.answer is not None else f"hidden ({query.hidden_answer})"
    of = f"of the {split} {'half' if note else 'set'} ({query.kind or 'no type'})"
    lines = [
        *note,
        f"query {query.id} {of}, gold answer {answer}",
        *(f"image {image.path} (digest {image.digest})" for image in query.images),
        f"prompt of {config.model.family} {config.model.size}: {len(prompt.tokens)} tokens, "
        f"{len(prompt.image_positions)} of them image features",
    ]
    for start, end in _runs(prompt):
        before, after = prompt.tokens[max(0, start - AROUND) : start], prompt.tokens[end : end + AROUND]
        lines.append(f"tokens around the image: {before} + {end - start} x {prompt.tokens[start]} + {after}")
    lines += ["text (an image feature is shown as ·, a control token by its id):", _text(prompt, decode)]
    if prompt.pixels is not None:
        where = "not written (--out TILES.png does)" if out is None else render_tiles(prompt, Path(out))
        lines.append(f"{prompt.pixels.size(0)} tiles of {tuple(prompt.pixels.shape[2:])} pixels: {where}")
    return "\n".join(lines)


def _sets(config: Config, work: Path) -> tuple[Task, list[str]]:
    """The sets to look for a query in (a file's warm-up queries are labelled ones), and a note if no job's."""
    if config.data.name != "mathv360k":
        return build(config.data, work, config.seed), []
    source, note = _open(config.data, work)
    labelled, unlabelled, validation, test = _usable(source)
    return Task((), labelled, unlabelled, validation, test), note


def find_query(task: Task, id: str) -> tuple[str, Query]:
    """The set and the query of that id. Raises ValueError, with ids that there are, where no set has it."""
    sets = {name: getattr(task, name) for name in ("labelled", "unlabelled", "validation", "test")}
    for name, queries in sets.items():
        found = queries.find(id) if isinstance(queries, DiskQueries) else next((q for q in queries if q.id == id), None)
        if found is not None:
            return name, found
    for query, _ in task.warmup:
        if query.id == id:
            return "warm-up", query
    if isinstance(task.labelled, DiskQueries) and (why := task.labelled.source.why_not(id)):
        raise ValueError(f"the query {id!r} is in no set ({why})")
    some = ", ".join(queries[0].id for queries in sets.values() if len(queries))
    if not some:
        raise ValueError(f"no set has a query {id!r}: nothing is usable (`mstar data check` says why)")
    raise ValueError(f"no set has a query {id!r}; there are {some} and others")


def _runs(prompt: Prompt) -> Iterator[tuple[int, int]]:
    """[start, end) of every stretch of image features."""
    start = previous = None
    for position in prompt.image_positions:
        if start is None or previous is None or position != previous + 1:
            if start is not None and previous is not None:
                yield start, previous + 1
            start = position
        previous = position
    if start is not None and previous is not None:
        yield start, previous + 1


def _text(prompt: Prompt, decode: Callable[[list[int]], str]) -> str:
    """The prompt's text; tokens without a text of their own by their id."""
    images = set(prompt.image_positions)
    parts: list[str] = []
    run: list[int] = []
    for position, token in enumerate(prompt.tokens):
        if position in images or not decode([token]):
            parts += [decode(run), "·" if position in images else f"<{token}>"]
            run = []
        else:
            run.append(token)
    return "".join([*parts, decode(run)])


def render_tiles(prompt: Prompt, path: Path) -> Path:
    """Write the tiles side by side as one PNG, each colour channel stretched to its full range; returns ``path``."""
    assert prompt.pixels is not None
    x = prompt.pixels
    low, high = x.amin(dim=(0, 2, 3), keepdim=True), x.amax(dim=(0, 2, 3), keepdim=True)
    shown = ((x - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    count, height, width, _ = shown.shape
    sheet = Image.new("RGB", (count * (width + 2) - 2, height), (255, 255, 255))
    for i, tile in enumerate(shown):
        sheet.paste(Image.fromarray(tile), (i * (width + 2), 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path
