"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from mstar_mega import settings
from mstar_mega.commands import Command
from mstar_mega.config import Config
from mstar_mega.platform.terminal import is_main, say
from mstar_mega.settings.rules import validate

SETTINGS_OF_RUN = "The settings are those of the run; --NAME VALUE changes one ('mstar evolve --help' lists them)."
"""Last line of the help of commands on a run."""


class _Reporting(argparse.ArgumentParser):
    """argparse that leaves the reporting of a mistake to ``cli.main``, which prints it on one rank only."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"{message} ('{self.prog} --help' shows how it is used)")


class Parser(_Reporting):
    """The arguments of one command."""

    def __init__(self, command: Command, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(command.prog, usage, command.what, epilog, allow_abbrev=False)

    def add_subparsers(self, **given: Any) -> Any:
        """As argparse's; a command's ways are no commands."""
        return super().add_subparsers(**{"parser_class": _Reporting, **given})

    def parse_own(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own options, and the arguments that are left. Raises ValueError for a mistyped option."""
        options, others = self.parse_known_args(arguments)
        known = {name[2:] for name in self._option_string_actions if name.startswith("--")}
        for argument in others:
            name = argument[2:].partition("=")[0] if argument.startswith("--") else ""
            if name and "." not in name and (near := difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)):
                raise ValueError(f"unknown option '--{name}' of {self.prog}; did you mean '--{near[0]}'?")
        return options, others


def run_directory_parser(command: Command, options: str = "") -> Parser:
    """A parser whose first argument is a run directory; ``options``: the command's own, as its usage shows them."""
    parser = Parser(command, f"{command.prog} RUN_DIR {options}[--NAME VALUE ...]", SETTINGS_OF_RUN)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of a run (its run.dir)")
    return parser


def config_of_job(command: Command, arguments: Sequence[str]) -> Config:
    """The checked settings of a command whose arguments are nothing else."""
    config = settings.parse(arguments, prog=command.prog, description=command.what)
    validate(config)
    return config


def config_of_run(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The command's own options, and the run's checked settings with the overrides on top."""
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        # Behind an unknown --name the parser would take that setting's value for RUN_DIR.
        raise ValueError(f"RUN_DIR comes first: {parser.prog} RUN_DIR ...")
    options, overrides = parser.parse_own(arguments)
    base = settings.load(options.run_dir)
    base.run.dir = options.run_dir
    return options, over_settings(parser, base, overrides)


def over_settings(parser: Parser, base: Config, overrides: Sequence[str]) -> Config:
    """A run's settings with those of the command line on top, checked, in a layout that the job's ranks can have."""
    config = settings.parse(overrides, prog=parser.prog, base=base)
    validate(config)
    _fit_layout(config, overrides)
    return config


def _fit_layout(config: Config, overrides: Sequence[str]) -> None:
    """Where only the run, not the user, asks for a layout that the job's ranks cannot have: whole copies instead.

    Any layout loads a run's weights, and looking at a policy needs less memory than the training that it was cut for.
    """
    parallel, ranks = config.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    needed = parallel.tensor * parallel.pipeline
    if ranks % needed == 0 or any(argument.startswith("--parallel.") for argument in overrides):
        return
    config.parallel = replace(parallel, tensor=1, pipeline=1, sequence=False)
    if is_main():
        was = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
        say(
            f"mstar: the run's {was} needs a multiple of {needed} ranks and this job has {ranks}: taking tensor 1 x "
            "pipeline 1 for this command",
            file=sys.stderr,
        )


def gives(arguments: Sequence[str], *options: str) -> bool:
    """Whether any of the options is among the arguments, as ``--name VALUE`` or ``--name=VALUE``."""
    return any(argument.partition("=")[0] in options for argument in arguments)
