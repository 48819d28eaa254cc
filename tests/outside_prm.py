"""Responses that a PRM from outside scores, and a plain reference for its scores: every response alone, by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image

from mstar_mega.data.types import Group, ImageRef, Query, Response, image_digest
from mstar_mega.generation.engine import Sample
from mstar_mega.models.description import family_from_hf
from mstar_mega.models.families.base import Family
from mstar_mega.models.inference import inference, run_packed
from mstar_mega.models.packing import Prompt, pack
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.rollouts import to_response
from mstar_mega.rewards.reader import PRM

TEXTS = [
    "Row 1: 3, 4.\n\nThe sum is 3 + 4 = 7.\n\n# Answer\n\n7",
    "\n 5 + \u00e9\n\n \n6 is 11 \n\n\n# Answer\n\n11\n",
    "one step only<cut>",
    " \n",
]


def queries(folder: Path, count: int = 2) -> list[Query]:
    """Questions, the first about a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    if not (folder / "a.png").exists():  # ranks that share the folder only read it
        Image.fromarray(pixels).save(folder / "a.png")
    image = ImageRef(str(folder / "a.png"), image_digest((folder / "a.png").read_bytes()))
    return [Query(f"q{i}", "Which digit is the largest?", (image,) if i == 0 else (), "7") for i in range(count)]


def written(job: Job, folder: Path, texts: Sequence[str] = TEXTS) -> list[Group]:
    """Groups of responses as the policy would have sampled them."""

    def response(i: int, text: str) -> Response:
        tokens, is_cut = job.family.response_tokens(text.removesuffix("<cut>")), text.endswith("<cut>")
        tokens = tokens[:-1] if is_cut else tokens
        return to_response(job, i, Sample(tokens, [-0.5] * len(tokens), is_cut))

    return [Group(query, [response(i, text) for i, text in enumerate(texts)]) for query in queries(folder)]


def step_scores(groups: Sequence[Group]) -> list[list[list[float | None]]]:
    return [[[step.score for step in response.steps] for response in group.responses] for group in groups]


@dataclass
class ByHand:
    """The reference: no packing, no shared prompts, none of our tokenizer's offsets."""

    prm: PRM
    directory: Path

    def encode(self, text: str) -> list[int]:
        tokenizer = tokenizers.Tokenizer.from_file(str(self.directory / "model/tokenizer.json"))
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def word(self, text: str) -> int:
        """A text's token; before it may stand the space that some tokenizers put in front of every text."""
        *first, last = self.encode(text)
        assert all(self.decode([id]) == "" for id in first)
        return last

    def decode(self, ids: list[int]) -> str:
        return self.family.tokenizer.decode(ids)

    @functools.cached_property
    def family(self) -> Family:
        return family_from_hf(self.directory / "model")

    def covering(self, ids: list[int], text: str) -> int:
        """So many tokens are the fewest that spell the text."""
        return next(n for n in range(1, len(ids) + 1) if self.decode(ids[:n]).startswith(text))

    def within(self, ids: list[int], text: str) -> int:
        """So many tokens are the most that spell no more than the text."""
        return max(n for n in range(len(ids) + 1) if text.startswith(self.decode(ids[:n])))

    def hidden(self, query: Query, ids: list[int]) -> torch.Tensor:
        """[response tokens, hidden] of one prompt with one response, as one sequence."""
        prompt = self.family.prompt(query)
        whole = Prompt(prompt.tokens + ids, prompt.image_positions, prompt.pixels, prompt.grids)
        with inference(self.prm.model):
            hidden = run_packed(self.prm.model, pack([whole], [[]], 1, self.prm.model.rope.regimes))
        assert hidden is not None
        return hidden[len(prompt.tokens) : len(whole.tokens)]

    def by_words(self, query: Query, ids: list[int], ends: list[int], good: int, bad: int) -> list[float]:
        logits = self.prm.model.logits(self.hidden(query, ids)[[end - 1 for end in ends]])
        return torch.softmax(logits[:, [good, bad]], 1)[:, 0].tolist()


STARTS = [[0, 14, 37], [0, 11, 22]]
"""Where the steps of the first two texts begin; their own text ends so many characters further on."""
STOPS = [[12, 35, 48], [7, 18, 34]]


def check(found: Sequence[Group], wanted: Sequence[Sequence[Sequence[float]]]) -> None:
    seen: list[float] = []
    for group, expected in zip(found, wanted, strict=True):
        for response, scores in zip(group.responses, expected, strict=False):
            assert [step.score for step in response.steps] == pytest.approx(list(scores), abs=1e-5)
            seen += scores
        assert not group.responses[3].steps and group.responses[3].score is None
    assert max(seen) - min(seen) > 0.01, "scores that are all alike show nothing"


def cut_into_words() -> None:
    """The places above are those of the texts."""
    for text, starts, stops in zip(TEXTS, STARTS, STOPS, strict=False):
        assert [text[a:b].strip() for a, b in zip(starts, stops, strict=True)][-1].startswith("# Answer")
        assert all(text[b : b + 1] in ("\n", " ", "") and not text[b - 1].isspace() for b in stops)
