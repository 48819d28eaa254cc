"""``report.html``: one self-contained page about a run, made from its directory at any moment of the run.

No network, no other file: plots are inline SVG, images are data URLs, and the page's policy forbids anything else.
Every text of the run is data (escaped here, ``textContent`` in the browser): a response may well be HTML.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from mstar_mega.platform.files import write_text_atomic
from mstar_mega.report.accounting import in_words, judged_responses
from mstar_mega.report.drawing import Plot
from mstar_mega.report.metrics import METRICS_FILE, Event, number
from mstar_mega.report.plots import all_plots
from mstar_mega.report.prm import prm_section, quality_in_short
from mstar_mega.report.progress import clock
from mstar_mega.report.run import Run, load_run
from mstar_mega.report.samples import Samples, collect_samples
from mstar_mega.report.summary import share_error, summarize

T = TypeVar("T")

REPORT_FILE = "report.html"
TEMPLATE = Path(__file__).with_name("template.html")
MOST_NOTICES = 20
"""Damaged files named one by one."""
MOST_SKIPPED = 200
"""Skipped items listed one by one."""


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
    empty = Run(run.directory, {}, "", [])
    summary = safe.make("the summary", lambda: summarize(run), summarize(empty))
    samples = safe.make("the sample queries", lambda: collect_samples(run), Samples())
    problems += samples.problems
    fields = {
        "name": escape(run.directory.resolve().name),
        "status": safe.make("the status", lambda: _status(run)),
        "facts": safe.make("the facts", lambda: _facts(run, summary)),
        "tiles": safe.make("the headline numbers", lambda: _tiles(run, summary)),
        "story": safe.make("the story", lambda: escape(" ".join(_story(run, summary)))),
        "plots": "".join(figure(plot) for plot in all_plots(run, problems)) or _empty("No measurements yet."),
        "prm": safe.make("the process reward model", lambda: prm_section(run))
        or _empty("No process reward model has been measured yet."),
        "iterations": safe.make("the table of iterations", lambda: _iteration_table(run)),
        "samples_note": _samples_note(samples),
        "samples": script_json({"images": samples.images, "iterations": samples.iterations}),
        "skipped": safe.make("the list of what was skipped", lambda: _skipped(run)),
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


def fill(template: Path, fields: Mapping[str, str]) -> str:
    """A page. Its policy lets only the template's own script run: a second wall behind the escaping."""
    page = template.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert "{{" not in script, "what a run says is data of the page, never part of its script"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {**fields, "script_policy": f"'sha256-{digest}'"}
    # One pass over the template: braces inside the run's own text are never taken for a field.
    filled = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], page)
    return filled.encode("utf-8", "replace").decode()


def escape(value: object) -> str:
    """Text for HTML, in attributes too."""
    return html.escape(str(value), quote=True)


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"


def count(value: float | None) -> str:
    """A whole number with thousands separators; a dash where there is none."""
    return "–" if value is None else f"{value:,.0f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else clock(seconds)


