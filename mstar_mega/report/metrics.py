"""The event log of a run: ``metrics.jsonl``, one JSON object per event, and the contract of its events.

Every event has ``event`` (its name) and ``time`` (unix seconds). ``iteration`` 0 is the warm-up policy. Accuracies and
shares are in [0, 1], durations in seconds. Fields in brackets are optional.

===============  =======================================================================================================
event            fields
===============  =======================================================================================================
run              world_size, parallel {tensor, pipeline, [data]}; the first event of a run, and of a start in a layout
                 other than the last one's
step             stage (warmup, prm, evolve), iteration (null before evolving; prm: that after which it is refreshed),
                 step, loss, grad_norm, learning_rate, tokens, computed_tokens, queries (distinct), responses, seconds
evaluation       stage (warmup, evolve), iteration, split (validation, test), greedy_accuracy, standard_error, queries,
                 responses, tokens, by_kind {kind: accuracy}, [kind_queries {kind: queries}], seconds, [pass_at_k, k,
                 reward_pass_at_k, reward_k, pass_at_reward_k (of as many random responses), reward_gain
                 (Reward-Pass@K minus that), reward_gain_stderr (paired), best_of_n, weighted_vote, majority_vote,
                 right_reasoning {share, responses}]
annotation       iteration (whose policy annotates), queries, responses, rollouts (continuations), tokens (of both),
                 steps, positive_share, without_steps, truncated, seconds
prm_quality      stage (prm, warmup, evolve; refresh: the same responses as evolve, scored by the refreshed PRM),
                 iteration (whose policy drew the responses), split (held_out, validation), within_query_auc,
                 within_query_auc_stderr, mixed_queries, responses, right_share; by baseline (policy_log_prob, length,
                 constant_per_query): baselines (their within-query AUC), baselines_stderr, difference (PRM minus
                 baseline), difference_stderr (paired); pooled_auc {process_score and baselines}; reasoning (the same
                 among responses with the right answer, right reasoning against wrong; null where that is not known);
                 [pooled_step_accuracy, pooled_step_auc, steps, positive_share, threshold: of held-out steps]
temperature      iteration, temperature, mode, k, most_k, distinct, queries, responses, tokens, grid [{temperature,
                 reward_pass_at_k, pass_at_k, pass_at_most_k, [random_pass_at_k,] difference, difference_stderr}],
                 seconds; pass_at_most_k: Pass@K at most_k, evaluation.k or all samples where they are fewer;
                 difference: the criterion here minus at the chosen temperature, paired over queries
generation       iteration, temperature, queries, responses, tokens, truncated, without_steps, correct,
                 queries_without_correct, unlabelled_queries, checker {how: count}, seconds, score_seconds, [vote
                 {queries, responses, agreeing, answers_known, answers_right}: of queries whose answer is voted, which
                 correct, queries_without_correct and checker leave out]
log_prob_gap     iteration, largest, mean, above_limit (share of the tokens), tokens, limit
selection        iteration, rule, selected, queries_with_selection, kept_per_query {"0": queries, "1": queries, ...},
                 [right_reasoning {rule: {share, responses}}: of what each rule would select, where that is known]
improve          iteration, steps, loss, total_steps, seconds
stage            stage, seconds, [peak_memory_bytes]; written when a stage ends
skipped          what, where, reason
damaged          problem; stands for a line that was damaged on disk and is lost
===============  =======================================================================================================

Durations lie inside each other only one way: a stage's seconds contain those of its events, and no other two overlap
(``score_seconds`` is not part of a generation's ``seconds``).
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic_core import from_json

from mstar_mega.platform.files import write_bytes_atomic
from mstar_mega.platform.inputs import open_input

Event = dict[str, Any]

METRICS_FILE = "metrics.jsonl"


class Follower(Protocol):
    """Something that mirrors the log, like TensorBoard."""

    def rebuild(self, events: Iterable[Event]) -> None:
        """Forget everything and follow these events instead."""

    def event(self, event: Event) -> None:
        """Follow one more event."""

    def close(self) -> None:
        """Release what is held open."""


def standard_json(value: Any) -> Any:
    """Replace non-finite floats by the strings NaN, Infinity and -Infinity, which ``float`` reads back.

    JSON has no such numbers; a null would make a diverged loss look like a missing one.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: standard_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [standard_json(item) for item in value]
    return value


def number(event: Event, key: str) -> float | None:
    """A field as a float (NaN and infinities included); None where it is missing, null or no number."""
    value = event.get(key)
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def latest_per_iteration(events: Sequence[Event], key: str) -> dict[int, float]:
    """Iteration -> the last finite value of a field, by iteration."""
    points: dict[int, float] = {}
    for event in events:
        iteration, value = number(event, "iteration"), number(event, key)
        if iteration is not None and value is not None and math.isfinite(value):
            points[int(iteration)] = value
    return dict(sorted(points.items()))


def scan_metrics(path: str | Path) -> tuple[list[Event], list[str]]:
    """Every good event of a log, and one message per damaged line that names file and line.

    A last line without its newline is not damage: a killed process was writing it, and it never counted.
    A file that does not exist yet has no events.
    """
    path = Path(path)
    if not path.exists():
        return [], []
    parsed = _parse(path)
    return [event for event in parsed if not isinstance(event, str)], [one for one in parsed if isinstance(one, str)]


