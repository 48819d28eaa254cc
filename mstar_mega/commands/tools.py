"""Commands whose arguments and code are those of a module of ``checkpoint_tools``."""

from __future__ import annotations

import importlib

from mstar_mega.commands import Command
from mstar_mega.commands.arguments import Parser


def convert(command: Command, arguments: list[str]) -> None:
    """``mstar convert``."""
    _run("convert", command, arguments)


def verify(command: Command, arguments: list[str]) -> None:
    """``mstar verify``."""
    _run("verify", command, arguments)


def plan(command: Command, arguments: list[str]) -> None:
    """``mstar plan``: its other arguments are settings, as those of ``mstar evolve``, for the module to read."""
    _run("plan", command, arguments, takes_settings=True)


def inspect(command: Command, arguments: list[str]) -> None:
    """``mstar inspect``."""
    _run("inspection", command, arguments)


def _run(module: str, command: Command, arguments: list[str], takes_settings: bool = False) -> None:
    tool = importlib.import_module(f"mstar_mega.checkpoint_tools.{module}")
    parser = Parser(command)
    tool.add_arguments(parser)
    if takes_settings:
        tool.run(*parser.parse_own(arguments))
    else:
        tool.run(parser.parse_args(arguments))
