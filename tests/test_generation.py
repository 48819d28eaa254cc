"""The coupled engine: what it draws depends on nothing but the sample, and is what the full forward says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from watched_steps import watched_steps

from mstar_mega.config import GenerationConfig
from mstar_mega.generation import capacity, scheduler
from mstar_mega.generation.engine import Engine, Request, Sample, SampleSpec
from mstar_mega.kernels.noise import counters, key_of
from mstar_mega.kernels.sampling import sample_with_logprob
from mstar_mega.models.inference import inference
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import PackedBatch, Prompt, next_token_targets, pack

LIMIT = 14
# One token in eight or so ends a sample, so lengths differ.
VOCABULARY: Any = SimpleNamespace(stop_tokens=frozenset(range(60, 125)), banned_tokens=[6, 7, 8])

pytestmark = pytest.mark.usefixtures("job_of_one")


@pytest.fixture(scope="module")
def model() -> LMM:
    return tiny.randomize(tiny.build()[0])


def make_engine(model: LMM, seed: int = 5, **settings: Any) -> Engine:
    return Engine(model, VOCABULARY, GenerationConfig(**{"max_new_tokens": LIMIT, **settings}), seed)


def make_requests(samples: int = 4) -> list[Request]:
    """Prompts of unlike length, with two tiles, without an image, with one tile, ..."""
    prompts = [tiny.prompt(i, 6 + 5 * i % 17, tiles=(2 - i) % 3 if 6 + 5 * i % 17 > 10 else 0) for i in range(6)]
    assert {p.pixels is None for p in prompts} == {True, False}
    return [
        Request(p, [SampleSpec(key_of("a test", i, j)) for j in range(samples + i % 2)]) for i, p in enumerate(prompts)
    ]


def check_same(one: Sequence[Sequence[Sample]], other: Sequence[Sequence[Sample]]) -> None:
    assert [[s.tokens for s in samples] for samples in one] == [[s.tokens for s in samples] for samples in other]
    for a, b in zip(flat(one), flat(other), strict=True):
        assert a.truncated == b.truncated
        assert a.log_probs == b.log_probs, "to the bit"


def flat(results: Sequence[Sequence[Sample]]) -> list[Sample]:
    return [sample for samples in results for sample in samples]


def next_logits(model: LMM, prompt: Prompt, tokens: list[int]) -> Tensor:
    """[len(tokens) + 1, vocab]: what follows the prompt and each token, recomputed from scratch without sharing."""
    whole = Prompt(prompt.tokens + tokens, prompt.image_positions, prompt.pixels)
    with torch.no_grad():
        hidden = tiny.hidden(model, pack([whole], [[]]))
        return model.logits(hidden[len(prompt.tokens) - 1 :])[:, : model.size.vocab]


# -- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_results_do_not_depend_on_slots_batches_order_or_company(model: LMM, temperature: float) -> None:
    requests = make_requests()
    alone = [make_engine(model).generate([request], temperature)[0] for request in requests]
    lengths = {len(sample.tokens) for sample in flat(alone)}
    assert len(lengths) > 3, "the test wants samples of many lengths"
    for slots, prefill in [(512, 16_384), (1, 16_384), (3, 1), (8, 40), (17, 60)]:
        check_same(make_engine(model, slots=slots, prefill_tokens=prefill).generate(requests, temperature), alone)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    shuffled = make_engine(model, slots=7).generate([requests[i] for i in order], temperature)
    check_same(shuffled, [alone[i] for i in order])
    one = Request(requests[3].prompt, requests[3].samples[2:3])
    check_same(make_engine(model).generate([one], temperature), [alone[3][2:3]])


def test_a_second_call_of_the_same_engine_starts_afresh(model: LMM) -> None:
    engine = make_engine(model, slots=5)
    first = engine.generate(make_requests(), 1.0)
    check_same(engine.generate(make_requests(), 1.0), first)
    assert engine.tokens_decoded == 2 * sum(len(sample.tokens) for sample in flat(first))
    assert engine.generate([], 1.0) == []
    nothing = Request(tiny.prompt(0, 5), [])
    mixed = engine.generate([nothing, make_requests()[0], nothing], 1.0)
    check_same(mixed, [[], first[0], []])


def test_greedy_is_the_argmax_of_the_full_forward(model: LMM) -> None:
    requests = make_requests(1)
    for request, samples in zip(requests, make_engine(model, slots=4).generate(requests, 0.0), strict=True):
        for sample in samples:
            logits = next_logits(model, request.prompt, sample.tokens)[:-1]
            expected = logits.clone()
            expected[:, VOCABULARY.banned_tokens] = -torch.inf
            assert sample.tokens == expected.argmax(dim=1).tolist()
            values = logits.log_softmax(dim=1)[torch.arange(len(sample.tokens)), sample.tokens]
            assert sample.log_probs == pytest.approx(values.tolist(), abs=1e-4)


def test_log_probs_are_those_of_the_training_forward(model: LMM) -> None:
    requests, temperature = make_requests(), 0.7
    drawn = make_engine(model, slots=6).generate(requests, temperature)
    tokens = [[sample.tokens for sample in samples] for samples in drawn]
    batch = pack([request.prompt for request in requests], tokens)
    source, target = next_token_targets(batch, tokens)
    with torch.no_grad():
        again = model.log_probs(tiny.hidden(model, batch)[source], target, temperature)
    generated = torch.tensor([value for sample in flat(drawn) for value in sample.log_probs])
    torch.testing.assert_close(generated, again, rtol=0, atol=1e-4)
    with torch.no_grad():
        colder = model.log_probs(tiny.hidden(model, batch)[source], target, 0.5)
    assert (generated - colder).abs().max() > 0.1, "the temperature must matter"


def test_sampling_and_training_read_the_same_logits_in_bfloat16() -> None:
    """Rounded to bfloat16, logits would make differences of 0.01 and more, and ties."""
    model = tiny.randomize(tiny.build(precision="bfloat16")[0])
    with torch.no_grad():
        hidden = tiny.hidden(model, pack([tiny.prompt(1, 40)], [[]]))
        target = torch.arange(len(hidden)) % model.size.vocab
        logits = model.logits(hidden)
        assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
        drawn = logits[:, : model.size.vocab].log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)
        torch.testing.assert_close(drawn, model.log_probs(hidden, target), rtol=1e-6, atol=1e-5)


def test_a_tokens_random_numbers_are_those_of_its_sample_and_position(model: LMM) -> None:
    """Each token drawn again by itself, from the full forward; a continued start counts its positions on."""
    requests = make_requests()
    for i, request in enumerate(requests):
        request.drafts = tiny.tokens(i, 5)
        request.samples.append(SampleSpec(key_of("continued", i), 0, 3))
    engine = make_engine(model, slots=6)
    for request, samples in zip(requests, engine.generate(requests, 0.9), strict=True):
        for spec, sample in zip(request.samples, samples, strict=True):
            start = request.drafts[0][: spec.length]
            logits = next_logits(model, request.prompt, start + sample.tokens)[len(start) : -1]
            positions = torch.arange(len(sample.tokens)) + len(start)
            again = sample_with_logprob(
                logits, temperature=0.9, banned=torch.tensor(VOCABULARY.banned_tokens), seed=engine.seed,
                counters=counters(torch.full_like(positions, spec.key), positions),
            )  # fmt: skip
            assert again.token.tolist() == sample.tokens


def test_samples_and_seeds_differ(model: LMM) -> None:
    request = make_requests(8)[0]
    drawn = make_engine(model).generate([request], 1.0)[0]
    assert len({tuple(sample.tokens) for sample in drawn}) == len(drawn)
    other = make_engine(model, seed=6).generate([request], 1.0)[0]
    assert all(a.tokens != b.tokens for a, b in zip(drawn, other, strict=True))
    twice = Request(request.prompt, [request.samples[0]] * 2)
    assert len({tuple(sample.tokens) for sample in make_engine(model).generate([twice], 1.0)[0]}) == 1


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_truncation_is_greedy(model: LMM, settings: dict[str, Any]) -> None:
    drawn = make_engine(model, **settings).generate(make_requests(2), 1.0)
    greedy = make_engine(model).generate(make_requests(2), 0.0)
    check_same(drawn, greedy)


def test_top_k_and_top_p_keep_to_the_likely_tokens(model: LMM) -> None:
    requests = make_requests()
    for settings in ({"top_k": 3}, {"top_p": 0.6}):
        ranks = []
        drawn = make_engine(model, **settings).generate(requests, 1.0)
        for request, samples in zip(requests, drawn, strict=True):
            for sample in samples:
                logits = next_logits(model, request.prompt, sample.tokens)[:-1]
                logits[:, VOCABULARY.banned_tokens] = -torch.inf
                chosen = logits.gather(1, torch.tensor(sample.tokens)[:, None])
                above = logits > chosen
                ranks += above.sum(dim=1).tolist()
                if "top_p" in settings:
                    assert (logits.softmax(dim=1) * above).sum(dim=1).max() < 0.6 + 1e-5
        assert max(ranks) == 2 if "top_k" in settings else max(ranks) > 2, "neither more nor fewer survive"


# -- ends ------------------------------------------------------------------------------------------------------------


def test_stop_tokens_end_a_sample_and_the_length_limit_truncates_it(model: LMM) -> None:
    samples = flat(make_engine(model).generate(make_requests(), 1.0))
    stopped = [sample for sample in samples if not sample.truncated]
    truncated = [sample for sample in samples if sample.truncated]
    assert stopped and truncated
    assert all(sample.tokens[-1] in VOCABULARY.stop_tokens for sample in stopped)
    assert all(len(sample.tokens) == LIMIT for sample in truncated)
    assert not any(token in VOCABULARY.stop_tokens for sample in truncated for token in sample.tokens)
    assert not any(token in VOCABULARY.stop_tokens for sample in stopped for token in sample.tokens[:-1])
    assert all(len(sample.log_probs) == len(sample.tokens) for sample in samples)


def test_a_stop_token_at_the_limit_is_not_a_truncation(model: LMM) -> None:
    free = make_engine(model).generate(make_requests(), 1.0)
    lengths = [len(sample.tokens) for sample in flat(free) if not sample.truncated]
    limit = max(set(lengths), key=lengths.count)
    for sample, short in zip(
        flat(free), flat(make_engine(model, max_new_tokens=limit).generate(make_requests(), 1.0)), strict=True
    ):
        assert short.tokens == sample.tokens[:limit], "the limit changed what is drawn"
        assert short.truncated == (len(sample.tokens) > limit)


def test_media_tokens_are_not_drawn_however_likely(model: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests()
    before = make_engine(model).generate(requests, 1.0)
    logits = LMM.logits

    def loud(self: LMM, hidden: Tensor) -> Tensor:
        raised = logits(self, hidden).clone()
        raised[:, VOCABULARY.banned_tokens] += 60.0
        raised[:, self.size.vocab :] += 60.0  # rows of the padded vocabulary are no tokens either
        return raised

    monkeypatch.setattr(LMM, "logits", loud)
    assert model.size.padded_vocab > model.size.vocab
    after = make_engine(model).generate(requests, 1.0)
    assert [s.tokens for s in flat(after)] == [s.tokens for s in flat(before)]
    assert not {*VOCABULARY.banned_tokens} & {token for sample in flat(after) for token in sample.tokens}
    greedy = flat(make_engine(model).generate(requests, 0.0))
    assert not {*VOCABULARY.banned_tokens} & {token for sample in greedy for token in sample.tokens}
    # The log-prob is over the whole vocabulary: what the training forward will say.
    assert max(value for sample in after[:1] for s in sample for value in s.log_probs) < -20


# -- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "prefill"), [(512, 16_384), (2, 30)])
def test_a_forced_start_continues_exactly(model: LMM, slots: int, prefill: int) -> None:
    requests = make_requests()
    whole = make_engine(model).generate(requests, 1.0)
    continued, expected = [], []
    for request, samples in zip(requests, whole, strict=True):
        drafts = [sample.tokens for sample in samples]
        specs, rest = [], []
        for d, (spec, sample) in enumerate(zip(request.samples, samples, strict=True)):
            last = len(sample.tokens) - 1
            for length in {0, min(1, last), last // 2, last}:
                specs.append(SampleSpec(spec.key, d if length else -1, length))
                rest.append(Sample(sample.tokens[length:], sample.log_probs[length:], sample.truncated))
        continued.append(Request(request.prompt, specs, drafts))
        expected.append(rest)
    drawn = make_engine(model, slots=slots, prefill_tokens=prefill).generate(continued, 1.0)
    assert [[s.tokens for s in samples] for samples in drawn] == [[s.tokens for s in rest] for rest in expected]
    for a, b in zip(flat(drawn), flat(expected), strict=True):
        assert a.truncated == b.truncated
        assert a.log_probs == pytest.approx(b.log_probs, abs=5e-5)


def test_continuations_of_one_start_differ_by_key(model: LMM) -> None:
    request = make_requests(1)[1]
    draft = tiny.tokens(3, 6)[0]
    continued = Request(request.prompt, [SampleSpec(key_of("b", i), 0, 4) for i in range(6)], [draft])
    (drawn,) = make_engine(model).generate([continued], 1.0)
    assert len({tuple(sample.tokens) for sample in drawn}) > 3
    assert all(len(sample.tokens) <= LIMIT - 4 for sample in drawn)
    for sample in drawn:
        logits = next_logits(model, request.prompt, draft[:4] + sample.tokens)[4:-1]
        values = logits.log_softmax(dim=1)[torch.arange(len(sample.tokens)), sample.tokens]
        assert sample.log_probs == pytest.approx(values.tolist(), abs=1e-4)


# -- work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "prefill"), [(512, 16_384), (2, 1), (3, 25)])
def test_each_image_is_encoded_and_each_prompt_prefilled_once(
    model: LMM, monkeypatch: pytest.MonkeyPatch, slots: int, prefill: int
) -> None:
    requests = make_requests()
    tiles, streams = list[int](), list[int]()
    vision = model.vision.forward
    prefilling = scheduler.run_packed

    def encode(pixels: Tensor, *grids: Tensor | None) -> Tensor:
        tiles.append(pixels.size(0))
        return vision(pixels, *grids)

    def run(model: LMM, batch: PackedBatch) -> Tensor | None:
        streams.append(int(batch.plan.prompt_allowed.sum()))
        return prefilling(model, batch)

    monkeypatch.setattr(model.vision, "forward", encode)
    monkeypatch.setattr(scheduler, "run_packed", run)
    make_engine(model, slots=slots, prefill_tokens=prefill).generate(requests, 1.0)
    assert sum(tiles) == sum(r.prompt.pixels.size(0) for r in requests if r.prompt.pixels is not None)
    assert sum(streams) == sum(len(r.prompt.tokens) for r in requests)
    most = max(prefill, max(len(r.prompt.tokens) for r in requests))
    assert max(streams) <= most, "prefill batches keep to their limit"


def test_finished_slots_are_refilled_with_waiting_work(model: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = watched_steps(monkeypatch, lambda schedule: (len(schedule.running), len(schedule.queue)))
    capacity = 6
    samples = flat(make_engine(model, slots=capacity).generate(make_requests(6), 1.0))
    lengths = [len(sample.tokens) for sample in samples]
    assert sum(count for count, _ in batches) == sum(lengths) - len(lengths), "the first token comes from the prefill"
    assert all(count == capacity for count, waiting in batches if waiting), "a slot stayed empty while work waited"
    waves = [lengths[i : i + capacity] for i in range(0, len(lengths), capacity)]
    assert len(batches) < sum(max(wave) - 1 for wave in waves), "no better than waiting for the longest of each wave"


def test_generation_leaves_the_model_as_it_was(model: LMM) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    model.train()
    make_engine(model).generate(make_requests(1), 1.0)
    assert model.training and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(RuntimeError, match="on purpose"), inference(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("on purpose")
    assert model.training and torch.is_grad_enabled()


def test_prompts_wait_for_room_in_the_slab(model: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_engine(model).generate(make_requests(), 1.0)
    longest = max(len(request.prompt.tokens) for request in make_requests())
    for room in (0, 2 * longest):
        monkeypatch.setattr(scheduler, "slab_tokens", lambda *sizes, room=room: room)
        check_same(make_engine(model, slots=9).generate(make_requests(), 1.0), expected)


def test_slots_are_as_many_as_memory_holds(model: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    per_token = capacity.bytes_per_token(model)
    assert per_token == 2 * model.size.layers * model.size.kv_heads * model.size.head_dim * 4
    found = [capacity.slots_within(free, per_token, LIMIT) for free in range(0, 10_000_000, 50_000)]
    assert found == sorted(found) and found[0] == 1 and found[-1] == capacity.MOST
    for free, slots in zip(range(0, 10_000_000, 50_000), found, strict=True):
        assert slots == 1 or slots * LIMIT * per_token <= 0.35 * free
    expected = make_engine(model).generate(make_requests(), 1.0)
    widths = watched_steps(monkeypatch, lambda schedule: len(schedule.running))
    for room, most in ((1, 1), (int(6.5 * LIMIT * per_token / 0.35), 4)):
        widths.clear()
        monkeypatch.setattr(capacity, "_CPU_BYTES", room)
        check_same(make_engine(model, slots="auto").generate(make_requests(), 1.0), expected)
        assert max(widths) == most
