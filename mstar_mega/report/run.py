"""A run directory as the report, the summary and the plots read it: settings and events."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mstar_mega.platform.inputs import read_input, refuse_links_out
from mstar_mega.report.event_schema import sound
from mstar_mega.report.metrics import METRICS_FILE, Event, scan_metrics
from mstar_mega.settings import CONFIG_FILE
from mstar_mega.settings.yaml_files import MOST_BYTES, parse_yaml


@dataclass
class Run:
    """What a run directory holds so far."""

    directory: Path
    settings: dict[str, Any]
    """The resolved settings as a plain tree; empty where there are none yet."""
    settings_text: str
    events: list[Event]
    problems: list[str] = field(default_factory=list)
    """One message per damaged file or line, naming it."""

    def of(self, name: str, **fields: Any) -> list[Event]:
        """The events of one name whose fields have these values, in the order they were written."""
        return [
            event
            for event in self.events
            if event["event"] == name and all(event.get(key) == value for key, value in fields.items())
        ]

    def setting(self, *path: str) -> Any:
        """One setting by its path; None where it is missing."""
        node: Any = self.settings
        for name in path:
            node = node.get(name) if isinstance(node, dict) else None
        return node

    @property
    def finished(self) -> bool:
        """Whether the evolving stage has ended."""
        return bool(self.of("stage", stage="evolve"))


def load_run(run_dir: str | Path) -> Run:
    """Read a run directory at any moment of the run. What is damaged is left out and named in ``problems``.

    Raises ValueError for a link that leads out of it.
    """
    directory = Path(run_dir)
    if directory.is_dir():
        refuse_links_out(directory, "what it leads to would be shown as the run's")
    events: list[Event] = []
    problems: list[str] = []
    try:
        found, problems = scan_metrics(directory / METRICS_FILE)
    except (OSError, ValueError) as error:
        found, problems = [], [str(error)]
    for number_, event in enumerate(found, start=1):
        good, wrong = sound(event)
        events += [good] if good is not None else []
        problems += [f"{directory / METRICS_FILE}, event {number_}, {line}" for line in wrong]
    text = ""
    settings: dict[str, Any] = {}
    path = directory / CONFIG_FILE
    if path.exists():
        try:
            text = read_input(path, MOST_BYTES).decode(errors="replace")
            settings = parse_yaml(text) or {}
        except yaml.YAMLError as error:
            problems.append(f"{path}: not YAML ({' '.join(str(error).split())})")
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}")
        if not isinstance(settings, dict):
            problems.append(f"{path}: not a tree of settings")
            settings = {}
    return Run(directory, settings, text, events, problems)
