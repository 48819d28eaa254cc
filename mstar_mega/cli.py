"""The ``mstar`` command. Each subcommand's code is imported only when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from mstar_mega.config import Config
from mstar_mega.platform.files import DISK_FULL
from mstar_mega.platform.terminal import say, tame_logging, visible

USER_ERROR = 2
"""Exit code of a mistake that the user can mend."""

UNUSABLE = 1
"""Exit code of ``mstar data check`` where no job could use the files as the settings say."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it."""
BROKEN_PIPE = 141
"""Exit code when what read the output has ended (``| head``), as shells give it."""

_USER_OS_ERRORS = (
    *DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ENXIO,
)  # fmt: skip
"""A path that the user gave leads nowhere, may not be used, or cannot be read to its end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand on every rank of the job; returns the exit code.

    A user's mistake (ValueError, a full disk, missing permission) is one line on rank 0 and exit code 2; so is an
    OSError without a number, which is our own and says what to do.
    ``MSTAR_TRACEBACK=1`` shows where it came from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    tame_logging()
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would complain again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _report("ended, because nothing reads its output any more")
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        is_users = isinstance(error, ValueError) or error.errno in (None, *_USER_OS_ERRORS)
        if os.environ.get("MSTAR_TRACEBACK") == "1" or not is_users:
            raise
        _report(_one_line(error))
        return USER_ERROR
    except KeyboardInterrupt:
        _report("interrupted. The same command goes on from what is finished")
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise ValueError(f"there is no command '{name}': choose one of {', '.join(COMMANDS)}")
    if _rank() != 0 and any(argument in ("-h", "--help") for argument in rest):
        return 0
    return COMMANDS[name][1](name, rest) or 0


def _job(until: str | None) -> Callable[[str, list[str]], None]:
    """A command that runs the job up to and including the stage ``until`` (None: all of it)."""

    def command(name: str, rest: list[str]) -> None:
        config = _config_of_job(name, rest)
        if _rank() == 0 and not _gives(rest, "--config"):
            say(
                "NOTE: without --config every setting is the paper's, for models of billions of parameters; "
                "examples/configs/digits.yaml has those of the built-in task",
                file=sys.stderr,
            )
        from mstar_mega.recipe import job

        job.run(config, until)

    return command


def _warmup_data(name: str, rest: list[str]) -> None:
    config = _config_of_job(name, rest)
    from mstar_mega.recipe import job

    job.warmup_data(config)


def _evaluate(name: str, rest: list[str]) -> None:
    if _gives(rest, "--checkpoint", "--benchmark"):
        _evaluate_benchmark(name, rest)
        return
    _, config = _config_of_run(_run_directory_parser(name), rest)
    from mstar_mega.recipe import job

    job.evaluate(config)


def _evaluate_benchmark(name: str, rest: list[str]) -> None:
    from mstar_mega import settings
    from mstar_mega.evaluation import command
    from mstar_mega.settings_rules import validate

    parser = _Parser(
        prog=f"mstar {name}",
        description=COMMANDS[name][0],
        epilog="The settings are those of the run; --NAME VALUE changes one ('mstar evolve --help' lists them).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a run directory, or a converted checkpoint"
    )
    command.add_benchmark(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where results are written, and resumed")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    command.add_settings(parser, (*command.SCORING_RESPONSES, *command.ASKING))
    options, overrides = parser.parse_known_args(rest)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit is {options.limit}: it must be at least 1")
    chosen = command.settings_of(options)
    from mstar_mega.recipe import benchmark

    base = benchmark.settings_of(options.checkpoint)
    config = settings.parse(overrides, prog=parser.prog, base=base)
    validate(config)
    _fit_layout(config, overrides)
    request = benchmark.Request(options.checkpoint, options.benchmark, options.data, options.out, options.limit, chosen)
    benchmark.evaluate(config, request)


def _generate(name: str, rest: list[str]) -> None:
    parser = _run_directory_parser(name, "--question TEXT [--image FILE ...] [--responses N] [--temperature T] ")
    parser.add_argument("--question", required=True, help="the question, its choices included")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--responses", type=int, default=4, help="responses to sample (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default: %(default)s)")
    options, config = _config_of_run(parser, rest)
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


def _report_page(name: str, rest: list[str]) -> None:
    parser = _Parser(prog=f"mstar {name}", description=COMMANDS[name][0], allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of a run, also of a running job")
    run_dir = parser.parse_args(rest).run_dir
    if _rank() == 0:
        from mstar_mega.report.html import write_report

        say(write_report(run_dir))


def _score(name: str, rest: list[str]) -> None:
    from mstar_mega.evaluation import command

    parser = _Parser(prog=f"mstar {name}", description=COMMANDS[name][0], allow_abbrev=False)
    command.add_benchmark(parser)
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE", help="lines of {id, response}")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="where the scores are written")
    command.add_settings(parser, command.SCORING)
    options = parser.parse_args(rest)
    if _rank() == 0:
        say(command.run_score(options))


def _data(name: str, rest: list[str]) -> int:
    """``mstar data check PATH`` and ``mstar data show [PATH] ID``: their settings are those of the group data."""
    from mstar_mega import settings
    from mstar_mega.settings_rules import validate

    action, rest = (rest[0], rest[1:]) if rest else ("", rest)
    if action not in _DATA_ACTIONS:
        usage = "\n".join(f"  mstar data {action} {text}" for action, (text, _) in _DATA_ACTIONS.items())
        if action in ("-h", "--help"):
            say(f"{COMMANDS[name][0]}\n\n{usage}\n\n--NAME VALUE are settings, as in 'mstar evolve --help'.")
            return 0
        raise ValueError(f"mstar data: choose {' or '.join(_DATA_ACTIONS)} ('mstar data --help' shows how)")
    usage, help = _DATA_ACTIONS[action]
    if any(argument in ("-h", "--help") for argument in rest):
        say(f"usage: mstar data {action} {usage}\n\n{help}\n{_DATA_SETTINGS}")
        return 0
    names: list[str] = []
    own: dict[str, list[str]] = {"--out": [], "--against": []}
    others: list[str] = []
    arguments = iter(rest)
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option in own:
            own[option].append(value if equals else next(arguments, ""))
            if not own[option][-1] or own[option][-1].startswith("--"):
                raise ValueError(f"{option} has no value ('mstar data {action} --help' shows how it is used)")
        elif argument.startswith("--"):
            others += [argument] if equals else [argument, *[v for v in (next(arguments, None),) if v is not None]]
        else:
            names.append(argument)
    path = [] if len(names) < (1 if action == "check" else 2) else ["--data.name", "mathv360k", "--data.path", names[0]]
    config = settings.parse([*path, *others], prog=f"mstar data {action}")
    validate(config)
    if not 1 <= len(names) <= (1 if action == "check" else 2):
        raise ValueError(f"usage: mstar data {action} {usage}")
    from mstar_mega.recipe import data_check, data_show

    if _rank() != 0:
        return 0
    out = own["--out"][-1] if own["--out"] else None
    if action == "show":
        say(data_show.show(config, names[-1], out))
        return 0
    text, usable = data_check.check(config, own["--against"], out)
    say(text)
    return 0 if usable else UNUSABLE


_DATA_ACTIONS = {
    "check": (
        "PATH [--data.images DIR] [--against BENCHMARK=FILE ...] [--model.family NAME --model.checkpoint DIR] "
        "[--data.dir INDEX_FOLDER] [--out FILE.json] [--NAME VALUE ...]",
        """What a training file in MathV360K's shape holds, what is wrong with it, and what it costs.

  PATH                      the training file: a JSON list or JSON lines
  --data.images DIR         folder that the image paths begin in (unset: the file's)
  --data.warmup_file FILE   look at the written-out responses too
  --against BENCHMARK=FILE  say what it shares with an evaluation set; may be repeated
  --model.family NAME --model.checkpoint DIR
                            measure the cost with this checkpoint's tokenizer too
  --data.dir INDEX_FOLDER   keep the index for the next look
  --out FILE.json           write the same facts, and every unusable row

Exit code 1: nothing in the file, or in the warm-up file, is usable; or data.bad_rows is 'refuse' and rows are unusable.
""",
    ),
    "show": (
        "[PATH] ID [--data.name NAME] [--model.family NAME --model.size SIZE] [--out TILES.png] [--NAME VALUE ...]",
        """One query, its exact prompt, and the token ids around its images.

  PATH                      a training file in MathV360K's shape; without it, --data.name names the set
  ID                        the query's id
  --data.images DIR         folder that the image paths begin in (unset: the file's)
  --model.family NAME --model.size SIZE (or --model.checkpoint DIR)
                            whose prompt and tiles
  --out TILES.png           write the image's tiles side by side
""",
    ),
}
"""Action -> (its arguments, its help)."""
_DATA_SETTINGS = "Every setting of 'mstar evolve --help' may follow as --dotted.name VALUE; --config FILE reads a file."


def _tool(module: str, takes_settings: bool = False) -> Callable[[str, list[str]], None]:
    """A command whose arguments and code are those of a module of ``checkpoint_tools``.

    ``takes_settings``: its other arguments are settings, as those of ``mstar evolve``, for the module to read.
    """

    def command(name: str, rest: list[str]) -> None:
        tool = importlib.import_module(f"mstar_mega.checkpoint_tools.{module}")
        parser = _Parser(prog=f"mstar {name}", description=COMMANDS[name][0], allow_abbrev=False)
        tool.add_arguments(parser)
        if takes_settings:
            tool.run(*parser.parse_known_args(rest))
        else:
            tool.run(parser.parse_args(rest))

    return command


COMMANDS: dict[str, tuple[str, Callable[[str, list[str]], int | None]]] = {
    "evolve": ("The whole job: warm-up, annotation, PRM, self-evolving iterations, evaluation, report.", _job(None)),
    "warmup": ("The job's first stage: warm-up SFT on written-out chains of thought.", _job("warmup")),
    "warmup-data": ("Make a warm-up set: reasoning to given gold answers, kept where it arrives there.", _warmup_data),
    "annotate": ("The job until the Monte-Carlo step labels are there.", _job("annotate")),
    "train-prm": ("The job until the process reward model is trained.", _job("prm")),
    "evaluate": (
        "Measure a policy on its validation and test queries, or (--checkpoint DIR --help tells how) on a benchmark.",
        _evaluate,
    ),
    "score": ("Score a file of predictions on a benchmark by its rules.", _score),
    "generate": ("Sample responses to a question of your own from the policy of a run directory.", _generate),
    "data": (
        "Look at a training set: what it holds and what is wrong with it, or one query as the policy sees it.",
        _data,
    ),
    "report": ("Rebuild report.html of a run directory.", _report_page),
    "convert": ("Weights from Hugging Face to a checkpoint, or back.", _tool("convert")),
    "verify": ("Compare a checkpoint with recorded outputs of the original model.", _tool("verify")),
    "plan": ("Predict memory by part and recommend a layout.", _tool("plan", takes_settings=True)),
    "inspect": ("Show what is in a checkpoint, without loading it.", _tool("inspection")),
}
"""Name -> (what it does, its function, which returns an exit code other than 0 or nothing)."""


class _Parser(argparse.ArgumentParser):
    """argparse that leaves the reporting of a mistake to :func:`main`, which prints it on one rank only."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"{message} ('{self.prog} --help' shows how it is used)")


def _run_directory_parser(name: str, options: str = "") -> _Parser:
    parser = _Parser(
        prog=f"mstar {name}",
        usage=f"mstar {name} RUN_DIR {options}[--NAME VALUE ...]",
        description=COMMANDS[name][0],
        epilog="The settings are those of the run; --NAME VALUE changes one ('mstar evolve --help' lists them).",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of a run (its run.dir)")
    return parser


def _config_of_job(name: str, rest: list[str]) -> Config:
    """The checked settings of a command whose arguments are nothing else."""
    from mstar_mega import settings
    from mstar_mega.settings_rules import validate

    config = settings.parse(rest, prog=f"mstar {name}", description=COMMANDS[name][0])
    validate(config)
    return config


def _config_of_run(parser: _Parser, rest: list[str]) -> tuple[argparse.Namespace, Config]:
    """The command's own options, and the run's checked settings with the overrides on top."""
    from mstar_mega import settings
    from mstar_mega.settings_rules import validate

    if rest and rest[0].startswith("-") and rest[0] not in ("-h", "--help"):
        # Behind an unknown --name the parser would take that setting's value for RUN_DIR.
        raise ValueError(f"RUN_DIR comes first: {parser.prog} RUN_DIR ...")
    options, overrides = parser.parse_known_args(rest)
    base = settings.load(options.run_dir)
    base.run.dir = options.run_dir
    config = settings.parse(overrides, prog=parser.prog, base=base)
    validate(config)
    _fit_layout(config, overrides)
    return options, config


def _fit_layout(config: Config, overrides: Sequence[str]) -> None:
    """Where only the run, not the user, asks for a layout that the job's ranks cannot have: whole copies instead.

    Any layout loads a run's weights, and looking at a policy needs less memory than the training that it was cut for.
    """
    parallel, ranks = config.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    needed = parallel.tensor * parallel.pipeline
    if ranks % needed == 0 or any(argument.startswith("--parallel.") for argument in overrides):
        return
    config.parallel = replace(parallel, tensor=1, pipeline=1, sequence=False)
    if _rank() == 0:
        was = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
        say(
            f"mstar: the run's {was} needs a multiple of {needed} ranks and this job has {ranks}: taking tensor 1 x "
            "pipeline 1 for this command",
            file=sys.stderr,
        )


def _gives(arguments: Sequence[str], *options: str) -> bool:
    """Whether any of the options is among the arguments, as ``--name VALUE`` or ``--name=VALUE``."""
    return any(argument.partition("=")[0] in options for argument in arguments)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _report(message: str) -> None:
    """Print on rank 0; on every rank leave the message where torchrun looks for the cause of a failure."""
    if _rank() == 0:
        say(f"mstar: error: {message}", sys.stderr)
    # When one rank alone fails, its line in torchrun's closing table is the only place that says why.
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(error_file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.errno and not error.filename else str(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL and "disk is full" not in str(text):
        text = f"the disk is full ({text}). Free some space and give the same command again"
    return visible(" ".join(str(text).split())) or type(error).__name__


def _print_help() -> None:
    if _rank() != 0:
        return
    width = max(map(len, COMMANDS))
    say("usage: mstar COMMAND [arguments]\n\nSelf-evolving training of multimodal reasoners.\n\ncommands:")
    for name, (what, _) in COMMANDS.items():
        say(f"  {name:<{width}}  {what}")
    say("\n'mstar COMMAND --help' shows its settings. On several processes: torchrun ... -m mstar_mega.cli COMMAND")


if __name__ == "__main__":
    sys.exit(main())
