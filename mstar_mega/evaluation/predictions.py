"""Files of predictions: our own, and those of the programs that people evaluate with.

| written by | file | id | response |
|---|---|---|---|
| ``mstar evaluate``, a hand | JSON lines, a list | ``id`` (``pid``, ``index``) | ``response``, ``extraction`` |
| MathVista's authors | one JSON object by ``pid`` | the key | ``response``, ``extraction`` |
| VLMEvalKit | xlsx, tsv, csv, JSON | ``index`` | ``prediction`` |
| lmms-eval (``--log_samples``) | JSON lines | that of ``doc``, else ``doc_id`` | ``resps``, else ``filtered_resps`` |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError
from zipfile import BadZipFile

from mstar_mega.data.rows import has_surrogate
from mstar_mega.evaluation.files import READABLE, Cells, json_rows, read_file

_IDS = ("id", "pid", "question_id", "index")
_TABLES = (".xlsx", ".tsv", ".csv")
_WHOLE = re.compile(r"(\d+)\.0+")


@dataclass(frozen=True)
class Prediction:
    """What is known of a policy's answer to one problem: the response, or an answer extracted elsewhere."""

    id: str
    response: str | None = None
    extraction: str | None = None


@dataclass(frozen=True)
class Predictions:
    """A file of predictions, by id, and what is odd about it."""

    by_id: Mapping[str, Prediction]
    repeated: Sequence[str] = ()
    """Ids that stand in more than one row; the first counts."""


def read_predictions(path: Path) -> Predictions:
    """The predictions of a file of one of the kinds above.

    Raises ValueError, naming file and row, for anything else; nothing is guessed about a broken prediction.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    found: dict[str, Prediction] = {}
    repeated: list[str] = []
    for cells in _rows(path):
        if cells.problem:
            raise ValueError(f"{cells.where}: {cells.problem}")
        prediction = _prediction(cells)
        if prediction.id in found:
            repeated.append(prediction.id)
        else:
            found[prediction.id] = prediction
    return Predictions(found, repeated)


def _rows(path: Path) -> Iterator[Cells]:
    if path.suffix == ".xlsx":
        return _sheet(path)
    return read_file(path) if path.suffix in READABLE else json_rows(path)


def _prediction(cells: Cells) -> Prediction:
    values = _from_table(cells.values) if cells.file.suffix in _TABLES else dict(cells.values)
    if "doc_id" in values:
        values = _from_lmms_eval(values, cells.where)
    if "response" not in values and "prediction" in values:
        values["response"] = values["prediction"]
    id = next((values[name] for name in _IDS if values.get(name) is not None), None)
    if isinstance(id, float) and id.is_integer():
        id = int(id)
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise ValueError(f"{cells.where}: it has no 'id' (nor 'pid' or 'index')")
    if "response" not in values and "extraction" not in values:
        raise ValueError(f"{cells.where}: it has neither 'response' nor 'extraction' (nor 'prediction')")
    for name in ("response", "extraction"):
        text = values.get(name)
        if not isinstance(text, (str, type(None))):
            raise ValueError(f"{cells.where}: its '{name}' is not text")
        if text and has_surrogate(text):
            raise ValueError(f"{cells.where}: its '{name}' has half a character (a lone surrogate): replace it")
    return Prediction(str(id), values.get("response"), values.get("extraction"))


def _from_table(row: Mapping[str, Any]) -> dict[str, Any]:
    """Cells as they were before a table program took numbers for numbers; an empty response is one."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        text = "" if value is None else str(value)
        values[name] = _WHOLE.sub(r"\1", text) if name in _IDS and _WHOLE.fullmatch(text) else text
    if not values.get("extraction"):
        values.pop("extraction", None)
    return {name: value for name, value in values.items() if value or name not in _IDS}


def _from_lmms_eval(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The raw response; the question's own id where the line holds it, else its place in the set, from 0."""
    nested = [value for value in (row.get("doc"), *row.values()) if isinstance(value, dict)]
    ids = (each[name] for each in nested for name in _IDS if each.get(name) is not None)
    response: Any = row.get("resps") or row.get("filtered_resps")
    while isinstance(response, list) and response:
        response = response[0]
    if not isinstance(response, str):
        raise ValueError(f"{where}: neither 'resps' nor 'filtered_resps' holds a text")
    return {"id": next(ids, row["doc_id"]), "response": response}


def _sheet(path: Path) -> Iterator[Cells]:
    """The first sheet of a workbook, whose first row names the columns."""
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        with closing(book):
            rows = iter(book.worksheets[0].iter_rows(values_only=True))
            names = ["" if name is None else str(name) for name in next(rows, ())]
            twice = [name for name, many in Counter(names).items() if many > 1 and name]
            if twice:
                raise ValueError(f"{path}: the column '{twice[0]}' stands twice in its first row: which one is meant?")
            for number, row in enumerate(rows, 1):
                if any(cell is not None for cell in row):
                    cells = [int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in row]
                    yield Cells(path, number, {n: cell for n, cell in zip(names, cells, strict=False) if n})
    except (BadZipFile, InvalidFileException, KeyError, ParseError, IndexError) as error:
        raise ValueError(f"{path}: it is no readable workbook ({str(error)[:200]})") from None
