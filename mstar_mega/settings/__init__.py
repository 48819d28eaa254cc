"""Settings from YAML files and the command line to a :class:`~mstar_mega.config.Config`, and back.

Files, or names of shipped configs, given with ``--config`` are read first, in their order; ``--dotted.name value`` on
the command line comes on top, wherever it stands. A mistake is a ValueError of one line that names the setting, where
it stands, and what is possible.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from mstar_mega.config import Config
from mstar_mega.functions import CONTRACTS, named_by_user
from mstar_mega.platform.inputs import read_input
from mstar_mega.settings.shipped import config_file
from mstar_mega.settings.tree import field_docs, flatten, leaves, shown
from mstar_mega.settings.yaml_files import MOST_BYTES, read_yaml

CONFIG_FILE = "config.yaml"
"""In a run directory: its settings, resolved."""
END_OF_FILE = "...\n"
"""YAML's own end marker: a settings file of a run directory that lacks it was cut off."""
_BESIDE = (".lock", "metrics.jsonl", "checkpoints", "rollouts", "files.json", "summary.json")
"""What else a run directory has."""
_MEND = "restore it, or delete it and give the same command again, which writes it anew from the command's settings"

_FREE_TO_CHANGE = (
    "run.dir",
    "run.allow_changed_settings",
    "run.keep_checkpoints",
    "run.grace_seconds",
    "run.stale_seconds",
    "run.wait_seconds",
    "run.hang_minutes",
    "report.",
    "parallel.",
    "model.recompute",
    "model.recompute_vision",
    "model.fused_layers",
    "data.workers",
    "data.prefetch_mb",
    "kernels.",
)
"""Settings, or groups of them, that a run may change between two starts without changing its results."""


_REPLACED = {
    "warmup.set": "it is now data.warmup_file: give the `mstar warmup-data` command that made the set once more, which "
    "writes it anew as such a file without sampling again",
}
"""Settings that there were, and what to do instead."""


def parse(
    argv: Sequence[str], prog: str = "mstar evolve", description: str | None = None, base: Config | None = None
) -> Config:
    """Settings from ``argv`` over ``base`` (None: the defaults). ``--help`` prints every setting and exits.

    Raises ValueError for an unknown name, a value of the wrong type, and an unreadable or malformed file.
    """
    files, overrides, wants_help = _split(argv, {leaf.name for leaf in leaves()})
    parser = _parser(prog, description)
    if base is not None:
        parser.set_defaults(flatten(base))
    for file in files:
        path = config_file(file)
        given = _typed(parser, _read(path), f"in {file}")
        if not _is_written_by_a_run(path):
            named_by_user(given)
        parser.set_defaults(given)
    if wants_help:
        parser.parse_args(["--help"])
    try:
        values = parser.parse_args(overrides)
    except jsonargparse.ArgumentError as error:
        raise ValueError(_explain(str(error), "on the command line")) from None
    given_here = {override[2:].partition("=")[0] for override in overrides}
    named_by_user({name: values[name] for name in given_here & set(CONTRACTS)})
    return _build(Config(), "", values, "on the command line")


def _is_written_by_a_run(path: Path) -> bool:
    """Whether a settings file is a run's own, and so no word of the user's: functions that it names do not run.

    By what lies beside it as well: whoever hands on a run directory may leave the end marker out.
    """
    place = path.resolve()
    if place.name != CONFIG_FILE:
        return False
    marked = END_OF_FILE.strip().encode() in read_input(place, MOST_BYTES).splitlines()
    return marked or any((place.parent / name).exists() for name in _BESIDE)


def load(path: str | Path) -> Config:
    """The settings of a run directory (or of its ``config.yaml``). Raises ValueError when missing or damaged."""
    file = Path(path)
    if file.is_dir():
        file = file / CONFIG_FILE
    if not file.exists():
        raise ValueError(f"{path} is not the directory of a run: there is no {file}. Give the run.dir of a started run")
    if not read_input(file, MOST_BYTES).endswith(END_OF_FILE.encode()):
        raise ValueError(f"{file} is cut off (its last line is not '...'): {_MEND}")
    flat = _read(file)
    parser = _parser("mstar", None)
    values = parser.parse_object(_typed(parser, flat, f"in {file}"))
    return _build(Config(), "", values, f"in {file}")


def dump(config: Config) -> str:
    """The whole tree as YAML; :func:`load` and ``--config`` read it back to an equal tree."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, explicit_end=True)


def differences(old: Config, new: Config) -> list[str]:
    """Lines ``name: old -> new`` for the settings that would change the results of a run begun with ``old``."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name] and not is_free_to_change(name)
    ]


def is_free_to_change(name: str) -> bool:
    """Whether a setting may change between two starts of a run without changing its results."""
    return name.startswith(_FREE_TO_CHANGE)


def _parser(prog: str, description: str | None) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE ...] [--NAME VALUE ...]",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE or NAME",
        default=jsonargparse.SUPPRESS,
        help="YAML file of settings, or the name of one that comes with the program (mstar init --help lists them); "
        "the command line goes over it",
    )
    docs = field_docs()
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    groups: dict[str, Any] = {}
    for leaf in leaves():
        section, dot, _ = leaf.name.partition(".")
        section = section if dot else ""
        if section not in groups:
            doc = docs.get((str(sections.get(section)), ""))
            groups[section] = parser.add_argument_group(section or "job", doc)
        groups[section].add_argument(f"--{leaf.name}", type=leaf.type, default=leaf.default, help=leaf.doc or None)
    return parser


