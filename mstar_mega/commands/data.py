"""``mstar data``: what a training set holds, and how a query of it looks."""

from __future__ import annotations

from mstar_mega import settings
from mstar_mega.commands import UNUSABLE, Command
from mstar_mega.platform.terminal import is_main, say
from mstar_mega.settings.rules import validate


def data(command: Command, rest: list[str]) -> int:
    """``mstar data check PATH`` and ``mstar data show [PATH] ID``: their settings are those of the group data."""
    action, rest = (rest[0], rest[1:]) if rest else ("", rest)
    if action not in _ACTIONS:
        usage = "\n".join(f"  mstar data {action} {text}" for action, (text, _) in _ACTIONS.items())
        if action in ("-h", "--help"):
            say(f"{command.what}\n\n{usage}\n\n--NAME VALUE are settings, as in 'mstar evolve --help'.")
            return 0
        raise ValueError(f"mstar data: choose {' or '.join(_ACTIONS)} ('mstar data --help' shows how)")
    usage, help = _ACTIONS[action]
    if any(argument in ("-h", "--help") for argument in rest):
        say(f"usage: mstar data {action} {usage}\n\n{help}\n{_SETTINGS}")
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

    if not is_main():
        return 0
    out = own["--out"][-1] if own["--out"] else None
    if action == "show":
        say(data_show.show(config, names[-1], out))
        return 0
    text, usable = data_check.check(config, own["--against"], out)
    say(text)
    return 0 if usable else UNUSABLE


_ACTIONS = {
    "check": (
        "PATH [--data.images DIR] [--against BENCHMARK=FILE ...] [--model.family NAME --model.checkpoint DIR] "
        "[--data.dir INDEX_FOLDER] [--out FILE.json] [--NAME VALUE ...]",
        """What a training file holds, what is wrong with it, what it costs, and the arguments of a job that fit it.

  PATH                      the training file: rows of {image, question, answer[, choices][, id]}, or in MathV360K's
                            shape; JSON, JSON lines, CSV, parquet, arrow, or a folder that Hugging Face datasets saved
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

  PATH                      a training file; without it, --data.name names the set
  ID                        the query's id
  --data.images DIR         folder that the image paths begin in (unset: the file's)
  --model.family NAME --model.size SIZE (or --model.checkpoint DIR)
                            whose prompt and tiles
  --out TILES.png           write the image's tiles side by side
""",
    ),
}
"""Action -> (its arguments, its help)."""
_SETTINGS = "Every setting of 'mstar evolve --help' may follow as --dotted.name VALUE; --config FILE reads a file."
