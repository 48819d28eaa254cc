"""The event log: rewinds, damage, a full disk; and TensorBoard, which follows it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_runs import evaluation, log_step

from mstar_mega.report.metrics import MetricsLog, NullMetrics, comparable, number, read_metrics
from mstar_mega.report.tensorboard import TensorBoardLog


def test_events_come_back_in_order_and_stamped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl")
    log.append("step", stage="prm", step=1, loss=0.5)
    log.append("stage", stage="prm", seconds=2.0)
    assert log.position() == 2
    events = read_metrics(log.path)  # readable while the log is open
    assert [event["event"] for event in events] == ["step", "stage"]
    assert all(event["time"] > 1.7e9 for event in events)
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_non_finite_numbers_stay_standard_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("step", loss=math.nan, nested={"a": [math.inf, -math.inf, 1.0]})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    event = json.loads(log.path.read_text(), parse_constant=refuse)
    assert math.isnan(number(event, "loss") or 0.0)
    assert [number({"x": value}, "x") for value in event["nested"]["a"]] == [math.inf, -math.inf, 1.0]
    assert number({"x": True}, "x") is None and number({"x": "3"}, "x") is None and number({}, "x") is None


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def work(log: MetricsLog, first: int, last: int) -> None:
        for step in range(first, last):
            log.append("step", step=step, loss=1 / step, seconds=step + id(log) % 7, by={"tokens_per_second": id(log)})

    whole = MetricsLog(tmp_path / "whole.jsonl")
    work(whole, 1, 9)
    killed = MetricsLog(tmp_path / "killed.jsonl")
    work(killed, 1, 4)
    checkpoint = killed.position()
    work(killed, 4, 7)
    killed.close()
    with open(killed.path, "ab") as file:
        file.write(b'{"event": "step", "st')
    resumed = MetricsLog(killed.path)
    assert resumed.position() == 6
    resumed.rewind(checkpoint)
    work(resumed, 4, 9)
    assert read_metrics(whole.path) != read_metrics(killed.path)
    assert comparable(read_metrics(whole.path)) == comparable(read_metrics(killed.path))
    assert comparable(read_metrics(whole.path))[0] == {"event": "step", "step": 1, "loss": 1.0, "by": {}}
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_an_empty_rewind_and_one_too_far(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("run", world_size=1)
    log.rewind(1)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 1 events.*after event 2"):
        log.rewind(2)
    log.rewind(0)
    assert log.position() == 0 and log.path.read_bytes() == b""


@pytest.mark.parametrize("bad", [b"\0\0\0", b'{"event": "st', b"[1]", b'{"no": 1}'])
def test_a_damaged_line_is_named(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "run"}\n' + bad + b'\n{"event": "stage"}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    assert path.read_bytes() == before
    log = MetricsLog(path)
    assert len(log.damage) == 1 and "metrics.jsonl, line 2" in log.damage[0]
    assert [event["event"] for event in read_metrics(path)] == ["run", "damaged", "stage"] and log.position() == 3
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    log.close()
    assert MetricsLog(path).damage == [], "told once"


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("run", world_size=1)

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:5])

    log._file.close()
    log._file = FullDisk(log.path, "ab")
    with pytest.raises(OSError, match="No space left"):
        log.append("step", step=1)
    assert [event["event"] for event in read_metrics(log.path)] == ["run"]
    assert log.path.read_bytes().endswith(b"}\n")


def test_the_silent_log_has_the_same_interface() -> None:
    def interface(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert interface(NullMetrics) == interface(MetricsLog)
    log = NullMetrics()
    log.append("step", step=1)
    log.rewind(5)
    assert log.position() == 0


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_follows_the_log_through_a_rewind(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curve(tag: str) -> list[tuple[int, float]]:
        reader = EventAccumulator(str(tmp_path / "tb"))
        reader.Reload()
        return [(point.step, round(point.value, 5)) for point in reader.Scalars(tag)]

    log = MetricsLog(tmp_path / "metrics.jsonl", TensorBoardLog(tmp_path / "tb"))
    for step in (1, 2, 3):
        log_step(log, "evolve", step, 0.5, iteration=1)
    assert [step for step, _ in curve("evolve/loss")] == [1, 2, 3]
    log.close()

    log = MetricsLog(log.path, TensorBoardLog(tmp_path / "tb"))
    log.rewind(2)
    log_step(log, "evolve", 3, 0.25, iteration=1)
    evaluation(log, "evolve", 1, "test", 0.6)
    assert curve("evolve/loss") == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert curve("test/greedy_accuracy") == [(1, 0.6)]
    assert curve("test/by_kind/sum") == [(1, 0.6)]
    assert len([path for path in (tmp_path / "tb").iterdir() if path.stat().st_size]) == 1


def test_a_tensorboard_that_already_looks_forgets_what_was_rewound(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", TensorBoardLog(tmp_path / "tb"))
    reader = EventAccumulator(str(tmp_path / "tb"))
    for step in (1, 2, 3):
        log_step(log, "prm", step, 0.5)
    reader.Reload()
    log.rewind(1)
    log_step(log, "prm", 2, 0.25)
    reader.Reload()
    assert [(point.step, point.value) for point in reader.Scalars("prm/loss")] == [(1, 0.5), (2, 0.25)]
