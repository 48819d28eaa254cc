"""The decode step's kernels in C: the same function as the plain definitions, made once, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from kernel_cases import randint, randn
from torch import Tensor

from mstar_mega.config import GenerationConfig, KernelsConfig
from mstar_mega.generation.engine import Engine, Request, SampleSpec
from mstar_mega.kernels import configure, forced_backend, native
from mstar_mega.kernels import decode_attention as attention
from mstar_mega.kernels.decode_layer import add_rms_norm, rotate_and_store, swiglu
from mstar_mega.kernels.dispatch import native_for
from mstar_mega.kernels.noise import key_of
from mstar_mega.kernels.sampling import allowed_ids, draw_rows
from mstar_mega.models.rope import Rope

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    configure(KernelsConfig())
    yield
    configure(KernelsConfig())


def near(found: Tensor, wanted: Tensor, accuracy: float = 1e-6) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("width", [7, 24, 32, 100])
def test_norm_and_swiglu(width: int) -> None:
    x, delta, weight = (randn(5, width, seed=seed) for seed in range(3))
    for add in (None, delta):
        total = x if add is None else x + add
        inplace = x.clone()
        y = add_rms_norm(inplace, add, weight[0], 1e-5, torch.empty_like(x))
        assert torch.equal(inplace, total)
        near(y, torch.nn.functional.rms_norm(total.double(), (width,), weight[0].double(), 1e-5))
    h = 30 * randn(5, 2 * width, seed=4)
    gate, up = h.double().chunk(2, dim=1)
    near(swiglu(h, torch.empty(5, width)), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(("heads", "kv_heads", "D"), [(4, 2, 8), (3, 3, 6), (6, 1, 24), (8, 4, 32), (6, 2, 96)])
def test_a_token_in_a_step(heads: int, kv_heads: int, D: int) -> None:
    """Rotation and attention, each slot over its own length, against float64 written out; others leave no trace."""
    rep, limit, capacity, slots = heads // kv_heads, 70, 208, 8
    prompts = [(2 * capacity, capacity, 200), (0, capacity, 3), (3 * capacity, capacity, 64)]
    group_of, slot_of = [1, 0, 0, 2, 0], [0, 2, 3, 5, 6]
    length = torch.tensor([1, 9, 70, 3, 9, 33, 5, 9, 0])
    prompt_length = torch.zeros(slots + 1, dtype=torch.int64)
    for group, slot in zip(group_of, slot_of, strict=True):
        prompt_length[slot] = prompts[group][2]
    qkv = randn(5, kv_heads, rep + 2, D)
    # What is not written yet is poison.
    slabs = [torch.full((4 * capacity * kv_heads * D,), torch.nan) for _ in range(2)]
    own = [torch.full((slots, kv_heads, limit, D), torch.nan) for _ in range(2)]
    for seed, (slab, of_slots) in enumerate(zip(slabs, own, strict=True)):
        for start, _, P in prompts:
            slab.view(4, kv_heads, capacity, D)[start // capacity, :, :P] = randn(kv_heads, P, D, seed=10 * seed + P)
        for slot in slot_of:
            past = int(length[slot]) - 1
            of_slots[slot, :, :past] = randn(kv_heads, past, D, seed=100 * seed + slot)
    cos, sin = Rope(D, 100.0).table(300, torch.float32, CPU)
    rows = torch.tensor(slot_of)

    def attended(chosen: list[int]) -> Tensor:
        of = [group_of[b] for b in chosen]
        some = sorted(set(of))
        counts = [of.count(g) for g in some]
        work, _ = attention.work_items([prompts[g] for g in some], counts, rep, kv_heads, parts=1)
        members = torch.tensor([row for g in some for row in range(len(of)) if of[row] == g])
        reading = attention.Reading(
            rows[chosen], length, members, members, torch.tensor(work), torch.tensor([len(work)])
        )  # fmt: skip
        k, v = own
        q = rotate_and_store(
            qkv[chosen], cos, sin, reading.rows, length, prompt_length, k, v, None, torch.empty(len(chosen), heads, D)
        )
        assert attention.native(q)
        nothing = torch.empty(0)
        return attention.decode_attention(
            q, slabs[0], slabs[1], k, v, reading, D**-0.5, nothing, nothing, torch.empty_like(q)
        )  # fmt: skip

    def turned(x: Tensor, at: int) -> Tensor:
        return x.double() * cos[at].double() + x.roll(D // 2, -1).double() * sin[at].double()

    out = attended([0, 1, 2, 3, 4])
    for b, (group, slot) in enumerate(zip(group_of, slot_of, strict=True)):
        start, _, P = prompts[group]
        count = int(length[slot])
        near(own[0][slot, :, count - 1], turned(qkv[b, :, rep], P + count - 1))
        assert torch.equal(own[1][slot, :, count - 1], qkv[b, :, rep + 1])
        k, v = (
            torch.cat([slab.view(4, kv_heads, capacity, D)[start // capacity, :, :P], of_slots[slot, :, :count]], dim=1)
            for slab, of_slots in zip(slabs, own, strict=True)
        )
        q = turned(qkv[b, :, :rep], P + count - 1)
        weights = (q @ k.double().transpose(1, 2) * D**-0.5).softmax(-1)
        near(out[b], (weights @ v.double()).view(heads, D), 2e-6)
    assert own[0][1].isnan().all() and own[0][2, :, -1].isfinite().all(), "nothing else is written"
    # A row is the same to the bit whoever is beside it.
    for chosen in ([2], [4, 1], [3, 0, 2]):
        assert torch.equal(attended(chosen), out[chosen])


@pytest.mark.parametrize("width", [5, 64, 1001])
def test_draws(width: int) -> None:
    """As the plain definition: with bans, a floor, ties at it, ids that do not exist, hot, cold and greedy rows."""
    B = 40
    logits, counter = (4 * randn(B, width)).round(decimals=1), randint(-(2**62), 2**62, (B,))
    hot = torch.tensor([1.0, 0.6, 0.0, 1.7, 1e-3] * (B // 5), dtype=torch.float64)
    allowed = allowed_ids(torch.tensor([0, 3]), 0, width, CPU)
    floor, ties = logits.quantile(0.6, dim=1, interpolation="nearest"), torch.full((B, 1), 2)
    for temperature in (hot, 1.0, 0.4, 0.0):
        for some in ((None, None, None), (allowed, None, None), (None, floor, None), (allowed, floor, ties)):
            given = (logits, temperature, *some, counter, max(4, width - 3), 11)
            found = draw_rows(*given)
            with forced_backend("torch"):
                wanted = draw_rows(*given)
            assert torch.equal(found[1], wanted[1])
            for one, other in zip(found, wanted, strict=True):
                near(one, other, 3e-6)


def test_a_banned_favourite_leaves_the_others_their_sum() -> None:
    logits = torch.tensor([[500.0, 1.0, 2.0, -torch.inf]])
    allowed = allowed_ids(torch.tensor([0]), 0, 4, CPU)
    _, token, chosen, whole, survived = draw_rows(logits, 1.0, allowed, None, None, torch.tensor([5]), 4, 0)
    assert int(token) in (1, 2) and float(chosen) == float(token)
    assert float(whole) == 500.0 and float(survived) == pytest.approx(2.3132616)


@pytest.mark.usefixtures("job_of_one")
def test_the_engine_draws_what_plain_pytorch_draws() -> None:
    vocabulary: Any = SimpleNamespace(stop_tokens=frozenset(range(60, 90)), banned_tokens=[6, 7, 8])
    model = tiny.randomize(tiny.build()[0])
    requests = [
        Request(
            tiny.prompt(i, 7 + 30 * i), [SampleSpec(key_of("n", i, j), temperature=T) for j, T in enumerate((0, 1))]
        )
        for i in range(5)
    ]
    for more in ({}, {"top_k": 20}, {"top_p": 0.9}):
        drawn: list[list[Any]] = []
        for name in (None, "torch"):
            with forced_backend(name):
                assert attention.fits(torch.empty(1, 1, 8)) == (name is None)
                config = GenerationConfig(max_new_tokens=12, slots=4, **more)
                drawn.append(Engine(model, vocabulary, config, 3).generate(requests, 1.0))
        for mine, plain in zip(sum(drawn[0], []), sum(drawn[1], []), strict=True):
            assert (mine.tokens, mine.truncated) == (plain.tokens, plain.truncated)
            assert mine.log_probs == pytest.approx(plain.log_probs, abs=1e-5)


def test_settings_leave_it_out() -> None:
    x = torch.zeros(1)
    assert native_for("decode", x) is not None and native_for("decode", x.bfloat16()) is None
    configure(KernelsConfig(decode=False))
    assert native_for("decode", x) is None and native_for("sampling", x) is not None
    configure(KernelsConfig(backend="torch"))
    assert native_for("sampling", x) is None


def fresh(monkeypatch: pytest.MonkeyPatch, cache: Path, compiler: str = "cc") -> Any:
    """As a new process would find it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("CC", compiler)
    return native.library.__wrapped__()


