"""A page to look through a benchmark's questions: image, question, responses, what was read in them, verdict.

One self-contained file, like the report of a run: images are data URLs, every text is data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mstar_mega.data.pictures import DEFAULT, PictureReading
from mstar_mega.data.types import Group, ImageRef
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.report.images import NOT_SHOWN, Shown, shown_picture
from mstar_mega.report.page import count, escape, fill, percent, script_json

TEMPLATE = Path(__file__).with_name("benchmark.html")
MOST_BYTES = 24_000_000
"""Characters of all questions together, images included; what does not fit is left out and counted."""
MOST_RESPONSE = 20_000
"""Characters of one response that are shown."""


def write_page(
    path: Path,
    result: Mapping[str, Any],
    groups: Sequence[Group],
    readings: Mapping[tuple[str, int], Mapping[str, Any]],
    values: Mapping[str, Sequence[str]],
    reading: PictureReading = DEFAULT,
) -> None:
    """Write the page (atomically).

    ``result`` is what scores.json holds; ``readings`` are the lines of predictions.jsonl by (id, sample); ``values``
    are the groups that each question counts for; ``reading`` is how the policy read the pictures.
    """
    images: dict[str, Shown] = {}
    questions: list[dict[str, Any]] = []
    size, left_out = 0, 0
    for group in groups:
        question = _question(group, readings, values)
        new = {image.digest: _shown(image, reading) for image in group.query.images if image.digest not in images}
        cost = len(str(question)) + sum(len(shown.url) for shown in new.values())
        if size + cost > MOST_BYTES:
            left_out += 1
            continue
        size += cost
        images |= new
        questions.append(question)
    note = f"{count(len(questions))} questions" + (f"; {count(left_out)} more do not fit on a page" if left_out else "")
    overall, rules = result["overall"], result["rules"]
    facts = [
        f"{count(overall['correct'])} of {count(overall['total'])} right, {result['scored']}",
        f"rules: {rules['rules']}",
        f"{count(result['truncated'])} responses cut at the length limit",
        *_caveats(result),
    ]
    fields = {
        "name": escape(result["benchmark"]),
        "share": percent(overall["accuracy"]),
        "facts": escape(" · ".join(facts)),
        "tables": _measures(result["samples"]) + "".join(_table(name, rows) for name, rows in result["groups"].items()),
        "note": escape(note),
        "data": script_json(
            {
                "images": {digest: shown.url for digest, shown in images.items() if shown.url},
                "notes": {digest: shown.note for digest, shown in images.items() if shown.note},
                "questions": questions,
            }
        ),
    }
    write_text_atomic(path, fill(TEMPLATE, fields))


def _caveats(result: Mapping[str, Any]) -> list[str]:
    """What makes the figure another one than that of the whole set."""
    evaluated = result["evaluated"]
    counts = (
        (result["left_out"], "rows of the file left out"),
        (result["without_image"], "questions asked without their image"),
        (result["missing"], "questions without a response"),
    )
    limit = [] if evaluated["limit"] is None else [f"only the first {count(evaluated['limit'])} questions"]
    named = [f"{count(len(those))} {what}" for those, what in counts if those]
    return [*limit, *named, *result["notes"], f"checkpoint {evaluated['checkpoint']}", f"data {evaluated['data']}"]


def _question(
    group: Group, readings: Mapping[tuple[str, int], Mapping[str, Any]], values: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    responses = []
    for response in group.responses:
        reading = readings[group.query.id, response.index]
        responses.append(
            {
                "text": response.text[:MOST_RESPONSE],
                "extraction": reading["extraction"],
                "prediction": reading["prediction"],
                "correct": reading["correct"],
                "truncated": response.truncated,
                "score": response.score,
            }
        )
    return {
        "id": group.query.id,
        "question": group.query.question,
        "answer": group.query.answer,
        "images": [image.digest for image in group.query.images],
        "groups": list(values[group.query.id]),
        "correct": responses[0]["correct"],
        "responses": responses,
    }


def _shown(image: ImageRef, reading: PictureReading) -> Shown:
    """An image for the page; nothing where it is gone since it was asked about."""
    try:
        return shown_picture(image, reading)
    except (OSError, ValueError):
        return NOT_SHOWN


def _table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    body = "".join(
        f"<tr><td>{escape(value)}</td><td>{percent(row['accuracy'])}</td>"
        f"<td>{row['correct']} / {row['total']}</td></tr>"
        for value, row in rows.items()
    )
    return f"<table><caption>{escape(name)}</caption><tbody>{body}</tbody></table>"


def _measures(samples: Mapping[str, Any] | None) -> str:
    if not samples:
        return ""
    rows = {f"Pass@{k}": value for k, value in samples["pass_at_k"].items()}
    rows["mean of the samples"] = samples["sample_accuracy"]
    for name in ("majority_vote", "best_of_n", "weighted_vote"):
        if name in samples:
            rows[name.replace("_", " ")] = samples[name]["overall"]["accuracy"]
    body = "".join(f"<tr><td>{escape(name)}</td><td>{percent(value)}</td></tr>" for name, value in rows.items())
    return f"<table><caption>{samples['responses']} responses each</caption><tbody>{body}</tbody></table>"
