"""``mstar score``: predictions of any policy, scored and written down."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from mstar_mega.config import BenchmarkConfig
from mstar_mega.evaluation.benchmarks import BENCHMARKS, find, load_problems
from mstar_mega.evaluation.predictions import read_predictions
from mstar_mega.evaluation.problem import Rules
from mstar_mega.evaluation.scoring import Scores, describe, score
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.platform.terminal import one_line

SCORING = ("rules", "integers", "gold", "ignore_empty", "reduced", "marker", "bad_rows", "predictions")
SCORING_RESPONSES = ("rules", "gold", "ignore_empty", "reduced", "bad_rows")
"""Those that matter where the responses are our own."""
ASKING = ("without_image", "responses", "temperature")
"""Settings that only ``mstar evaluate`` has."""
_OPTION = {"predictions": "--odd_predictions"}
_HELP = {
    "rules": "official: the benchmark's own authors'; vlmevalkit: that toolkit's; reward: the answer reward's",
    "integers": "MathVista's integer rule: 2023 reads no 18 in 18.0",
    "gold": "M3CoT: table corrects the one gold answer that the published table contradicts",
    "ignore_empty": "MathVista: an empty extraction is no answer, not the nearest choice",
    "reduced": "leave out the perception categories: MMStar-R, MMBench-R",
    "marker": "the rules see only what follows a response's last '# Answer' heading",
    "bad_rows": "unusable rows of --data: refuse the file, or leave them out and list them",
    "predictions": "missing, repeated and unknown predictions: count and list them, or refuse",
    "without_image": "questions whose image cannot be had: refuse, or ask without it and count",
    "responses": "responses to each question; 1: greedy",
    "temperature": "of more than one response",
}


def add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Options for settings of :class:`BenchmarkConfig`, with its defaults."""
    defaults = BenchmarkConfig()
    hints = typing.get_type_hints(BenchmarkConfig)
    for field in fields(BenchmarkConfig):
        if field.name not in names:
            continue
        option = _OPTION.get(field.name, f"--{field.name}")
        default = getattr(defaults, field.name)
        text = f"{_HELP[field.name]} (default: {default})"
        if isinstance(default, bool):
            parser.add_argument(option, dest=f"set_{field.name}", action="store_true", help=text)
        elif isinstance(default, str):
            choices = typing.get_args(hints[field.name])
            parser.add_argument(option, dest=f"set_{field.name}", choices=choices, default=default, help=text)
        else:
            kind = type(default)
            parser.add_argument(option, dest=f"set_{field.name}", type=kind, metavar="N", default=default, help=text)


def settings_of(options: argparse.Namespace) -> BenchmarkConfig:
    """The settings that the options of :func:`add_settings` hold."""
    given = {name[4:]: value for name, value in vars(options).items() if name.startswith("set_")}
    settings = BenchmarkConfig(**given)
    if settings.responses < 1:
        raise ValueError(f"--responses is {settings.responses}: it must be at least 1")
    if not 0 < settings.temperature < float("inf"):
        raise ValueError(f"--temperature is {settings.temperature}: it must be a finite number above 0")
    return settings


def add_benchmark(parser: argparse.ArgumentParser) -> None:
    """Which benchmark, and where its file is."""
    parser.add_argument("--benchmark", required=True, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--data", required=True, type=Path, metavar="PATH", help="its file, or a folder of its files")


def run_score(options: argparse.Namespace) -> str:
    """Score a file of predictions, write ``--out``, and return what to print.

    Raises ValueError for what the user can mend.
    """
    benchmark, settings = find(options.benchmark), settings_of(options)
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder: name the file that the scores go to")
    loaded = load_problems(benchmark, options.data, settings)
    predictions = read_predictions(options.predictions)
    scores = score(benchmark, loaded.problems, predictions, Rules(settings), loaded.left_out, loaded.notes)
    result = scores.to_json()
    result["skipped_rows"] = [vars(each) for each in loaded.skipped]
    write_text_atomic(options.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    notes = [*scores.notes, *describe(scores.missing, scores.repeated, scores.unknown)]
    if loaded.skipped:
        notes.append(f"{len(loaded.skipped)} rows of {options.data} are left out, listed in {options.out}")
    return "\n".join([*(f"NOTE: {note}" for note in notes), table(scores), f"scores: {options.out}"])


def table(scores: Scores) -> str:
    """Overall and all groups as text."""
    lines = [f"{scores.benchmark}: {_share(scores.overall.correct, scores.overall.total)}"]
    for name, values in scores.groups.items():
        lines.append(f"{one_line(name)}:")
        names = {value: one_line(value) for value in values}
        width = max(map(len, names.values()))
        lines += [f"  {names[value]:<{width}}  {_share(tally.correct, tally.total)}" for value, tally in values.items()]
    return "\n".join(lines)


def _share(correct: int, total: int) -> str:
    return f"{100 * correct / total if total else 0.0:6.2f}% ({correct} of {total})"
