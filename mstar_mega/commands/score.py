"""``mstar score``: predictions from a file, by a benchmark's rules."""

from __future__ import annotations

from pathlib import Path

from mstar_mega.commands import Command
from mstar_mega.commands.arguments import Parser
from mstar_mega.platform.terminal import is_main, say


def score(command: Command, arguments: list[str]) -> None:
    """``mstar score --benchmark NAME --data PATH --predictions FILE --out FILE``."""
    from mstar_mega.evaluation import command as benchmarks

    parser = Parser(command)
    benchmarks.add_benchmark(parser)
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE", help="lines of {id, response}")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="where the scores are written")
    benchmarks.add_settings(parser, benchmarks.SCORING)
    options = parser.parse_args(arguments)
    if is_main():
        say(benchmarks.run_score(options))
