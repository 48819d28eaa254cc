"""Self-evolving training of large multimodal models (MSTaR) on megatron-core."""

import os
import sys
from typing import TYPE_CHECKING

# ``python -m`` looks for modules in the working directory first: a model's folder that somebody else has made must not
# bring its own torch.py. ``mstar`` does not look there. Before anything else is imported.
if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()] != [os.path.dirname(os.path.dirname(__file__))]:
    del sys.path[0]

from mstar_mega.platform.quiet import silence_normal_warnings

if TYPE_CHECKING:
    from mstar_mega.api import Config, Session, allow, load_config, load_run, open_session

__version__ = "0.1.0"

__all__ = ["Config", "Session", "allow", "load_config", "load_run", "open_session"]

# Before any module of this package imports megatron, which warns of what is normal without a GPU.
silence_normal_warnings()


def __getattr__(name: str) -> object:
    """The library's names (``api.py``), imported at the first use: importing the package alone stays quick."""
    from importlib import import_module

    api = import_module("mstar_mega.api") if name in __all__ else None
    if api is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
