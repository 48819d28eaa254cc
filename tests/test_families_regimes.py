"""Rotary positions that depend on the whole sequence's length: what may be shared, and what is computed anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mstar_mega.config import GenerationConfig
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import Prompt, next_token_targets, pack
from mstar_mega.models.rope import Rope
from mstar_mega.models.sizes import DynamicNTK, LongRope

BORDER = 24
LONG = LongRope((1.0, 1.1, 1.3, 1.5), (1.0, 3.0, 9.0, 20.0), BORDER, 1.2)
NTK = DynamicNTK(2.0, BORDER)
VOCABULARY: Any = SimpleNamespace(stop_tokens=frozenset(range(60, 78)), banned_tokens=[6, 7, 8])


pytestmark = pytest.mark.usefixtures("job_of_one")


@pytest.fixture(params=[LONG, NTK], ids=["longrope", "dynamic"])
def model(request: pytest.FixtureRequest) -> LMM:
    made = tiny.randomize(tiny.build()[0])
    made.rope = Rope(made.size.head_dim, made.size.rope_theta, request.param)
    return made


def all_logits(model: LMM, prompt: Prompt, tokens: list[int]) -> Tensor:
    """[prompt + tokens, vocab] of the sequence alone."""
    whole = Prompt(prompt.tokens + tokens, prompt.image_positions, prompt.pixels)
    with torch.no_grad():
        hidden = tiny.hidden(model, pack([whole], [[]], regimes=model.rope.regimes))
        return model.logits(hidden)[:, : model.size.vocab]


def test_frequencies_written_out() -> None:
    positions = torch.tensor([0, 5, 23, 40])
    lengths = torch.tensor([24, 25, 24, 60])
    half = torch.arange(4).double() / 4
    plain = 1e4**-half
    found = Rope(8, 1e4, LONG).angles(positions, lengths)[:, 0, 0, :4].double()
    divisors = torch.tensor([LONG.short, LONG.long, LONG.short, LONG.long]).double()
    torch.testing.assert_close(found, positions[:, None] * plain / divisors, rtol=1e-5, atol=1e-6)
    found = Rope(8, 1e4, NTK).angles(positions, lengths)[:, 0, 0, :4].double()
    base = [1e4 * max(1.0, 2.0 * n / BORDER - 1.0) ** (8 / 6) for n in lengths.tolist()]
    expected = torch.stack([p * b**-half for p, b in zip(positions.tolist(), base, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    rotated = Rope(8, 1e4, LONG).rotating(None, positions, torch.float32, lengths)  # type: ignore[arg-type]
    assert float(rotated.cos[0, 0, 0]) == pytest.approx(1.2), "cos and sin are scaled, below the border too"


def test_a_shared_prompt_gives_what_each_sequence_gives_alone(model: LMM) -> None:
    prompts = [tiny.prompt(0, 18, tiles=2), tiny.prompt(1, 9)]
    responses = [tiny.tokens(2, 3, 11, 6, 20, 0, 11), tiny.tokens(3, 4, 2)]
    batch = pack(prompts, responses, regimes=model.rope.regimes)
    copies = batch.plan.prompt_index.size(0)
    assert copies == (3 if isinstance(model.rope.scaling, LongRope) else 4), "one prompt for each regime"
    assert batch.pixels is not None and batch.pixels.size(0) == 2, "pictures are encoded once"
    source, target = next_token_targets(batch, responses)
    with torch.no_grad():
        found = model.logits(tiny.hidden(model, batch))[source, : model.size.vocab]
    assert target.tolist() == [token for group in responses for response in group for token in response]
    expected = [
        all_logits(model, prompt, response)[len(prompt.tokens) - 1 : -1]
        for prompt, group in zip(prompts, responses, strict=True)
        for response in group
        if response
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=2e-4)


def test_every_token_is_drawn_as_from_a_forward_without_cache(model: LMM) -> None:
    draft = tiny.tokens(7, 12)[0]
    requests = [
        Request(tiny.prompt(0, 18, tiles=1), [SampleSpec(key_of("r", 0, i)) for i in range(5)]),
        Request(tiny.prompt(1, 30), [SampleSpec(key_of("r", 1, i)) for i in range(3)]),
        Request(tiny.prompt(2, 16), [SampleSpec(key_of("r", 2, i), 0, n) for i, n in enumerate((2, 9, 12))], [draft]),
    ]

    def draw(**settings: Any) -> list[Any]:
        engine = Engine(model, VOCABULARY, GenerationConfig(max_new_tokens=16, **settings), 5)
        return engine.generate(requests, 1.0)

    results = draw(slots=3)
    crossed = 0
    for request, samples in zip(requests, results, strict=True):
        for spec, sample in zip(request.samples, samples, strict=True):
            given = draft[: spec.length] if spec.length else []
            start = len(request.prompt.tokens) + len(given)
            crossed += start <= BORDER < start + len(sample.tokens) - 1
            for t, (token, value) in enumerate(zip(sample.tokens, sample.log_probs, strict=True)):
                before = all_logits(model, request.prompt, given + sample.tokens[:t])[-1]
                assert value == pytest.approx(float(before.log_softmax(dim=0)[token]), abs=1e-3)
    assert crossed > 1, "no sample grew over the border"
    again = draw(slots=64, prefill_tokens=20)
    assert [[s.tokens for s in samples] for samples in again] == [[s.tokens for s in samples] for samples in results]
    assert [[s.truncated for s in samples] for samples in again] == [
        [s.truncated for s in samples] for samples in results
    ]
