"""The commands of ``mstar``: one table, and one small file for each kind of command.

A command's file is imported only when it runs, so that ``mstar --help`` is quick.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

UNUSABLE = 1
"""Exit code of ``mstar data check`` where no job could use the files as the settings say."""


@dataclass(frozen=True)
class Command:
    """A line of the table."""

    name: str
    what: str
    """What it does, for the help."""
    place: str
    """``module:function`` in this package; the function takes (this, arguments) and returns an exit code, or None."""

    @property
    def prog(self) -> str:
        """How it is called, for usages and messages."""
        return f"mstar {self.name}"

    def run(self, arguments: list[str]) -> int:
        """Import and run it; returns its exit code. Raises what it raises."""
        module, _, function = self.place.partition(":")
        call: Callable[[Command, list[str]], int | None]
        call = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return call(self, arguments) or 0


_TABLE = (
    ("init", "Copy a config that comes with the program, to edit it.", "init:init"),
    ("evolve", "The whole job: warm-up, annotation, PRM, self-evolving iterations, evaluation, report.", "job:evolve"),
    ("warmup", "The job's first stage: warm-up SFT on written-out chains of thought.", "job:warmup"),
    ("warmup-data", "Make a warm-up set: reasoning to given gold answers, kept where it arrives there.", "job:data"),
    ("annotate", "The job until the Monte-Carlo step labels are there.", "job:annotate"),
    ("train-prm", "The job until the process reward model is trained.", "job:train_prm"),
    (
        "evaluate",
        "Measure a policy on its validation and test queries, or (--checkpoint DIR --help tells how) on a benchmark.",
        "evaluate:evaluate",
    ),
    ("score", "Score a file of predictions on a benchmark by its rules.", "score:score"),
    ("generate", "Sample responses to a question of your own from the policy of a run directory.", "generate:generate"),
    (
        "data",
        "Look at a training set: what it holds and what is wrong with it, or one query as the policy sees it.",
        "data:data",
    ),
    ("report", "Rebuild report.html of a run directory.", "report:report"),
    ("compare", "Runs and seeds side by side: curves, settings that differ, paired tests, CSV.", "compare:compare"),
    ("convert", "Weights from Hugging Face to a checkpoint, or back.", "tools:convert"),
    ("verify", "Compare a checkpoint with recorded outputs of the original model.", "tools:verify"),
    ("plan", "Predict memory by part and recommend a layout.", "tools:plan"),
    ("inspect", "Show what is in a checkpoint, without loading it.", "tools:inspect"),
)
COMMANDS = {name: Command(name, what, place) for name, what, place in _TABLE}
"""By name, in the order of the help."""