def _parse(path: Path) -> list[Event | str]:
    """Every whole line's event, or what is wrong with the line."""
    parsed: list[Event | str] = []
    for index, line in enumerate(_lines(path)[:-1], start=1):
        try:
            event = from_json(line)
        except ValueError as error:
            parsed.append(f"{path}, line {index}: not JSON ({error})")
            continue
        is_event = isinstance(event, dict) and isinstance(event.get("event"), str)
        parsed.append(event if is_event else f"{path}, line {index}: not an event (an object with an 'event' name)")
    return parsed


def read_metrics(path: str | Path) -> list[Event]:
    """The events of a log, without a half-written last line; empty where there is no file yet.

    Raises ValueError naming file and line where a line is damaged.
    """
    events, problems = scan_metrics(path)
    if problems:
        raise ValueError(f"{problems[0]}. The log is damaged: repair that line or restore the file from a copy.")
    return events


def comparable(events: Iterable[Event]) -> list[Event]:
    """The events without what two equal runs differ in: times, durations, rates and peak memory, at any depth."""
    return [_without_times(event) for event in events]


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if not _is_time_like(key)}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return value


def _is_time_like(key: str) -> bool:
    return key in ("time", "peak_memory_bytes") or key.endswith(("seconds", "per_second"))


class MetricsLog:
    """The append-only ``metrics.jsonl`` of a run. One process, rank 0, owns it; the others hold a NullMetrics.

    Opening drops a half-written last line. An earlier line that is damaged is lost: an event ``damaged`` takes its
    place, so that checkpoints still find theirs, and the file as it was is kept beside it.
    """

    def __init__(self, path: str | Path, follower: Follower | None = None) -> None:
        self.path = Path(path)
        self._follower = follower
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.damage: list[str] = []
        """What was found damaged on opening, one message per line."""
        self._mend()
        self._open(read_metrics(self.path))

    def _mend(self) -> None:
        parsed = _parse(self.path) if self.path.exists() else []
        self.damage = [one for one in parsed if isinstance(one, str)]
        if not self.damage:
            return
        write_bytes_atomic(self.path.with_name(f"{self.path.name}.damaged"), self.path.read_bytes())
        now = round(time.time(), 3)
        lost = [{"event": "damaged", "time": now, "problem": one} if isinstance(one, str) else one for one in parsed]
        write_bytes_atomic(self.path, b"".join(_line(event) for event in lost))

    def _open(self, events: list[Event]) -> None:
        # Unbuffered: a line is in the operating system's hands when append returns, so a killed process loses nothing.
        self._file = open(self.path, "ab", buffering=0)
        self._lines = len(events)
        self._bytes = _complete_bytes(self.path)
        self._file.truncate(self._bytes)
        if self._follower is not None:
            self._follower.rebuild(events)

    def append(self, event: str, **fields: Any) -> None:
        """Write one event, stamped with the time. Raises OSError, leaving the log as it was, on a full disk."""
        assert "event" not in fields and "time" not in fields
        line = _line({"event": event, "time": round(time.time(), 3), **fields})
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._file.truncate(self._bytes)
            raise
        self._lines += 1
        self._bytes += len(line)
        if self._follower is not None:
            self._follower.event(json.loads(line))

    def position(self) -> int:
        """Number of complete lines. They are on disk on return, so a checkpoint may name this position."""
        os.fsync(self._file.fileno())
        return self._lines

    def position_after(self, belongs: Callable[[Event], bool]) -> int:
        """Number of lines up to the last event that ``belongs``; 0 where none does."""
        events = read_metrics(self.path)
        return max((line for line, event in enumerate(events, start=1) if belongs(event)), default=0)

    def rewind(self, lines: int) -> None:
        """Drop every line after the first ``lines`` (atomically), so that work done again is logged once.

        Raises ValueError where the log has fewer lines.
        """
        assert lines >= 0
        if lines > self._lines:
            raise ValueError(
                f"{self.path} has {self._lines} events, but the checkpoint was written after event {lines}: "
                "the log was cut or replaced. Restore the file, or start in a new run directory."
            )
        if lines == self._lines:
            return
        kept = self.path.read_bytes().split(b"\n")[:lines]
        write_bytes_atomic(self.path, b"".join(line + b"\n" for line in kept))
        self._file.close()
        self._open([json.loads(line) for line in kept])

    def close(self) -> None:
        """Close the file and the follower. The log can be opened again."""
        self._file.close()
        if self._follower is not None:
            self._follower.close()


class NullMetrics:
    """The log of the ranks that write none."""

    def append(self, event: str, **fields: Any) -> None:
        """Write nothing."""

    def position(self) -> int:
        """Always 0; only rank 0's position means anything."""
        return 0

    def position_after(self, belongs: Callable[[Event], bool]) -> int:
        """Always 0."""
        return 0

    def rewind(self, lines: int) -> None:
        """Drop nothing."""

    def close(self) -> None:
        """Close nothing."""


def _line(event: Event) -> bytes:
    return json.dumps(standard_json(event), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _lines(path: Path) -> list[bytes]:
    with open_input(path) as file:
        return file.read().split(b"\n")


def _complete_bytes(path: Path) -> int:
    """Bytes up to and including the last newline."""
    return path.read_bytes().rfind(b"\n") + 1
