"""Predictions against problems: verdicts, and the benchmark's tables.

Every problem of the file counts: the accuracy is that of the whole set whatever the predictions hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mstar_mega.evaluation.benchmarks import Benchmark
from mstar_mega.evaluation.predictions import Prediction, Predictions
from mstar_mega.evaluation.problem import Problem, Reading, Rules, Tally
from mstar_mega.platform.terminal import one_line
from mstar_mega.rewards.answers import extract_answer
from mstar_mega.rewards.checker import AnswerChecker

SHOWN = 5


@dataclass(frozen=True)
class Record:
    """One problem's prediction and verdict."""

    id: str
    response: str | None
    extraction: str | None
    prediction: str | None
    answer: str
    correct: bool
    missing: bool = False


@dataclass(frozen=True)
class Scores:
    """The result of scoring, as ``--out`` holds it."""

    benchmark: str
    rules: Mapping[str, Any]
    overall: Tally
    groups: Mapping[str, Mapping[str, Tally]]
    records: Sequence[Record]
    missing: Sequence[str]
    """Ids without a prediction: counted as wrong."""
    repeated: Sequence[str]
    unknown: Sequence[str]
    """Ids of predictions that are of no problem: ignored."""
    notes: Sequence[str] = ()
    """What must be known of the benchmark's file to read the figures."""

    def to_json(self) -> dict[str, Any]:
        """Plain dict for ``json.dumps``."""
        return {
            "benchmark": self.benchmark,
            "rules": dict(self.rules),
            "notes": list(self.notes),
            "overall": self.overall.to_json(),
            "groups": {
                name: {value: tally.to_json() for value, tally in values.items()}
                for name, values in self.groups.items()
            },
            "missing": list(self.missing),
            "repeated": list(self.repeated),
            "unknown": list(self.unknown),
            "records": [asdict(record) for record in self.records],
        }


def score(
    benchmark: Benchmark,
    problems: Sequence[Problem],
    predictions: Predictions,
    rules: Rules,
    left_out: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Scores:
    """Verdicts on all problems and the tables.

    ``left_out`` are ids of the file that are not scored (a reduced set, skipped rows): their predictions are not
    unknown. ``notes`` are passed on. Raises ValueError for missing, repeated or unknown predictions where the settings
    refuse them.
    """
    known = {problem.id for problem in problems} | set(left_out)
    missing = [problem.id for problem in problems if problem.id not in predictions.by_id]
    unknown = [id for id in predictions.by_id if id not in known]
    repeated = list(predictions.repeated)
    odd = describe(missing, repeated, unknown)
    if odd and rules.settings.predictions == "refuse":
        raise ValueError(f"{'; '.join(odd)}. Mend the predictions, or --odd_predictions count")
    records = []
    with AnswerChecker() as checker:
        for problem in problems:
            prediction = predictions.by_id.get(problem.id)
            if prediction is None:
                records.append(Record(problem.id, None, None, None, problem.answer, False, missing=True))
                continue
            reading = read(benchmark, problem, prediction, rules, checker)
            records.append(
                Record(
                    problem.id,
                    prediction.response,
                    reading.extraction,
                    reading.prediction,
                    problem.answer,
                    reading.correct,
                )
            )
    overall, groups = tally(problems, [record.correct for record in records])
    return Scores(benchmark.name, asdict(rules.settings), overall, groups, records, missing, repeated, unknown, notes)


def read(
    benchmark: Benchmark, problem: Problem, prediction: Prediction, rules: Rules, checker: AnswerChecker
) -> Reading:
    """One prediction under the rules; an extraction, where there is one, goes before the response."""
    if rules.settings.rules == "reward":
        return read_reward(problem, prediction, checker)
    if prediction.extraction is not None or prediction.response is None:
        return benchmark.read_extraction(problem, prediction.extraction, rules)
    return benchmark.read_response(problem, shown(prediction.response, rules), rules)


def read_reward(problem: Problem, prediction: Prediction, checker: AnswerChecker) -> Reading:
    """Extraction and comparison of the answer reward in training: no answer block, no answer."""
    answer = prediction.extraction
    if answer is None and prediction.response is not None:
        answer = extract_answer(prediction.response)
    gold = problem.letter if problem.options else problem.answer
    verdict = checker.check(answer, gold or problem.answer, problem.choices)
    return Reading(answer, answer, verdict.correct)


def shown(response: str, rules: Rules) -> str:
    """The part of a response that the rules see."""
    return (extract_answer(response) if rules.settings.marker else None) or response


def tally(problems: Sequence[Problem], correct: Sequence[bool]) -> tuple[Tally, dict[str, dict[str, Tally]]]:
    """Overall and by each breakdown. Problems of one circle count once, and as right only if all of them are."""
    circles: dict[str, tuple[Problem, bool]] = {}
    for problem, right in zip(problems, correct, strict=True):
        key = f"circle {problem.circle}" if problem.circle else f"problem {problem.id}"
        first, so_far = circles.get(key, (problem, True))
        # The unrotated row stands for its circle.
        circles[key] = (problem if problem.id == problem.circle else first, so_far and right)
    counts: dict[str, dict[str, list[int]]] = {}
    for problem, right in circles.values():
        for name, values in problem.groups.items():
            for value in dict.fromkeys(values):
                entry = counts.setdefault(name, {}).setdefault(value, [0, 0])
                entry[0] += right
                entry[1] += 1
    groups = {
        name: {value: Tally(*entry) for value, entry in sorted(values.items())} for name, values in counts.items()
    }
    return Tally(sum(right for _, right in circles.values()), len(circles)), groups


def describe(missing: Sequence[str], repeated: Sequence[str], unknown: Sequence[str]) -> list[str]:
    """A line each for what is wrong with the predictions: how many, and which."""
    lines = []
    for ids, what in (
        (missing, "problems have no prediction and count as wrong"),
        (repeated, "predictions repeat an id, of which the first counts"),
        (unknown, "predictions are of no problem of this file and are ignored"),
    ):
        if ids:
            more = ", ..." if len(ids) > SHOWN else ""
            lines.append(f"{len(ids)} {what} ({', '.join(map(one_line, ids[:SHOWN]))}{more})")
    return lines
