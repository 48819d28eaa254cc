"""``mstar generate``: a question of the user's own."""

from __future__ import annotations

from pathlib import Path

from mstar_mega.commands import Command
from mstar_mega.commands.arguments import config_of_run, run_directory_parser


def generate(command: Command, arguments: list[str]) -> None:
    """``mstar generate RUN_DIR --question TEXT``."""
    parser = run_directory_parser(command, "--question TEXT [--image FILE ...] [--responses N] [--temperature T] ")
    parser.add_argument("--question", required=True, help="the question, its choices included")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--responses", type=int, default=4, help="responses to sample (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default: %(default)s)")
    options, config = config_of_run(parser, arguments)
    if options.responses < 1:
        raise ValueError(f"--responses is {options.responses}: it must be at least 1")
    if not options.question.strip():
        raise ValueError("--question is empty: it must say what is asked")
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"--temperature is {options.temperature}: it must be a finite number of at least 0")
    for image in options.image:
        if not Path(image).is_file():
            raise ValueError(f"--image {image}: there is no such file")
    from mstar_mega.recipe import job

    job.generate(config, options.question, options.image, options.responses, options.temperature)