def script_json(value: object) -> str:
    """JSON inside a script element: no ``<`` that could end it, no line separators old parsers trip over."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _status(run: Run) -> str:
    if run.finished:
        return '<span class="pill done">finished</span>'
    if not run.events:
        return '<span class="pill">no events yet</span>'
    return f'<span class="pill live">unfinished: {escape(_where(run))}</span>'


def _where(run: Run) -> str:
    """What the newest event belongs to."""
    iterations = [int(i) for event in run.events if (i := number(event, "iteration"))]
    if iterations:
        return f"iteration {max(iterations)}"
    ended = [str(event.get("stage")) for event in run.of("stage")]
    return f"after {ended[-1]}" if ended else "first stage"


def _facts(run: Run, summary: dict[str, Any]) -> str:
    parallel = summary["parallel"]
    facts = [
        ("policy", " ".join(str(p) for name in ("family", "size") if (p := run.setting("model", name)) is not None)),
        ("method", str(summary["method"] or "").replace("_", " ")),
        ("seed", "" if summary["seed"] is None else str(summary["seed"])),
        ("tensor × pipeline × data", " × ".join(str(size) for size in parallel.values() if size is not None)),
        ("last event", _last_time(run)),
    ]
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts if v)


def _last_time(run: Run) -> str:
    seconds = number(run.events[-1], "time") if run.events else None
    if seconds is None or not math.isfinite(seconds):
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _lost_events(run: Run) -> list[str]:
    return [f"an event is lost: {event.get('problem')}" for event in run.of("damaged")]


def _notices(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems[:MOST_NOTICES])
    if len(problems) > MOST_NOTICES:
        items += f"<li>and {count(len(problems) - MOST_NOTICES)} more</li>"
    return f'<section class="notice" role="alert"><h2>Damaged or missing files</h2><ul>{items}</ul></section>'


def _tiles(run: Run, summary: dict[str, Any]) -> str:
    ks = _ks(run)
    accuracy, prm = summary["accuracy"], summary["prm"]
    memory = summary["peak_memory_bytes"]
    generated, selected = summary["responses_generated"], summary["responses_selected"]
    share = f" ({percent(selected / generated)})" if generated and selected else ""
    of_all = "none generated yet" if generated is None else f"of {count(generated)} generated{share}"
    tiles = [
        _change_tile("Test accuracy, greedy", accuracy["warmup"], accuracy["final"], _queries(run, "test")),
        _change_tile(
            f"Pass@{ks[0]}", summary["pass_at_k"]["start"], summary["pass_at_k"]["end"], _queries(run, "validation")
        ),
        _change_tile(
            f"Reward-Pass@{ks[1]}",
            summary["reward_pass_at_k"]["start"],
            summary["reward_pass_at_k"]["end"],
            _queries(run, "validation"),
            f"; {ks[1]} at random {percent(_newest(summary['pass_at_reward_k']))}",
        ),
        _tile("PRM, AUC within a query", *quality_in_short(prm["end"] or prm["start"] or prm["held_out"])),
        _tile("Responses selected", count(selected), of_all),
        _tile("Time", _time(summary["seconds"]["total"]), f"peak memory {memory / 2**30:.2f} GiB" if memory else ""),
    ]
    return "".join(tiles)


def _tile(label: str, value: str, note: str, kind: str = "") -> str:
    return (
        f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note {kind}">{escape(note)}</div></div>'
    )


def _newest(values: dict[str, float | None]) -> float | None:
    return values["start"] if values["end"] is None else values["end"]


def _queries(run: Run, split: str) -> float | None:
    """How many queries the newest measurement of a split had."""
    events = run.of("evaluation", split=split)
    return number(events[-1], "queries") if events else None


def _change_tile(label: str, start: float | None, end: float | None, queries: float | None, beside: str = "") -> str:
    """A figure and how it has changed; the arrow has a colour where the change is more than two standard errors."""
    if start is None and end is None:
        return _tile(label, percent(None), "")
    if start is None or end is None:
        return _tile(
            label, percent(end if start is None else start), ("warm-up policy" if start else "newest") + beside
        )
    points = 100 * (end - start)
    arrow, kind = ("▲", "up") if points > 0 else ("▼", "down") if points < 0 else ("=", "")
    errors = [share_error(share, queries) for share in (start, end)]
    if abs(end - start) <= 2 * math.hypot(*(error or 0.0 for error in errors)):
        kind = ""
    return _tile(label, percent(end), f"{arrow} {abs(points):.1f} from {percent(start)}{beside}", kind)


def _ks(run: Run) -> tuple[object, object]:
    """K of Pass@K and of Reward-Pass@K, as measured or, before that, as set."""
    values = []
    for key, setting in (("k", "k"), ("reward_k", "reward_k")):
        seen = [event[key] for event in run.of("evaluation") if event.get(key) is not None]
        values.append(seen[-1] if seen else run.setting("evaluation", setting) or "K")
    return values[0], values[1]


def _story(run: Run, summary: dict[str, Any]) -> list[str]:
    """What happened, in a few sentences; each only where its numbers exist."""
    start, end = summary["accuracy"]["warmup"], summary["accuracy"]["final"]
    generation, iterations = run.of("generation"), len(run.of("improve"))
    story = []
    if start is not None:
        story.append(f"The warm-up policy answers {percent(start)} of the test queries correctly.")
    if start is not None and end is not None:
        error = math.hypot(*(_test_error(run, stage) for stage in ("warmup", "evolve")))
        rounds = f"{iterations} iteration{'s' * (iterations != 1)}"
        story.append(
            f"After {rounds} of self-evolving training ({str(summary['method']).replace('_', ' ')}) it is "
            f"{percent(end)}: {100 * (end - start):+.1f} points, with a combined standard error of {100 * error:.1f}."
        )
    if generation:
        responses = summary["responses_generated"] or 0
        correct = sum(number(event, "correct") or 0.0 for event in generation)
        judged = sum(judged_responses(event) or 0.0 for event in generation)
        temperatures = [t for t in summary["temperatures"] if t is not None]
        low, high = min(temperatures, default=0.0), max(temperatures, default=0.0)
        story.append(
            f"{count(responses)} responses were sampled at temperature {low:g}{f' to {high:g}' if high > low else ''}; "
            f"{percent(correct / judged if judged else None)} of those with a known answer were correct, and "
            f"{count(summary['responses_selected'])} were selected for training."
        )
        without = summary["queries_without_correct_response"]
        story.append(f"{count(without)} queries had no correct response among theirs.")
    if generation or run.of("annotation"):
        text = in_words(summary["generated"])
        story.append(f"{text[0].upper()}{text[1:]}.")
    if (vote := summary["vote"]) is not None:
        story.append(
            f"Pseudo answers by vote were right for {percent(vote['accuracy'])} of {count(vote['answers_known'])} "
            "unlabelled queries; what agrees with them is not counted as correct here."
        )
    if summary["log_prob_gap_max"] is not None:
        limits = [limit for event in run.of("log_prob_gap") if (limit := number(event, "limit")) is not None]
        story.append(
            f"Generation and training agree on log-probabilities within {summary['log_prob_gap_max']:.2g}"
            + (f" (limit {limits[-1]:g})." if limits else ".")
        )
    empty = [event.get("iteration") for event in run.of("selection") if not number(event, "selected")]
    if empty:
        story.append(f"Nothing was selected in iteration {', '.join(map(str, empty))}.")
    return story or ["Nothing has been measured yet."]


def _test_error(run: Run, stage: str) -> float:
    events = run.of("evaluation", stage=stage, split="test")
    return (number(events[-1], "standard_error") or 0.0) if events else 0.0


def figure(plot: Plot) -> str:
    """A plot with its title and caption."""
    return (
        f'<figure id="plot-{escape(plot.name)}"><h3>{escape(plot.title)}</h3><div role="img" '
        f'aria-label="{escape(plot.title)}">{plot.svg}</div><figcaption>{escape(plot.caption)}</figcaption></figure>'
    )


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'


def _iteration_table(run: Run) -> str:
    iterations = [number(event, "iteration") for event in run.events if event["event"] != "step"]
    rows = sorted({int(i) for i in iterations if i is not None})
    if not rows:
        return _empty("No iteration has been measured yet.")
    ks = _ks(run)
    table = [_iteration_cells(run, iteration, ks) for iteration in rows]
    names = [name for name in table[0] if any(row[name] != "–" for row in table)]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(row[name])}</td>" for name in names) + "</tr>" for row in table)
    key = (
        "Correct, trunc(ated), no steps: shares of the responses. None correct: queries without a correct response. "
        "Selected: responses."
    )
    note = f'<p class="key">{key}</p>' if "resp." in names else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _iteration_cells(run: Run, iteration: int, ks: tuple[object, object]) -> dict[str, str]:
    def last(name: str, **fields: Any) -> Event:
        events = run.of(name, iteration=iteration, **fields)
        return events[-1] if events else {}

    validation, test = last("evaluation", split="validation"), last("evaluation", split="test")
    generation, selection, improve = last("generation"), last("selection"), last("improve")
    responses = number(generation, "responses")

    def share(key: str) -> str:
        value = number(generation, key)
        of = judged_responses(generation) if key == "correct" else responses
        return percent(value / of if value is not None and of else None)

    return {
        "iteration": str(iteration) if iteration else "warm-up",
        "test accur.": percent(number(test, "greedy_accuracy")),
        "valid. accur.": percent(number(validation, "greedy_accuracy")),
        f"Pass@{ks[0]}": percent(number(validation, "pass_at_k")),
        f"Reward-Pass@{ks[1]}": percent(number(validation, "reward_pass_at_k")),
        f"{ks[1]} at random": percent(number(validation, "pass_at_reward_k")),
        "temp.": _number(number(generation, "temperature")),
        "queries": count(number(generation, "queries")),
        "resp.": count(responses),
        "correct": share("correct"),
        "trunc.": share("truncated"),
        "no steps": share("without_steps"),
        "none correct": count(number(generation, "queries_without_correct")),
        "selected": count(number(selection, "selected")),
        "steps": count(number(improve, "steps")),
        "loss": _number(number(improve, "loss")),
        "log-p. gap": _number(number(last("log_prob_gap"), "largest"), 2),
        "generate": _time(number(generation, "seconds")),
        "score": _time(number(generation, "score_seconds")),
        "improve": _time(number(improve, "seconds")),
    }


def _samples_note(samples: Samples) -> str:
    if not samples.iterations:
        return "No responses yet."
    note = "A fixed sample of each iteration's queries."
    if samples.left_out:
        note += f" {samples.left_out} more sampled queries were left out to keep this file small."
    return note


def _skipped(run: Run) -> str:
    events = run.of("skipped")
    if not events:
        return _empty("Nothing was skipped.")
    reasons = Counter(str(event.get("reason")) for event in events).most_common()
    totals = ", ".join(f"{count(n)} × {escape(reason)}" for reason, n in reasons[:MOST_NOTICES])
    if len(reasons) > MOST_NOTICES:
        totals += f", and {count(len(reasons) - MOST_NOTICES)} more reasons"
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(event.get(key, '–'))}</td>" for key in ("what", "where", "reason")) + "</tr>"
        for event in events[:MOST_SKIPPED]
    )
    more = len(events) - MOST_SKIPPED
    rest = _empty(f"{count(more)} more are listed in {METRICS_FILE}.") if more > 0 else ""
    head = "<thead><tr><th>what</th><th>where</th><th>reason</th></tr></thead>"
    return f'<p>{totals}</p><div class="scroll"><table class="text">{head}<tbody>{body}</tbody></table></div>{rest}'
