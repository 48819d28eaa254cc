"""Functions of the user's own, named by a setting: ``package.module:function`` or ``folder/file.py:function``.

Only what the user names runs. A path counts as named where it stands on the command line, in a settings file given with
``--config``, or in a call of :func:`allow`. The settings of a run directory or a checkpoint may name functions as well,
but they are data: what stands there alone is refused (:func:`allow` says how to name it again).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mstar_mega.config import Config


@dataclass(frozen=True)
class Contract:
    """What a function of a setting is called with, and what it returns."""

    signature: str
    """As the documentation shows it."""
    arguments: int


CONTRACTS = {
    "data.name": Contract("(config: DataConfig, directory: Path, seed: int) -> Task", 3),
    "data.template": Contract("(question: str, choices: Mapping[str, str], hint: str, instruct: bool) -> str", 4),
    "reward.function": Contract("(query: Query, response: Response) -> float", 2),
    "prm.reduction": Contract("(scores: Sequence[float]) -> float", 1),
    "selection.rule": Contract("(group: Group, settings: SelectionConfig, seed: int) -> Sequence[Response]", 3),
    "selection.weight": Contract("(query: Query, response: Response) -> float", 2),
    "temperature.mode": Contract("(group: Group, settings: TemperatureConfig) -> float", 2),
}
"""By setting: those that take a function's path besides registered names."""

_allowed: set[str] = set()


def is_path(value: object) -> bool:
    """Whether a setting's value is a function's path and not a registered name."""
    return isinstance(value, str) and ":" in value


def paths_of(config: Config) -> dict[str, str]:
    """The settings that name functions, with their paths."""
    found = {}
    for setting in CONTRACTS:
        group, _, field = setting.partition(".")
        value = getattr(getattr(config, group), field)
        if is_path(value):
            found[setting] = value
    return found


def allow(paths: Iterable[str]) -> None:
    """Note function paths as named by the user. For programs that make a Config themselves; the command line and
    ``--config`` files are noted by ``settings.parse``."""
    _allowed.update(paths)


def check(config: Config) -> None:
    """Load every function that the settings name. Raises ValueError as :func:`load`, for all that are not allowed at
    once, so that one answer names them all."""
    paths = paths_of(config)
    foreign = {setting: path for setting, path in paths.items() if path not in _allowed}
    if foreign:
        again = " ".join(f"--{setting} {path}" for setting, path in foreign.items())
        raise ValueError(
            f"the run's settings name functions ({', '.join(foreign)}), and code is never taken from a run directory "
            f"or a checkpoint: if you trust {', '.join(foreign.values())}, name it yourself by {again}"
        )
    for setting, path in paths.items():
        load(setting, path)


@functools.cache
def load(setting: str, path: str) -> Callable[..., Any]:
    """The function that a setting names. What it raises becomes a ValueError that names it.

    Raises ValueError, in one line, where the path was not named by the user, the module cannot be imported, or what it
    names is no function that takes the contract's arguments.
    """
    if path not in _allowed:
        raise ValueError(
            f"{setting} is {path} in settings that are not yours to run: code is never taken from a run directory or a "
            f"checkpoint. If you trust it, name it yourself by --{setting} {path}"
        )
    place, _, name = path.rpartition(":")
    contract = CONTRACTS[setting]
    wanted = f"expected a function {contract.signature}"
    try:
        module = _module(setting, path, place)
    except (Exception, SystemExit) as error:
        if isinstance(error, _PathError):
            raise ValueError(str(error)) from None
        raise ValueError(f"{setting} {path}: its module cannot be imported ({_words(error)})") from error
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"{setting} {path}: {module.__file__} has no '{name}'; {wanted}")
    if not callable(function):
        raise ValueError(f"{setting} {path} is {type(function).__name__}; {wanted}")
    try:
        inspect.signature(function).bind(*[None] * contract.arguments)
    except TypeError:
        raise ValueError(f"{setting} {path} takes {_signature(function)}; {wanted}") from None
    except ValueError:  # no signature can be had of it
        pass
    return _guarded(setting, path, function)


def number(setting: str, path: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """What a function returned, as a float. Raises ValueError where it is no number within the bounds."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if not (least <= found <= most and math.isfinite(found)):
        within = f" from {least:g} to {most:g}" if math.isfinite(least) and math.isfinite(most) else ""
        raise ValueError(f"{setting} {path} returned {str(value)[:60]}: it must return a finite number{within}")
    return found


def source_files(config: Config) -> dict[str, Path]:
    """The file that each of the settings' functions comes from, where there is one."""
    files: dict[str, Path] = {}
    for setting, path in paths_of(config).items():
        module = sys.modules[load(setting, path).__module__]
        if module.__file__ is not None:
            files[setting] = Path(module.__file__)
    return files


class _PathError(Exception):
    """The path itself is wrong, not what is behind it."""


def _module(setting: str, path: str, place: str) -> ModuleType:
    if place.endswith(".py"):
        return _from_file(setting, path, Path(place))
    parts = place.split(".")
    if not all(part.isidentifier() for part in (*parts, path.rpartition(":")[2])):
        raise _PathError(f"{setting} is {path}: a path is package.module:function or folder/file.py:function")
    if parts[0] in sys.stdlib_module_names:
        raise _PathError(f"{setting} is {path}: it names a module of Python's own, and no function for this purpose")
    if importlib.util.find_spec(parts[0]) is None:
        # The working directory, last: nothing there may stand in for a library.
        beside = Path(*parts).with_suffix(".py")
        if beside.is_file():
            return _from_file(setting, path, beside)
        raise _PathError(
            f"{setting} is {path}: there is no module '{parts[0]}' on Python's path, and no {beside} in "
            f"{os.getcwd()}; set PYTHONPATH, or give the file itself, as in my/file.py:function"
        )
    return importlib.import_module(place)


def _from_file(setting: str, path: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise _PathError(f"{setting} is {path}: there is no file {file}")
    file = file.resolve()
    # Under a name that no library has; the same on every rank, as objects of its classes travel between them.
    name = f"mstar_user_{file.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _guarded(setting: str, path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            about = next((f" on query {id}" for each in arguments if (id := _query_id(each)) is not None), "")
            where = "(MSTAR_TRACEBACK=1 shows where)"
            raise ValueError(f"{setting} {path} failed{about}: {_words(error)} {where}") from error

    call.__module__ = getattr(function, "__module__", None) or type(function).__module__
    return call


def _query_id(value: object) -> str | None:
    query = getattr(value, "query", value)
    id = getattr(query, "id", None)
    return id if isinstance(id, str) else None


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _signature(function: Callable[..., Any]) -> str:
    names = list(inspect.signature(function).parameters)
    return f"({', '.join(names)})" if names else "no arguments"


def named_by_user(values: Mapping[str, Any]) -> None:
    """Note the function paths among settings (dotted name -> value) that the user gave."""
    allow(value for setting, value in values.items() if setting in CONTRACTS and is_path(value))
