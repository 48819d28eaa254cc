"""What is printed: text of data never steers the terminal, nor changes the order in which a line is read."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from typing import TextIO

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what changes the direction of reading
    "\u2028\u2029\ud800-\udfff\U000e0000-\U000e007f]"  # line separators, half characters, tags
)


def visible(text: str) -> str:
    """The text with characters that act instead of being seen written as ``\\x1b`` or ``\\u202e``."""
    return _STEERING.sub(_escaped, text)


def one_line(text: str) -> str:
    """:func:`visible`, newlines and tabs too: for an id or a name inside a line of ours."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def say(text: object, file: TextIO | None = None) -> None:
    """Print :func:`visible` text and a newline, to standard output if no file is given, at once."""
    stream = sys.stdout if file is None else file
    encoding = stream.encoding or "utf-8"
    shown = visible(str(text)).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)


def is_main() -> bool:
    """Whether this process is rank 0 of its job, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def tame_logging() -> None:
    """Warnings, Python's too, of a program that sets up no logging of its own are printed as :func:`say` does."""
    warnings.formatwarning = _visible_warning
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Visible())


_plain_warning = warnings.formatwarning


def _visible_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return visible(_plain_warning(message, category, filename, lineno, line))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
