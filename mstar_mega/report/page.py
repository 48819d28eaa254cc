"""What every page is made of: a template with its policy, text that stays text, numbers, figures and tables.

No network, no other file: plots are inline SVG, images are data URLs, and the page's policy forbids anything else.
Every text of a run is data (escaped here, ``textContent`` in the browser): a response may well be HTML.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mstar_mega.report.drawing import Plot
from mstar_mega.report.progress import clock


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


def number_text(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def time_text(seconds: float | None) -> str:
    """A duration as clocks show it; a dash where there is none."""
    return "–" if seconds is None else clock(seconds)


def script_json(value: object) -> str:
    """JSON inside a script element: no ``<`` that could end it, no line separators old parsers trip over."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def figure(plot: Plot) -> str:
    """A plot with its title and caption. To those who do not see it, it is a picture whose name says what it shows."""
    name = f"{plot.title}. {plot.described}" if plot.described else plot.title
    return (
        f'<figure id="plot-{escape(plot.name)}"><h3>{escape(plot.title)}</h3><div role="img" '
        f'aria-label="{escape(name)}">{plot.svg}</div><figcaption>{escape(plot.caption)}</figcaption></figure>'
    )


def empty(text: str) -> str:
    """A paragraph for what is not there."""
    return f'<p class="empty">{escape(text)}</p>'


def table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself where it is wide, by keyboard too. ``head`` is text, the cells are markup; the
    first cell of a row names it. ``label`` is what those hear who do not see it; ``kind``: a class."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    of_kind = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table{of_kind}>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
