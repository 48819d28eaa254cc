"""``mstar compare``: runs side by side."""

from __future__ import annotations

from mstar_mega.commands import Command
from mstar_mega.commands.arguments import Parser
from mstar_mega.platform.terminal import is_main, say


def compare(command: Command, arguments: list[str]) -> None:
    """``mstar compare RUN RUN ... [--out PAGE.html] [--csv FILE]``."""
    parser = Parser(
        command, epilog="Runs that differ in their seed alone count as one entry, with error bars over seeds."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs, also of running jobs")
    parser.add_argument("--out", default="compare.html", metavar="PAGE.html", help="the page (default: %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="every measurement of every run as CSV, too")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="SETTING",
        help="a setting (or a group's name and a dot) that sets no runs apart, as prm.checkpoint; may be repeated",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not is_main():
        return
    from mstar_mega.report.compare import all_pairs, estimate, read_entries
    from mstar_mega.report.compare_page import write_comparison

    entries = read_entries(options.runs, options.ignore)
    for entry in entries:
        final = estimate(entry, "evolve", "test", "greedy_accuracy")
        if final is None:
            accuracy = "no final test accuracy yet"
        else:
            error = "" if final.error is None else f" ± {100 * final.error:.1f}"
            accuracy = f"final test accuracy {100 * final.value:.1f}{error}%"
        say(f"{entry.label} (seed {entry.seeds}): {accuracy}")
    for pair in all_pairs(entries):
        error = "" if pair.error is None else f" ± {100 * pair.error:.1f}"
        verdict = "clear" if pair.is_clear else "within two standard errors"
        say(f"{pair.one} - {pair.other}: {100 * pair.difference:+.1f}{error} points, paired: {verdict}")
    for path in write_comparison(entries, options.out, options.csv):
        say(path)