def test_it_is_compiled_once_and_loaded_from_where_only_the_user_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    real = native.compile_to

    def counted(path: Path, compiler: str) -> None:
        made.append(path)
        real(path, compiler)

    monkeypatch.setattr(native, "compile_to", counted)
    folder = tmp_path / "mstar_mega"
    assert fresh(monkeypatch, tmp_path) is not None and fresh(monkeypatch, tmp_path) is not None
    assert [path.parent for path in made] == [folder] and list(folder.iterdir()) == made
    # A file or a folder that others can write is not trusted: a copy is made for this process alone.
    made[0].chmod(0o777)
    assert fresh(monkeypatch, tmp_path) is not None and made[1].parent != folder and not made[1].exists()
    made[0].chmod(0o700)
    folder.chmod(0o777)
    assert fresh(monkeypatch, tmp_path) is not None and made[2].parent != folder
    folder.chmod(0o700)
    (tmp_path / "file").touch()
    assert fresh(monkeypatch, tmp_path / "file") is not None and len(made) == 4


def test_without_a_compiler_the_plain_definitions_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = tmp_path / "cc"
    fails.write_text("#!/bin/sh\nexit 1\n")
    fails.chmod(0o700)
    assert fresh(monkeypatch, tmp_path / "a", str(fails)) is None
    assert not [path for path in (tmp_path / "a").rglob("*") if path.is_file()], "a half-made file is left behind"
    monkeypatch.setenv("PATH", os.devnull)
    assert fresh(monkeypatch, tmp_path / "b", "none") is None
