"""easy-VQA: 48,248 published questions about 5,000 pictures of one coloured shape each, from its package.

The package says nothing about a picture but questions with answers; its shape and colour follow from them. For a small
seed set of the labelled questions the reasoning is written out by rule: name the shape and its colour, compare with
what is asked for. The published test split is the test set; validation, unlabelled and labelled questions are cut from
the training split, by picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mstar_mega.config import DataConfig
from mstar_mega.data.prompts import EASY_VQA, Template, render, template_of
from mstar_mega.data.types import ImageRef, Query, Task, image_digest
from mstar_mega.kernels.noise import key_of

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class Asked:
    """One question of the package."""

    number: int
    """Its place in its split."""
    question: str
    answer: str
    image: int

    @property
    def kind(self) -> str:
        """What the answer is."""
        return "shape" if self.answer in SHAPES else "colour" if self.answer in COLOURS else "yes or no"


def build(config: DataConfig, dir: Path, seed: int) -> Task:
    """The task; nothing is written. The sets ignore ``seed``.

    Raises ValueError where the package is missing or a set asks for more questions than there are.
    """
    train, train_images = _load("train")
    test, test_images = _load("test")
    seen = _pictures(train)
    by_image: dict[int, list[Asked]] = defaultdict(list)
    for asked in train:
        by_image[asked.image].append(asked)
    # Whole pictures to validation, then to the unlabelled prompts; what is left is the labelled part.
    validation = _take(by_image, config.validation_queries, "validation")
    hidden = _take(by_image, config.unlabelled_queries or 0, "unlabelled")
    rest = _ordered((asked for many in by_image.values() for asked in many), "labelled")
    labelled = rest[: config.labelled_queries]
    warmup = _ordered((asked for asked in rest if asked.image in seen), "warm-up")[: config.warmup_examples]
    if config.test_queries > len(test):
        raise ValueError(f"data.test_queries is {config.test_queries}: the published test split has {len(test)}")
    chosen = _ordered(test, "test")[: config.test_queries]
    refs = {"train": _refs(train_images), "test": _refs(test_images)}

    template = template_of(config.template or config.name)

    def queries(many: Sequence[Asked], split: str = "train", hide: bool = False) -> list[Query]:
        return [_query(asked, split, refs[split][asked.image], template, config.instruct, hide) for asked in many]

    chains = [chain_of_thought(asked, *seen[asked.image]) for asked in warmup]
    return Task(
        warmup=list(zip(queries(warmup), chains, strict=True)),
        labelled=queries(labelled),
        unlabelled=queries(hidden, hide=True),
        validation=queries(validation),
        test=queries(chosen, "test"),
    )


def _take(by_image: dict[int, list[Asked]], count: int, name: str) -> list[Asked]:
    """Remove pictures from ``by_image``, in the order of their hashes, until they have ``count`` questions."""
    taken: list[Asked] = []
    for image in sorted(by_image, key=lambda image: key_of("easy_vqa", image)):
        if len(taken) >= count:
            return taken[:count]
        taken += by_image.pop(image)
    raise ValueError(f"data.{name}_queries is {count}: the training split has only {len(taken)} left: ask for fewer")


def _ordered(questions: Iterable[Asked], name: str) -> list[Asked]:
    return sorted(questions, key=lambda asked: key_of("easy_vqa", name, asked.number))


def chain_of_thought(asked: Asked, colour: str, shape: str) -> str:
    """The written-out reasoning about a picture of a ``colour`` ``shape``, with the published answer."""
    steps = [f"a {colour} {shape}"]
    words = asked.question.rstrip("?").split()
    if asked.kind == "yes or no":
        named = next(word for word in words if word in SHAPES or word in COLOURS)
        found = shape if named in SHAPES else colour
        steps.append(f"{found} is {'' if found == named else 'not '}{named}")
        if "not" in words or "no" in words:
            steps.append("asked if not")
    return "\n\n".join((*steps, EASY_VQA.marker, asked.answer))


def _pictures(questions: Iterable[Asked]) -> dict[int, tuple[str, str]]:
    """(colour, shape) of every picture whose questions tell both."""
    told: dict[int, dict[str, str]] = defaultdict(dict)
    for asked in questions:
        if asked.kind == "yes or no":
            continue
        told[asked.image][asked.kind] = asked.answer
        for word in asked.question.rstrip("?").split():  # "what color is the circle?", "what is the blue shape?"
            if word in SHAPES or word in COLOURS:
                told[asked.image]["shape" if word in SHAPES else "colour"] = word
    return {image: (has["colour"], has["shape"]) for image, has in told.items() if len(has) == 2}


def _load(split: str) -> tuple[list[Asked], dict[int, str]]:
    try:
        import easy_vqa
    except ImportError:
        raise ValueError("data.name 'easy_vqa' needs the package easy-vqa: pip install easy-vqa==1.0") from None
    texts, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    asked = [Asked(i, *each) for i, each in enumerate(zip(texts, answers, images, strict=True))]
    return asked, paths


def _refs(paths: dict[int, str]) -> dict[int, ImageRef]:
    return {image: ImageRef(path, image_digest(Path(path).read_bytes())) for image, path in sorted(paths.items())}


def _query(asked: Asked, split: str, image: ImageRef, template: Template, instruct: bool, hide: bool) -> Query:
    return Query(
        id=f"easy-vqa-{split}-{asked.number:05d}",
        question=render(template, asked.question, instruct=instruct),
        images=(image,),
        answer=None if hide else asked.answer,
        kind=asked.kind,
        hidden_answer=asked.answer if hide else None,
    )
