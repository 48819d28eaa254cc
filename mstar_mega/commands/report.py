"""``mstar report``: the page of a run."""

from __future__ import annotations

import errno
from pathlib import Path

from mstar_mega.commands import Command
from mstar_mega.commands.arguments import Parser
from mstar_mega.platform.terminal import is_main, say
from mstar_mega.settings import CONFIG_FILE


def report(command: Command, arguments: list[str]) -> None:
    """``mstar report RUN_DIR [--out FILE]``. Raises ValueError where the directory is not that of a run."""
    parser = Parser(command)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of a run, also of a running job")
    parser.add_argument("--out", metavar="FILE", help="where the page is written (default: report.html in RUN_DIR)")
    options = parser.parse_args(arguments)
    run_dir = options.run_dir
    if not is_main():
        return
    from mstar_mega.report.html import write_report
    from mstar_mega.report.metrics import METRICS_FILE

    if Path(run_dir).is_dir() and not any((Path(run_dir) / name).exists() for name in (CONFIG_FILE, METRICS_FILE)):
        raise ValueError(
            f"{run_dir} is not the directory of a run: it has neither {CONFIG_FILE} nor {METRICS_FILE}. Give the "
            "run.dir of a started run"
        )
    try:
        say(write_report(run_dir, options.out))
    except OSError as error:
        if options.out is not None or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise ValueError(
            f"{run_dir} cannot be written to ({error.strerror}): give the page a place by --out FILE"
        ) from None
