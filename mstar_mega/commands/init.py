"""``mstar init``: a config of one's own, from one that comes with the program."""

from __future__ import annotations

import argparse
from pathlib import Path

from mstar_mega.commands import Command
from mstar_mega.commands.arguments import Parser
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.platform.terminal import is_main, say
from mstar_mega.settings.shipped import first_comment, shipped, shipped_names


def init(command: Command, arguments: list[str]) -> None:
    """``mstar init NAME [FILE]``. Raises ValueError for an unknown name, and where the file is there already."""
    names = shipped_names()
    width = max(map(len, names))
    listed = "\n".join(f"  {name:<{width}}  {first_comment(name)}" for name in names)
    parser = Parser(command, f"{command.prog} NAME [FILE]", f"NAME is one of:\n{listed}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", metavar="NAME", help="the config to copy")
    parser.add_argument("file", metavar="FILE", nargs="?", help="where to write it (NAME.yaml in this folder)")
    options = parser.parse_args(arguments)
    text = shipped(options.name).read_text(encoding="utf-8")
    file = Path(options.file or f"{options.name}.yaml")
    if not is_main():
        return
    if file.is_dir():
        file = file / f"{options.name}.yaml"
    if file.exists():
        raise ValueError(f"{file} is there already: it stays as it is; give another FILE")
    write_text_atomic(file, text)
    say(f"{file}: edit it, then mstar evolve --config {file}")
