"""Settings of the queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DataName = Literal["digits", "mathv360k", "easy_vqa"]
TemplateName = Literal["digits", "mathv360k", "easy_vqa", "plain"]


@dataclass
class DataConfig:
    """The queries. ``digits`` is the built-in task, ``mathv360k`` any file of rows (docs/data.md)."""

    name: DataName | str = "digits"
    """digits, easy_vqa, mathv360k, or a function of your own that makes the task (docs/functions.md)."""
    path: str | None = None
    """The training file (mathv360k): rows of {image, question, answer} or of {id, image, conversations} as a JSON list,
    JSON lines, CSV, parquet, arrow, or a folder that Hugging Face datasets saved."""
    images: str | None = None
    """Folder that the image paths begin in; None: the folder of ``data.path``."""
    warmup_file: str | None = None
    """Written-out chains of thought for the warm-up, JSON lines of {id, response}: one's own, or the set that
    ``mstar warmup-data`` makes. None: those that come with the data (mathv360k has none)."""
    warmup_answers: bool = False
    """Warm up on the labelled queries' bare answers, where nobody has written out any reasoning (docs/data.md)."""
    dir: str | None = None
    """Where images that are made and indices of files are written; None: ``<run.dir>/data``."""
    warmup_examples: int | None = 2000
    """Questions with a written-out chain of thought, for the warm-up: at most so many of a file; null: all."""
    labelled_queries: int | None = 2048
    """At most so many of a set on disk; null: all."""
    unlabelled_queries: int | None = 512
    """Questions whose answers are hidden from training (prompt variation, paper section 5); null: all."""
    labelled_share: float = 0.5
    """Of the pictures of a mathv360k file that is labelled (the paper: half); the others' answers are hidden from
    training. 1: all, and the test queries are set aside from them too."""
    validation_queries: int = 250
    test_queries: int = 750
    bad_rows: Literal["skip", "refuse"] = "skip"
    """What becomes of unusable rows of a set on disk: left out, counted and listed, or the job refuses the file."""
    max_prompt_tokens: int = 16_384
    """A query of a set on disk with a longer prompt, image included, is left out like an unusable row, and so is one
    that the model's context does not hold together with generation.max_new_tokens."""
    conflicts: Literal["drop", "first"] = "drop"
    """Which of the rows that answer one question about one image differently is used: none, or the first."""
    workers: int = 2
    """Threads per rank that decode images ahead of the device; 0: none."""
    prefetch_mb: int = 1024
    """Most memory per rank for decoded images that wait, in MiB."""
    picture_rotation: Literal["exif", "none"] = "exif"
    """Turn pictures as their EXIF data say, as every viewer does; none: as the policies' original code reads them."""
    picture_transparency: Literal["white", "drop"] = "white"
    """What lies behind transparent pictures; drop: ignore transparency, as the original code does."""
    picture_depth: Literal["scale", "clip"] = "scale"
    """Gray of 16 bits, 32 bits or floats is scaled to 8 bits; clip: above 255 is white, as in the original code."""
    template: TemplateName | str | None = None
    """How a question becomes the text that the policy reads: the template of a named set, or a function of your own
    (docs/functions.md). None: the set's own."""
    instruct: bool = True
    """Ask for step-by-step reasons by the set's instruction (``mstar_mega/data/prompts.py``)."""
