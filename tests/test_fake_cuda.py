"""The paths of a GPU rehearsed without one: every tensor where it should be, and no wait inside a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from fake_cuda import CUDA, moved, on_fake_cuda
from launches import kernels_watched

from mstar_mega.config import GenerationConfig
from mstar_mega.generation import drawing, runner, scheduler
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.generation.replay import Straight
from mstar_mega.kernels import decode_attention, decode_layer
from mstar_mega.models.inference import inference, run_packed
from mstar_mega.models.packing import next_token_targets, pack, step_index

pytestmark = [
    pytest.mark.usefixtures("job_of_one"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no rehearsal"),
]
VOCABULARY: Any = SimpleNamespace(stop_tokens=frozenset(), banned_tokens=[6, 7])
MOST_COPIES = {"prefill and first tokens": 16, "rows of a step": 2, "step": 0}
"""Copies from the host (rows: one, and one more where a bucket is recorded); the numbers may only fall."""


@pytest.fixture(params=["float32", "bfloat16"])
def precision(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_a_stream_of_requests(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    model = tiny.build(precision=precision)[0]
    for user in (decode_attention, decode_layer, drawing):
        monkeypatch.setattr(user, "uses_triton", lambda kernel, tensor: True)
    monkeypatch.setattr(runner, "fits", lambda queries: True)
    monkeypatch.setattr(scheduler, "slab_tokens", lambda model, wanted, own, device: wanted)
    monkeypatch.setattr("mstar_mega.generation.engine.replay_for", lambda device: Straight())
    wanted = [
        Request(tiny.prompt(i, 20 + i, tiles=1), [SampleSpec(10 * i + j, temperature=0.5) for j in range(4)])
        for i in range(3)
    ]
    copies: dict[str, list[int]] = {name: [] for name in MOST_COPIES}
    with on_fake_cuda(monkeypatch) as (mode, traffic), kernels_watched(run=False):
        moved(model, mode)
        engine = Engine(model, VOCABULARY, GenerationConfig(max_new_tokens=4, slots=8), 0)
        assert engine.device == CUDA and engine.lag == 1

        def watched(part: str, method: str, owner: Any) -> None:
            real = getattr(owner, method)

            def run(self: Any, *arguments: Any) -> Any:
                before = traffic.copies.total()
                found = real(self, *arguments)
                copies[part].append(traffic.copies.total() - before)
                return found

            monkeypatch.setattr(owner, method, run)

        watched("prefill and first tokens", "_admit", scheduler.Schedule)
        watched("rows of a step", "run_over", runner.Runner)
        watched("step", "step", runner.Runner)
        drawn = engine.generate(wanted, 1.0)
    assert [[len(sample.tokens) for sample in samples] for samples in drawn] == [[4] * 4] * 3
    for part, most in MOST_COPIES.items():
        assert copies[part] and max(copies[part]) <= most, (part, copies[part])


@pytest.mark.parametrize("head", ["vocabulary", "linear"])
def test_training_forward_and_scoring(monkeypatch: pytest.MonkeyPatch, precision: Any, head: Any) -> None:
    model = tiny.build(precision=precision, head=head)[0]
    prompts = [tiny.prompt(i, 20 + i, tiles=i % 2) for i in range(3)]
    responses = [tiny.tokens(i, 5, 7) for i in range(3)]
    with on_fake_cuda(monkeypatch) as (mode, _):
        moved(model, mode)
        with inference(model):
            batch = pack(prompts, responses, 1, device=CUDA)
            hidden = run_packed(model, batch)
            assert hidden is not None and hidden.device == CUDA
            source, target = next_token_targets(batch, responses)
            assert source.device == target.device == CUDA
            if head == "vocabulary":
                assert model.logits(hidden[source]).device == CUDA
            else:
                steps = step_index(batch, responses, [[[2, 5], [7]]] * 3)
                assert model.step_logits(hidden, steps).device == CUDA
