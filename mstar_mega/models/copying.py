"""The files of a model directory that go with its weights: known names only, and nothing from outside it."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from mstar_mega.platform.inputs import must_be_inside, open_input

_KNOWN = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|video_preprocessor_config|tokenizer|"
    r"tokenizer_config|special_tokens_map|added_tokens|chat_template|vocab)\.json"
    r"|tokenizer\.model|merges\.txt|chat_template\.jinja"
    r"|(README|LICENSE|NOTICE|USE_POLICY|SECURITY|CODE_OF_CONDUCT)[A-Za-z0-9._ -]{0,40}"
    # The original's own code, which its config.json names and which nothing here runs.
    r"|[A-Za-z][A-Za-z0-9_]{0,80}\.py"
)
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|h5|msgpack|gguf|onnx)|.*\.index\.json|\..*")
"""And hidden files."""
_SHOWN = 5
_PUBLISHED = "it would be copied and published with the model"

logger = logging.getLogger(__name__)


def model_files(directory: str | Path) -> list[str]:
    """Names of a directory's configuration, tokenizer, texts and code.

    Raises ValueError for a link that leads out of the directory: what it leads to would be published with the model.
    Hugging Face's cache keeps the files themselves in ``blobs``.
    """
    directory = Path(directory)
    names = [name for name in _present(directory) if _KNOWN.fullmatch(name)]
    for name in names:
        must_be_inside(directory, directory / name, _PUBLISHED)
    return names


def copy_model_files(directory: str | Path, target: Path) -> list[str]:
    """Copy :func:`model_files` to another directory; returns the names. What else lies there is named in a warning."""
    directory = Path(directory)
    names = model_files(directory)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        with open_input(directory / name) as source, open(target / name, "wb") as copy:
            shutil.copyfileobj(source, copy)
    others = [name for name in _present(directory) if not _KNOWN.fullmatch(name) and not _WEIGHTS.fullmatch(name)]
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        logger.warning("%s: not copied, as no part of a model: %s%s", directory, ", ".join(others[:_SHOWN]), more)
    return names


def _present(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_file())
