"""The recipe as a library: ``import mstar_mega as mstar`` (docs/api.md).

config = mstar.load_config("smoke", run={"dir": "runs/mine"})
with mstar.open_session(config) as session:
    session.warmup()
    groups = session.generate(session.task.labelled[:8], responses=8, temperature=1.0)
    session.reward(groups)
    session.train(session.select(groups))
    accuracy = session.evaluate("validation")
    session.save()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mstar_mega import settings
from mstar_mega.config import Config
from mstar_mega.functions import allow
from mstar_mega.recipe.opening import open_job
from mstar_mega.recipe.session import Session
from mstar_mega.settings.rules import validate

__all__ = ["Config", "Session", "allow", "load_config", "load_run", "open_session"]


def load_config(*names: str | Path, **settings_of_group: Mapping[str, Any] | Any) -> Config:
    """Checked settings: of shipped configs by name or of files, in their order, then those given as keywords.

    ``load_config("smoke", seed=1, run={"dir": "runs/mine"}, selection={"rule": "my/rules.py:shortest"})``. Functions
    that are named here are named by the user (docs/functions.md).

    Raises ValueError, in one line, as the command line does.
    """
    argv = [argument for name in names for argument in ("--config", str(name))]
    for group, value in settings_of_group.items():
        fields = value.items() if isinstance(value, Mapping) else [(None, value)]
        argv += [_argument(group if field is None else f"{group}.{field}", each) for field, each in fields]
    config = settings.parse(argv, prog="load_config")
    validate(config)
    return config


def _argument(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        raise ValueError(
            f"{name} is a group of settings inside a group: write its settings as 'group.name' in the outer one"
        )
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip()
    return f"--{name}={text.removesuffix('...').strip()}"


def load_run(directory: str | Path) -> Config:
    """The settings of a run directory, to look at its policy. Functions that it names are not the user's: see
    :func:`~mstar_mega.functions.allow`. Raises ValueError where there is no run."""
    config = settings.load(directory)
    config.run.dir = str(directory)
    return config


@contextmanager
def open_session(config: Config, trains: bool = True) -> Iterator[Session]:
    """Open a run on every rank of the job (one process, or all that torchrun started): one at a time.

    ``trains=False``: only look at the newest policy of the run directory; its settings may be others.

    Raises ValueError for what the user can mend: settings, run directory, data, functions.
    """
    with open_job(config, trains=trains) as job:
        yield Session(job) if trains else Session.of_newest(job)
