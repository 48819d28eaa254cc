"""The decode step's kernels against their plain definitions, and the written-out layers against training's."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from kernel_cases import DEVICE, randn
from torch import Tensor

from mstar_mega.config import GenerationConfig
from mstar_mega.generation.cache import group_table
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.kernels import decode_attention as attention
from mstar_mega.kernels.decode_layer import add_rms_norm, rotate_and_store, swiglu
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.attention import bias_from_mask
from mstar_mega.models.packing import Prompt, pack
from mstar_mega.models.rope import Rope
from mstar_mega.models.sizes import DynamicNTK, LongRope

SCALINGS = {
    "plain": None,
    "longrope": LongRope((1.0, 1.1, 1.3, 1.5), (1.0, 3.0, 9.0, 20.0), 24, 1.2),
    "dynamic": DynamicNTK(2.0, 24),
}


class Endless:
    stop_tokens = frozenset(range(60, 90))
    banned_tokens = [6, 7, 8]  # noqa: RUF012


@pytest.mark.parametrize("width", [32, 96, 100])
def test_add_norm_and_swiglu(backend: str, width: int) -> None:
    for dtype, accuracy in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        x, delta, weight = (randn(5, width, seed=s).to(dtype) for s in range(3))
        for add in (None, delta):
            total = x if add is None else x + add
            wanted = torch.nn.functional.rms_norm(total.float(), (width,), weight[0].float(), 1e-5)
            inplace = x.clone()
            y = add_rms_norm(inplace, add, weight[0], 1e-5, torch.empty_like(x))
            assert torch.equal(inplace, total)
            torch.testing.assert_close(y.float(), wanted, rtol=accuracy, atol=accuracy)
        h = randn(5, 2 * width, seed=4).to(dtype)
        gate, up = h.float().chunk(2, dim=1)
        wanted = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(
            swiglu(h, torch.empty_like(x)).float(), wanted, rtol=accuracy, atol=accuracy
        )  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads", "D"), [(4, 2, 8), (3, 3, 6), (6, 1, 24)])
def test_rotate_and_store(backend: str, heads: int, kv_heads: int, D: int) -> None:
    slots, limit, rep = 5, 7, heads // kv_heads
    rows = torch.tensor([3, 0, 4, slots])
    length, prompt = torch.tensor([3, 1, 9, 7, 1, 0]), torch.tensor([4, 1, 1, 2, 11, 0])
    qkv = randn(4, kv_heads, rep + 2, D)
    cos, sin = Rope(D, 100.0).table(20, torch.float32, torch.device(DEVICE))
    k, v = torch.zeros(2, slots, kv_heads, limit, D).unbind(0)
    at = position = None
    B = 4 if backend != "torch" else 3  # a row that is no slot is the kernels' only
    if backend == "torch":
        rows, qkv = rows[:3], qkv[:3]
        own = length[rows] - 1
        at = ((rows[:, None] * kv_heads + torch.arange(kv_heads)) * limit + own[:, None]).flatten()
        position = prompt[rows] + own
    tables = (cos, sin) if position is None else (cos[position], sin[position])
    q = rotate_and_store(qkv, *tables, rows, length, prompt, k, v, at, torch.empty(B, heads, D))
    written = torch.zeros_like(k[..., 0], dtype=torch.bool)
    for b, slot in enumerate([3, 0, 4]):
        place = int(length[slot]) - 1
        angle = cos[int(prompt[slot]) + place], sin[int(prompt[slot]) + place]

        def turned(x: Tensor, angle: tuple[Tensor, Tensor] = angle) -> Tensor:
            return x * angle[0] + x.roll(D // 2, -1) * angle[1]

        torch.testing.assert_close(q[b], turned(qkv[b, :, :rep]).reshape(heads, D), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(k[slot, :, place], turned(qkv[b, :, rep]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(v[slot, :, place], qkv[b, :, rep + 1], rtol=0, atol=0)
        written[slot, :, place] = True
    assert not k[~written].any() and not v[~written].any(), "nothing else is written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "D"), [(4, 2, 8), (6, 1, 24)])
def test_decode_attention_reads_each_slots_own_length(
    backend: str, heads: int, kv_heads: int, D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_KEYS", 64)
    scale, rep, limit, capacity = 0.3, heads // kv_heads, 70, 208
    prompts = [(2 * capacity, capacity, 200), (0, capacity, 3), (3 * capacity, capacity, 65)]  # one place is empty
    group_of, slot_of = [1, 0, 0, 2, 0], [0, 2, 3, 5, 6]
    lengths = torch.tensor([1, 9, 70, 3, 9, 33, 5, 9, 0])
    B, slots = 5, 8
    q = randn(B, heads, D).to(dtype)
    kp, vp = (randn(4, kv_heads, capacity, D, seed=s).to(dtype) for s in (1, 2))
    ko, vo = (randn(slots, kv_heads, limit, D, seed=s).to(dtype) for s in (3, 4))
    rows = torch.tensor(slot_of)
    if backend == "torch":
        of = torch.tensor([prompts[g][0] // capacity for g in group_of])
        table, place = group_table(of, 4)
        prefix_length = torch.tensor([3, 0, 200, 65])
        bias = bias_from_mask(torch.arange(200) < prefix_length[:, None])
        own_bias = bias_from_mask(torch.arange(70) < lengths[rows][:, None])
        plain = attention.PlainReading(table, place, slice(0, 4), capacity, bias, slice(0, 7), rows, own_bias)
        out = attention.decode_reference(q, kp, vp, ko, vo, plain, scale)
        plain = attention.PlainReading(table, place, slice(0, 4), capacity, bias, rows, None, own_bias)
        assert torch.equal(out, attention.decode_reference(q, kp, vp, ko, vo, plain, scale))
    else:
        counts = [group_of.count(g) for g in range(3)]
        work, cuts = attention.work_items(prompts, counts, rep, kv_heads, parts=4)
        assert max(cuts) > 1
        work += [[0] * attention.FIELDS] * 3
        members = sorted(range(B), key=lambda b: group_of[b])
        reading = attention.Reading(
            torch.tensor([*slot_of, slots]), lengths, torch.tensor([*members, 0]),
            torch.tensor([*(cuts[g] for g in group_of), 0]), torch.tensor(work), torch.tensor([len(work) - 3]),
        )  # fmt: skip
        padded = torch.cat([q, q[:1]])
        scratch = torch.full((4, B + 1, heads, D), torch.nan), torch.full((4, B + 1, heads), torch.nan)
        out = attention.decode_attention(
            padded, kp.flatten(), vp.flatten(), ko, vo, reading, scale, *scratch, torch.empty_like(padded)
        )[:B]
    for b in range(B):
        start, _, length = prompts[group_of[b]]
        own = int(lengths[slot_of[b]])
        k, v = (
            torch.cat([p[start // capacity, :, :length], o[slot_of[b], :, :own]], dim=1)
            .float()
            .repeat_interleave(rep, 0)
            for p, o in ((kp, ko), (vp, vo))
        )
        weights = (q[b].float()[:, None] @ k.transpose(1, 2) * scale).softmax(-1)
        accuracy = 2e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[b].float(), (weights @ v).squeeze(1), rtol=0, atol=accuracy)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.usefixtures("job_of_one")
def test_decoding_is_the_training_forward(scaling: str) -> None:
    """Logits of every step, written out, against megatron's modules over the whole sequence, for each token anew."""
    model: Any = tiny.randomize(tiny.build()[0])
    model.rope = Rope(model.size.head_dim, model.size.rope_theta, SCALINGS[scaling])
    requests = [Request(tiny.prompt(i, 9 + 4 * i), [SampleSpec(key_of("d", i, j)) for j in range(3)]) for i in range(3)]
    drawn = Engine(model, Endless(), GenerationConfig(max_new_tokens=9, slots=4), 3).generate(requests, 0.8)
    for request, samples in zip(requests, drawn, strict=True):
        for sample in samples:
            for t, (token, found) in enumerate(zip(sample.tokens, sample.log_probs, strict=True)):
                whole = Prompt(request.prompt.tokens + sample.tokens[:t], [], None)
                with torch.no_grad():
                    hidden = tiny.hidden(model, pack([whole], [[]], regimes=model.rope.regimes))[-1:]
                    wanted = model.log_probs(hidden, torch.tensor([token]), 0.8)
                assert found == pytest.approx(float(wanted), abs=1e-5)
