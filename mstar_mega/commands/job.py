"""The job, whole or up to a stage, and what makes a warm-up set for it."""

from __future__ import annotations

import sys

from mstar_mega.commands import Command
from mstar_mega.commands.arguments import config_of_job, gives
from mstar_mega.platform.terminal import is_main, say


def evolve(command: Command, arguments: list[str]) -> None:
    """``mstar evolve``."""
    _run(command, arguments, None)


def warmup(command: Command, arguments: list[str]) -> None:
    """``mstar warmup``."""
    _run(command, arguments, "warmup")


def annotate(command: Command, arguments: list[str]) -> None:
    """``mstar annotate``."""
    _run(command, arguments, "annotate")


def train_prm(command: Command, arguments: list[str]) -> None:
    """``mstar train-prm``."""
    _run(command, arguments, "prm")


def data(command: Command, arguments: list[str]) -> None:
    """``mstar warmup-data``."""
    config = config_of_job(command, arguments)
    from mstar_mega.recipe import job

    job.warmup_data(config)


def _run(command: Command, arguments: list[str], until: str | None) -> None:
    config = config_of_job(command, arguments)
    if is_main() and not gives(arguments, "--config"):
        say(
            "NOTE: without --config every setting is the paper's, for models of billions of parameters; "
            "--config digits has those of the built-in task",
            file=sys.stderr,
        )
    from mstar_mega.recipe import job

    job.run(config, until)
