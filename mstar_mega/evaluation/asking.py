"""A benchmark's problems as queries: the prompt in the benchmark's own words, the image as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mstar_mega.config import BenchmarkConfig
from mstar_mega.data.prompts import BENCHMARKS, Template, render
from mstar_mega.data.screen import MAX_BYTES, readable_image
from mstar_mega.data.types import ImageRef, Query, Skipped, image_digest
from mstar_mega.evaluation.problem import Picture, Problem
from mstar_mega.platform.files import write_bytes_atomic
from mstar_mega.platform.inputs import read_input

IMAGES = "images"
SHOWN = 3
_READY = ("{question}", "{instruction}")


@dataclass(frozen=True)
class Asked:
    """What a policy is asked."""

    problems: Sequence[Problem]
    """Without their images."""
    queries: Sequence[Query]
    without_image: Sequence[Skipped]
    """Asked without an image, and why."""
    skipped: Sequence[Skipped] = ()
    """Rows of the file that are not asked, and why."""
    notes: Sequence[str] = ()
    """What a reader of the scores must know of the file."""


def prompt_text(name: str, problem: Problem, instruct: bool) -> str:
    """The question as the policy reads it, with the options that there are under their own letters."""
    template = BENCHMARKS[name]
    if problem.ready:
        return render(replace(template, parts=_READY), problem.question, instruct=instruct)
    hint = problem.hint or _hint(template, problem)
    bare, asked = (
        render(template, problem.question, problem.options, hint=hint, context=problem.context, instruct=wanted)
        for wanted in (False, instruct)
    )
    return bare.rstrip() + asked[len(bare) :]  # the benchmarks' own prompts end without white space


def _hint(template: Template, problem: Problem) -> str:
    """The benchmark's own hint for this kind of answer."""
    kind = "choice" if problem.options else str(problem.answer_type)
    if kind == "float":
        kind = f"float {problem.precision}"
    return template.hints.get(kind, "")


def ask(
    name: str, problems: Sequence[Problem], data: Path, directory: Path, settings: BenchmarkConfig, instruct: bool
) -> Asked:
    """Queries for the problems; images inside the benchmark's file are written below ``directory``.

    Raises ValueError that counts and names problems whose image cannot be had, unless the settings ask without it.
    """
    queries: list[Query] = []
    without: list[Skipped] = []
    refs: dict[Picture, ImageRef] = {}
    for problem in problems:
        images: tuple[ImageRef, ...] = ()
        try:
            if problem.picture is None:
                raise ValueError("it has none")
            if problem.picture not in refs:
                refs[problem.picture] = _reference(problem.picture, data, directory)
            images = (refs[problem.picture],)
        except (OSError, ValueError) as error:
            without.append(Skipped(f"problem {problem.id}", problem.where, f"image: {_line(error)}"))
        answer = problem.letter if problem.options else problem.answer
        kind = next((values[0] for values in problem.groups.values() if values), "")
        text = prompt_text(name, problem, instruct)
        queries.append(Query(problem.id, text, images, answer, problem.choices, kind))
    if without and settings.without_image == "refuse":
        shown = "; ".join(f"{each.where}: {each.reason}" for each in without[:SHOWN])
        raise ValueError(
            f"{len(without)} of {len(problems)} problems have no usable image ({shown}): get the file with images, or "
            "--without_image ask"
        )
    return Asked([replace(problem, picture=None) for problem in problems], queries, without)


def _reference(picture: Picture, data: Path, directory: Path) -> ImageRef:
    """The image as a file that has been decoded to its end once. Raises OSError or ValueError where it cannot be."""
    if picture.data is not None:
        readable_image(picture.data)
        digest = image_digest(picture.data)
        path = directory / IMAGES / digest
        if not path.exists():
            write_bytes_atomic(path, picture.data)
        return ImageRef(str(path), digest)
    path = _find(picture.path or "", data if data.is_dir() else data.parent)
    content = read_input(path, MAX_BYTES)
    readable_image(content)
    return ImageRef(str(path), image_digest(content))


def _find(name: str, folder: Path) -> Path:
    """An image beside the benchmark's file, under its whole path or its bare name. Raises ValueError if outside it."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{name!r} leads out of the folder of the benchmark's file")
    for candidate in (folder / relative, folder / IMAGES / relative, folder / IMAGES / relative.name):
        if candidate.is_file():
            return candidate
    raise ValueError(f"there is no file {name!r} in {folder}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
