"""TensorBoard scalars of a run, written as plain event files: neither torch nor a background thread is involved.

Curves over optimizer steps are ``STAGE/loss`` and so on; everything else is a curve over iterations, named
``EVENT/FIELD`` (``generation/temperature``), the evaluations by split (``test/greedy_accuracy``).
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mstar_mega.report.metrics import Event, number

_NO_SCALARS = ("run", "skipped")
_NOT_A_SCALAR = ("event", "time", "step", "iteration", "stage", "k", "reward_k", "kind_queries")
_SUFFIX = ".mstar"
_counter = itertools.count()


def scalars(event: Event) -> tuple[int, list[tuple[str, float]]]:
    """Position on the x axis, and (tag, value) of everything in an event that is a curve."""
    if event["event"] in _NO_SCALARS:
        return 0, []
    axis = number(event, "step" if event["event"] == "step" else "iteration")
    prefix = {
        "step": event.get("stage"),
        "evaluation": event.get("split"),
        "prm_quality": f"prm_quality/{event.get('split')}",
        "stage": f"stage/{event.get('stage')}",
    }
    return int(axis or 0), list(_numbers(str(prefix.get(event["event"]) or event["event"]), event))


def _numbers(prefix: str, fields: Event) -> Iterator[tuple[str, float]]:
    for key in fields:
        if key in _NOT_A_SCALAR:
            continue
        value = number(fields, key)
        if value is not None:
            yield f"{prefix}/{key}", value
        elif isinstance(fields[key], dict):
            yield from _numbers(f"{prefix}/{key}", fields[key])


class TensorBoardLog:
    """A TensorBoard directory that follows a MetricsLog. A rebuild empties its event file and begins a new one."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._writer: Any = None
        self.rebuild(())

    def rebuild(self, events: Iterable[Event]) -> None:
        """Start again with these events: nothing that was logged before stays, and nothing is there twice."""
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._writer is not None:
            self._writer.close()
        self.directory.mkdir(parents=True, exist_ok=True)
        old = list(self.directory.glob(f"events.out.tfevents.*{_SUFFIX}"))
        # TensorBoard reads a directory's files in the order of their names, which must therefore grow.
        when = f"{time.time_ns()}.{next(_counter):06d}"
        name = f"events.out.tfevents.{when}.{socket.gethostname()}.{os.getpid()}{_SUFFIX}"
        self._writer = RecordWriter(open(self.directory / name, "wb"))
        for path in old:
            # Emptied, not deleted: a TensorBoard that reads a file which then vanishes never goes on to the next one.
            os.truncate(path, 0)
        self._write(Record(file_version="brain.Event:2", wall_time=time.time()))
        # A session start at step 0 makes a TensorBoard that is already looking drop the points it has read.
        self._write(Record(session_log=SessionLog(status=SessionLog.START), step=0, wall_time=time.time()))
        for event in events:
            self._add(event)
        self._writer.flush()

    def event(self, event: Event) -> None:
        """Add one event's scalars; they are visible at once."""
        if self._add(event):
            self._writer.flush()

    def _add(self, event: Event) -> bool:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary

        step, values = scalars(event)
        if values:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values])
            self._write(Record(wall_time=number(event, "time") or 0.0, step=step, summary=summary))
        return bool(values)

    def _write(self, record: Any) -> None:
        self._writer.write(record.SerializeToString())

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
