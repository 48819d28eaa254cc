"""``mstar data check``: look at a training set before training on it."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

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
from mstar_mega.data.mathv360k import split_question
from mstar_mega.data.order import shuffled
from mstar_mega.data.pictures import PictureReading
from mstar_mega.data.rows import RowProblem
from mstar_mega.data.splits import SPLITS, SplitError, question_key
from mstar_mega.data.types import image_digest
from mstar_mega.evaluation import benchmarks
from mstar_mega.models.build import FAMILIES, build_family
from mstar_mega.models.families.base import Family
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.rewards.answers import WRONG, Verdict, extract_answer, plain_verdict

SAMPLE = 200
"""Prompts that are made to estimate what a set costs."""
CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English prose; formulas and numbers take more tokens."""
SHOWN = 5
"""Unusable rows of the warm-up file that are shown."""


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
        source, note = open_any(config.data, Path(config.data.dir or work))
        reading = PictureReading.of(config.data)
        report = report_on(source, [item for each in against for item in _evaluation_items(each)], reading)
        report.path = str(config.data.path)  # of a table: not the lines that were made of it
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
        lines += [
            *(cost.to_text() for cost in costs),
            f"at the published sizes, text at {CHARACTERS_PER_TOKEN} characters a token:",
        ]
        lines += [cost.to_text() for cost in published]
    refusals = [*_refusals(config.data, report, warmup)]
    if report.usable and not refusals:
        lines += ["arguments for a job on this set:", f"  {fitting_arguments(config.data, report, bool(note))}"]
    return "\n".join([*lines, *(f"FAILED: {each}" for each in refusals)]), not refusals


SMALL = 5000
"""Below so many usable questions every one is labelled."""


def fitting_arguments(config: DataConfig, report: FileReport, is_too_small: bool) -> str:
    """The settings that fit the set: its own where they do, else a tenth each for validation and test."""
    usable = report.usable + report.left_over
    share, validation, test = config.labelled_share, config.validation_queries, config.test_queries
    if is_too_small:
        share, validation, test = (1.0 if usable < SMALL else share), max(1, usable // 10), max(1, usable // 10)
    named = {"path": config.path, "images": config.images, "warmup_file": config.warmup_file}
    given = [f"--data.{name} {value}" for name, value in named.items() if value]
    if not config.warmup_file:
        given.append("--data.warmup_answers true")
    counts = {"labelled_share": f"{share:g}", "validation_queries": validation, "test_queries": test}
    counts |= dict.fromkeys(("warmup_examples", "labelled_queries", "unlabelled_queries"), "null")
    return " ".join(["--data.name mathv360k", *given, *(f"--data.{name} {value}" for name, value in counts.items())])


def _refusals(config: DataConfig, report: FileReport, warmup: WarmupReport | None) -> Iterator[str]:
    """Why a job cannot train on the files, a line each."""
    unusable = sum(found.count for found in report.problems.values())
    skipped = len(warmup.skipped) if warmup and warmup.usable else 0
    if not report.usable:
        yield f"nothing is usable: none of the {report.rows} rows can be trained on"
    if warmup is not None and not warmup.usable:
        yield f"no response of the warm-up file {warmup.path} is usable"
    if config.bad_rows == "refuse" and (unusable or skipped):
        yield f"data.bad_rows is 'refuse': {unusable} rows and {skipped} responses cannot be used"


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
        if isinstance(verdict, Verdict) and not verdict.correct:  # else algebra would have to decide
            other.add(f"{query.id}: {(answer or 'no answer')[:40]!r}, not {query.answer!r}")
    return WarmupReport(path, len(examples), [f"{each.what}: {each.reason}" for each in skipped], other)


def open_any(config: DataConfig, work: Path) -> tuple[Source, list[str]]:
    """The training file, and a note where it is too small for the settings' splits and has others."""
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
            digest = image_digest(picture.data)
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
    for queries in usable_sets(source):
        for extent in queries.extents():
            features = sum(family.published_image_cost(*size)[1] for size in extent.sizes)
            if features + extent.bytes / CHARACTERS_PER_TOKEN <= limit:
                continue
            tokens = features + len(queries[extent.position].question) // CHARACTERS_PER_TOKEN
            if tokens > limit:
                found.add(f"row {extent.number} (id {extent.id}) about {tokens}")
    return found


def usable_sets(source: Source) -> list[DiskQueries]:
    """The sets of a file, in the order of ``SPLITS``."""
    return [DiskQueries(source, split) for split in SPLITS]


def _cost(source: Source, config: Config) -> Cost:
    model = config.model
    name, size = model.family, "checkpoint" if model.checkpoint else model.size
    usable = usable_sets(source)
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
