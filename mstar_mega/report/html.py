"""``report.html``: one self-contained page about a run, made from its directory at any moment of the run.

page.py has what it is made of, headline.py and iterations.py its numbers, plots.py its plots, samples.py its queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

from mstar_mega.platform.files import write_text_atomic
from mstar_mega.report.headline import facts, status, story, tiles
from mstar_mega.report.iterations import iteration_table, skipped
from mstar_mega.report.page import count, empty, escape, figure, fill, script_json
from mstar_mega.report.plots import all_plots
from mstar_mega.report.prm import prm_section
from mstar_mega.report.run import Run, load_run
from mstar_mega.report.samples import Samples, collect_samples
from mstar_mega.report.summary import summarize

T = TypeVar("T")

REPORT_FILE = "report.html"
TEMPLATE = Path(__file__).with_name("template.html")
MOST_NOTICES = 20
"""Damaged files named one by one."""


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write ``report.html`` into a run directory, or the page as ``out``, atomically; returns its path.

    Works on a directory of any state: what is missing is left out, what is damaged is named in a notice on the page.
    Raises ValueError where there is no such directory.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: give the run directory (run.dir) of a started run.")
    path = directory / REPORT_FILE if out is None else Path(out)
    write_text_atomic(path, render(load_run(directory)))
    return path


def render(run: Run) -> str:
    """The page as text; equal run directories give equal pages."""
    problems = [*run.problems, *_lost_events(run)]
    safe = _Sections(problems)
    nothing = Run(run.directory, {}, "", [])
    summary = safe.make("the summary", lambda: summarize(run), summarize(nothing))
    samples = safe.make("the sample queries", lambda: collect_samples(run), Samples())
    problems += samples.problems
    fields = {
        "name": escape(run.directory.resolve().name),
        "status": safe.make("the status", lambda: status(run)),
        "facts": safe.make("the facts", lambda: facts(run, summary)),
        "tiles": safe.make("the headline numbers", lambda: tiles(run, summary)),
        "story": safe.make("the story", lambda: "".join(f"<li>{escape(each)}</li>" for each in story(run, summary))),
        "plots": "".join(figure(plot) for plot in all_plots(run, problems)) or empty("No measurements yet."),
        "prm": safe.make("the process reward model", lambda: prm_section(run))
        or empty("No process reward model has been measured yet."),
        "iterations": safe.make("the table of iterations", lambda: iteration_table(run)),
        "samples_note": _samples_note(samples),
        "samples": script_json({"images": samples.images, "notes": samples.notes, "iterations": samples.iterations}),
        "skipped": safe.make("the list of what was skipped", lambda: skipped(run)),
        "settings": escape(run.settings_text) or "No settings yet.",
    }
    return fill(TEMPLATE, {**fields, "notices": _notices(problems)})


class _Sections:
    """Parts of the page: one that fails is named in ``problems`` and never takes the page with it."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems

    def make(self, name: str, make: Callable[[], T], instead: T | None = None) -> T:
        """What ``make`` returns, or ``instead`` (an empty text) where it fails."""
        try:
            return make()
        except Exception as error:  # the log may hold anything
            self.problems.append(f"{name} cannot be shown ({type(error).__name__}: {error})")
            return instead if instead is not None else cast(T, "")


def _lost_events(run: Run) -> list[str]:
    return [f"an event is lost: {event.get('problem')}" for event in run.of("damaged")]


def _notices(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems[:MOST_NOTICES])
    if len(problems) > MOST_NOTICES:
        items += f"<li>and {count(len(problems) - MOST_NOTICES)} more</li>"
    return f'<section class="notice" role="alert"><h2>Damaged or missing files</h2><ul>{items}</ul></section>'


def _samples_note(samples: Samples) -> str:
    if not samples.iterations:
        return "No responses yet."
    note = "A fixed sample of each iteration's queries."
    if samples.left_out:
        note += f" {samples.left_out} more sampled queries were left out to keep this file small."
    return note
