"""``mstar evaluate``: a run's policy on its own queries, or any policy on a benchmark."""

from __future__ import annotations

from pathlib import Path

from mstar_mega.commands import Command
from mstar_mega.commands.arguments import (
    SETTINGS_OF_RUN,
    Parser,
    config_of_run,
    gives,
    over_settings,
    run_directory_parser,
)


def evaluate(command: Command, arguments: list[str]) -> None:
    """``mstar evaluate RUN_DIR`` and ``mstar evaluate --checkpoint DIR --benchmark NAME``."""
    if gives(arguments, "--checkpoint", "--benchmark"):
        _benchmark(command, arguments)
        return
    parser = run_directory_parser(command)
    parser.epilog = f"{SETTINGS_OF_RUN} On a benchmark: mstar evaluate --checkpoint DIR --help"
    _, config = config_of_run(parser, arguments)
    from mstar_mega.recipe import job

    job.evaluate(config)


def _benchmark(command: Command, arguments: list[str]) -> None:
    from mstar_mega.evaluation import command as benchmarks

    parser = Parser(command, epilog=SETTINGS_OF_RUN)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a run directory, or a converted checkpoint"
    )
    benchmarks.add_benchmark(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where results are written, and resumed")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    benchmarks.add_settings(parser, (*benchmarks.SCORING_RESPONSES, *benchmarks.ASKING))
    options, overrides = parser.parse_own(arguments)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit is {options.limit}: it must be at least 1")
    chosen = benchmarks.settings_of(options)
    from mstar_mega.recipe import benchmark

    config = over_settings(parser, benchmark.settings_of(options.checkpoint), overrides)
    request = benchmark.Request(options.checkpoint, options.benchmark, options.data, options.out, options.limit, chosen)
    benchmark.evaluate(config, request)