def _split(argv: Sequence[str], known: set[str]) -> tuple[list[str], list[str], bool]:
    """Files, the other arguments (names checked), and whether help is wanted."""
    files: list[str] = []
    overrides: list[str] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        if token in ("-h", "--help"):
            return files, [], True
        if not token.startswith("--"):
            raise ValueError(f"unexpected argument '{token}': a setting is given as --name value (see --help)")
        name, equals, value = token[2:].partition("=")
        # jsonargparse appends to a list setting under the name with a plus sign.
        if name != "config" and name.removesuffix("+") not in known:
            advice = _REPLACED.get(name) or _nearest(name, known, "--")
            raise ValueError(f"unknown setting '--{name}' on the command line; {advice}")
        if not equals:
            if position + 1 == len(argv) or argv[position + 1].startswith("--"):
                raise ValueError(f"--{name} on the command line has no value: give --{name} VALUE")
            position += 1
            value = argv[position]
        if name == "config":
            files.append(value)
        else:
            overrides.append(f"--{name}={value}")
        position += 1
    return files, overrides, False


def _nearest(name: str, known: set[str], dashes: str = "") -> str:
    """Advice: the known name most like ``name``; an exact ending wins, as the group is what people leave out."""
    last = name.rpartition(".")[2]
    near = (
        [full for full in sorted(known) if full.endswith(f".{name}")][:3]
        or difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
        or [full for full in sorted(known) if full.rpartition(".")[2] == last][:3]
        or difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    )
    if not near:
        return "--help lists all settings"
    return "did you mean " + " or ".join(f"'{dashes}{full}'" for full in near) + "?"


def _read(file: Path) -> dict[str, Any]:
    """Dotted name -> raw value of a YAML file; names are checked, values are not."""
    try:
        tree = read_yaml(file)
    except OSError as error:
        raise ValueError(f"cannot read the settings file {file}: {error.strerror}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"the settings file {file} holds {shown(tree)}: expected lines like 'seed: 0'")
    return dict(_flat(tree or {}, "", {leaf.name for leaf in leaves()}, file))


def _flat(tree: Mapping[Any, Any], prefix: str, known: set[str], file: Path) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in known:
            yield name, value
            continue
        if name in _REPLACED:
            if value is None:  # as settings files of older runs say
                continue
            raise ValueError(f"unknown setting '{name}' in {file}; {_REPLACED[name]}")
        if not any(full.startswith(f"{name}.") for full in known):
            raise ValueError(f"unknown setting '{name}' in {file}; {_nearest(name, known)}")
        # `evolve:` with every line below commented out is an empty group, not a mistake.
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} is {shown(value)} in {file}: expected a group of settings below '{name}:'")
        yield from _flat(value or {}, f"{name}.", known, file)


def _typed(parser: jsonargparse.ArgumentParser, flat: dict[str, Any], where: str) -> dict[str, Any]:
    """``flat`` with every value converted to its setting's type."""
    try:
        values = parser.parse_object(flat)
    except jsonargparse.ArgumentError as error:
        raise ValueError(_explain(str(error), where)) from None
    for leaf in leaves():
        if leaf.name in flat:
            _refuse_null(leaf.name, leaf.type, values[leaf.name], where)
    return {name: values[name] for name in flat}


def _build(node: Any, prefix: str, values: jsonargparse.Namespace, where: str) -> Any:
    """A dataclass like ``node`` with its values from the flat ``values``."""
    hints = typing.get_type_hints(type(node))
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        name, child = prefix + field.name, getattr(node, field.name)
        if dataclasses.is_dataclass(child):
            fields[field.name] = _build(child, f"{name}.", values, where)
        else:
            _refuse_null(name, hints[field.name], values[name], where)
            fields[field.name] = values[name]
    return type(node)(**fields)


def _refuse_null(name: str, hint: Any, value: Any, where: str) -> None:
    # The parser lets null pass for every type, as "not given".
    if value is None and type(None) not in typing.get_args(hint):
        raise ValueError(f"{name} is null {where}: expected {_type_text(hint)}")


def _explain(message: str, where: str) -> str:
    """The parser's message of several lines as one: setting, value, place, expected type."""
    name = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"[Gg]iven value: (.*)|Got value: (.*)", message)
    types = {leaf.name: leaf.type for leaf in leaves()}
    if name is None or value is None or name[1] not in types:
        return f"{' '.join(message.split())} ({where})"
    return f"{name[1]} is '{value[1] or value[2] or ''}' {where}: expected {_type_text(types[name[1]])}"


def _type_text(hint: Any) -> str:
    """A type as a person says it: ``int``, ``float or null``, ``one of a, b``, ``list of float``."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        rest = [argument for argument in arguments if argument is not type(None)]
        return " or ".join([*(_type_text(argument) for argument in rest), "null"])
    if typing.get_origin(hint) is typing.Union:
        return " or ".join(map(_type_text, arguments))
    if typing.get_origin(hint) is typing.Literal and len(arguments) == 1:
        return str(arguments[0])
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if typing.get_origin(hint) is list:
        return f"a list of {_type_text(arguments[0])}, like [0.5, 1.0]"
    return {bool: "true or false", str: "text"}.get(hint, str(getattr(hint, "__name__", hint)))
