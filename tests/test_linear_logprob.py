"""Log-probs and the SFT loss from hidden states: against float64, over ranks, and that they do less work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, needs_interpreter, randint, randn, relative_error
from parallel import run_parallel
from torch import Tensor
from torch.distributed import get_rank, get_world_size, group
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mstar_mega.config import KernelsConfig
from mstar_mega.kernels import configure, dispatch, forced_backend, linear_cross_entropy, linear_logprob
from mstar_mega.kernels.linear_logprob import linear_logprob_reference

IGNORE = -100
# Gradients of low precision are rounded once; values never are.
GRADIENT = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# N, H, V, valid: odd, prime and one; not multiples of any tile; one row and one column past a tile.
SIZES = [(37, 24, 301, None), (129, 72, 257, 251), (1, 8, 1, None)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """About 50 rows at a time."""
    monkeypatch.setattr(dispatch, "_chunk_bytes", 50 * 301 * 12)


def problem(N: int, H: int, V: int, valid: int | None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """hidden, weight, bias, targets (first and last column, ignored ones), upstream gradients (zeros among them)."""
    hidden, weight, bias = randn(N, H, seed=1), 2 * randn(V, H, seed=2) / H**0.5, randn(V, seed=3)
    target = randint(0, valid or V, (N,), seed=4)
    if N > 4:
        target[:3] = torch.tensor([0, (valid or V) - 1, IGNORE])
        target[-1] = IGNORE
    upstream = randn(2, N, seed=5)
    upstream[:, 3:5] = 0.0
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target, upstream[0], upstream[1]


def by_definition(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, g: Tensor, h: Tensor, valid: int | None, T: float
) -> list[Tensor]:
    """Log-prob, entropy and the gradients of their weighted sum, in float64."""
    x, w, b = (t.double().requires_grad_() for t in (hidden, weight, bias))
    log_prob, entropy = linear_logprob_reference(x, w[:valid], target.clamp(min=0), b[:valid], T)
    counted = target != IGNORE
    log_prob, entropy = (torch.where(counted, t, 0.0) for t in (log_prob, entropy))
    return [log_prob, entropy, *torch.autograd.grad((log_prob * g + entropy * h).sum(), (x, w, b))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "H", "V", "valid"), SIZES)
def test_log_probs_entropies_and_gradients_against_float64(
    backend: str, small_chunks: None, dtype: torch.dtype, N: int, H: int, V: int, valid: int | None
) -> None:
    hidden, weight, bias, target, g, h = problem(N, H, V, valid, dtype)
    expected = by_definition(hidden, weight, bias, target, g, h, valid, 0.7)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    log_prob, entropy = linear_logprob(
        hidden, weight, target, bias=bias, temperature=0.7, valid_vocab=valid, with_entropy=True
    )
    assert log_prob.dtype == entropy.dtype == torch.float32
    gradients = torch.autograd.grad((log_prob * g + entropy * h).sum(), inputs)
    assert relative_error(log_prob, expected[0]) < 1e-6 and relative_error(entropy, expected[1]) < 3e-6
    for got, wanted in zip(gradients, expected[2:], strict=True):
        # One word alone has no gradient: p - 1 is what float32 leaves of it.
        assert got.dtype == dtype and relative_error(got, wanted, 1.0 if V == 1 else 1e-6) < GRADIENT[dtype]
    if N > 4:
        assert log_prob[2] == entropy[2] == 0 and gradients[0][2:5].abs().max() == 0


@pytest.mark.parametrize("temperature", [0.3, 3.0])
@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_a_constant_added_to_all_logits_changes_nothing(backend: str, temperature: float, shift: float) -> None:
    hidden, weight, bias, target, _, _ = problem(40, 16, 300, None)
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    moved = weight.clone()
    moved[:, 0] = shift
    a, b = (linear_logprob(hidden, w, target, bias=bias, temperature=temperature) for w in (weight, moved))
    # A logit of 200 is stored to 1.5e-5, divided by 0.3 that is 5e-5.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 / min(temperature, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_and_its_gradients_against_float64(
    backend: str, small_chunks: None, dtype: torch.dtype, reduction: Any
) -> None:
    hidden, weight, bias, target, row_weight, _ = problem(*SIZES[1], dtype)
    counted = target != IGNORE
    divisor = int(counted.sum()) if reduction == "mean" else 1
    expected = by_definition(hidden, weight, bias, target, -3 * row_weight / divisor, 0 * row_weight, SIZES[1][3], 0.7)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_cross_entropy(
        hidden, weight, target, bias=bias, temperature=0.7, valid_vocab=SIZES[1][3], reduction=reduction,
        row_weight=row_weight,
    )  # fmt: skip
    wanted = -(expected[0] * row_weight).sum() / divisor
    assert abs(float(loss - wanted)) < 1e-5 * abs(float(wanted))
    for got, exact in zip(torch.autograd.grad(3 * loss, inputs), expected[2:], strict=True):
        assert relative_error(got, exact) < GRADIENT[dtype]
    with torch.no_grad():
        again = linear_cross_entropy(
            hidden, weight, target, bias=bias, temperature=0.7, valid_vocab=SIZES[1][3], reduction=reduction,
            row_weight=row_weight,
        )  # fmt: skip
    torch.testing.assert_close(again, loss.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_nothing_counted_and_nothing_upstream(backend: str, reduction: Any) -> None:
    hidden, weight = randn(5, 8).requires_grad_(), randn(11, 8, seed=1).requires_grad_()
    nobody = torch.full((5,), IGNORE)
    for value in (
        linear_cross_entropy(hidden, weight, nobody, reduction=reduction),
        linear_logprob(hidden, weight, nobody).sum(),
        linear_logprob(hidden, weight, torch.arange(5)).sum() * 0.0,
        linear_logprob(hidden[:0], weight, nobody[:0]).sum(),
    ):
        assert float(value.detach()) == 0
        for gradient in torch.autograd.grad(value, (hidden, weight)):
            assert gradient.abs().max() == 0


def test_the_loss_agrees_with_ligers(backend: str) -> None:
    """A second, independent implementation of the loss and its gradients, where it is installed."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (setup.py's extra 'dev')")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden, weight, _, target, _, _ = problem(*SIZES[0])
    results = []
    for function in (
        lambda x, w: linear_cross_entropy(x, w, target),
        lambda x, w: LigerFusedLinearCrossEntropyFunction.apply(x, w, target, None, None, IGNORE, 0.0, 0.0, "sum")[0],
    ):
        x, w = (t.clone().requires_grad_() for t in (hidden, weight))
        loss = function(x, w)
        results.append([loss, *torch.autograd.grad(loss, (x, w))])
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 3e-6


def test_two_runs_are_equal_bit_for_bit(backend: str) -> None:
    def run() -> list[Tensor]:
        hidden, weight, _, target, g, _ = problem(*SIZES[0], torch.bfloat16)
        hidden.requires_grad_(), weight.requires_grad_()
        log_prob = linear_logprob(hidden, weight, target)
        loss = linear_cross_entropy(hidden, weight, target)
        return [log_prob, loss, *torch.autograd.grad((log_prob * g).sum() + loss, (hidden, weight))]

    assert all(map(torch.equal, run(), run()))


# -- over tensor-parallel ranks --------------------------------------------------------------------------------------


def shards(valid: int, backend: str) -> list[Tensor]:
    """Values, and this rank's gradients, of the problem cut over the group; and collectives, see ``_collectives``."""
    hidden, weight, bias, target, g, h = (t.cpu() for t in problem(24, 16, 128, valid))
    size, rank = get_world_size(), get_rank()
    x = hidden.requires_grad_()
    w, b = (t.chunk(size)[rank].clone().requires_grad_() for t in (weight, bias))
    head: dict[str, Any] = {"bias": b, "temperature": 0.8, "valid_vocab": valid, "group": group.WORLD}
    head["vocab_start"] = rank * (128 // size)
    with forced_backend(backend):
        log_prob, entropy = linear_logprob(x, w, target, **head, with_entropy=True)
        loss = linear_cross_entropy(x, w, target, **head)
        first = torch.autograd.grad((log_prob * g + entropy * h).sum(), (x, w, b))
        second = torch.autograd.grad(loss, (x, w, b))
        calls = [lambda: linear_logprob(x, w, target, **head), lambda: linear_cross_entropy(x, w, target, **head)]
        counts = [_collectives(call) for call in calls]
        dispatch._chunk_bytes = 6 * len(w) * 12
        counts += [_collectives(call) for call in calls]
        configure(KernelsConfig())
    return [t.detach() for t in (log_prob, entropy, loss, *first, *second)] + [torch.tensor(counts)]


def _collectives(run: Callable[[], Tensor]) -> list[int]:
    """How many a forward has, and its backward."""
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        out = run().sum()
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        out.backward()
    return [
        sum(event.count for event in seen.key_averages() if event.key.startswith("c10d::"))
        for seen in (forward, backward)
    ]


INTERPRETED = pytest.param(121, "interpreter", marks=needs_interpreter)


@pytest.mark.parametrize(("valid", "which"), [(128, "torch"), (70, "torch"), INTERPRETED])
def test_vocabulary_shards_give_the_same_values_and_gradients(valid: int, which: str) -> None:
    # 70 leaves the last of 4 ranks (ids 96 to 127) nothing but padding.
    accuracy = 1e-6 if which == "torch" else 2e-6
    whole = run_parallel(1, "test_linear_logprob:shards", valid, "torch")[0]
    hidden, weight, bias, target, g, h = (t.cpu() for t in problem(24, 16, 128, valid))
    exact = by_definition(hidden, weight, bias, target, g, h, valid, 0.8)
    for got, wanted in zip([*whole[:2], *whole[3:6]], exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=3e-6)
    for size in (2, 4):
        ranks = run_parallel(size, "test_linear_logprob:shards", valid, which)
        for part in ranks:
            for place in (0, 1, 2, 3, 6):  # values, and hidden's gradient, are whole on every rank
                assert relative_error(part[place], whole[place]) < accuracy
            # One small gather, for the loss in each chunk; and the sum of hidden's gradient.
            rows = 3 if which == "interpreter" else 4
            assert part[-1].tolist() == [[1, 1], [1, 1], [1, 1], [rows, 1]]
        for place in (4, 5, 7, 8):
            cut = torch.cat([part[place] for part in ranks])
            assert relative_error(cut, whole[place]) < accuracy
            assert valid == 128 or cut[valid:].abs().max() == 0


# -- less work -------------------------------------------------------------------------------------------------------


def operations(run: Callable[[], Any]) -> int:
    """Multiplications and additions of matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_products_are_counted_and_dead_rows_cost_nothing() -> None:
    N, H, V = 60, 16, 200
    one = 2 * N * H * V
    hidden, weight = randn(N, H).cpu().requires_grad_(), randn(V, H, seed=1).cpu().requires_grad_()
    target = randint(0, V, (N,)).cpu()
    half = torch.where(torch.arange(N) % 2 == 0, target, IGNORE)
    upstream = (torch.arange(N) % 4 == 0).float()
    with forced_backend("torch"):
        assert operations(lambda: linear_logprob(hidden, weight, target).sum().backward()) == 4 * one
        assert operations(lambda: linear_cross_entropy(hidden, weight, target).backward()) == 3 * one
        assert operations(lambda: linear_cross_entropy(hidden, weight, half).backward()) == 3 * one // 2
        assert operations(lambda: linear_logprob(hidden, weight, half).sum().backward()) == 4 * one // 2
        quarter = operations(lambda: linear_logprob(hidden, weight, target).backward(upstream))
        assert quarter == one + 3 * one // 4
        weighted = operations(lambda: linear_cross_entropy(hidden, weight, target, row_weight=upstream).backward())
        assert weighted == 3 * one // 4
        weight.requires_grad_(False)
        assert operations(lambda: linear_logprob(hidden, weight, target).sum().backward()) == 3 * one
        assert operations(lambda: linear_cross_entropy(hidden, weight, target).backward()) == 2 * one
        with torch.no_grad():
            assert operations(lambda: linear_cross_entropy(hidden, weight, target)) == one


def test_dropped_rows_leave_the_others_as_they_are(backend: str) -> None:
    hidden, weight, _, target, g, _ = problem(*SIZES[0])
    hidden.requires_grad_(), weight.requires_grad_()
    g = torch.where(torch.arange(37) % 3 == 0, g, 0.0)
    with forced_backend("torch"):
        whole = linear_logprob_reference(hidden, weight, target.clamp(min=0))[0]
        expected = torch.autograd.grad((whole * g * (target != IGNORE)).sum(), (hidden, weight))
    got = torch.autograd.grad(linear_logprob(hidden, weight, target), (hidden, weight), g)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_weight_gradients_go_straight_into_main_grad(backend: str, shared: bool) -> None:
    hidden, weight, _, target, _, _ = problem(*SIZES[0], torch.bfloat16)
    exact = weight.double().requires_grad_()
    for _ in range(2):
        chosen = linear_logprob_reference(hidden.double(), exact, target.clamp(min=0))[0]
        torch.where(target != IGNORE, chosen, 0.0).sum().backward()
    parameter: Any = torch.nn.Parameter(weight)
    parameter.main_grad = torch.full(weight.shape, 5.0)
    parameter.grad_added_to_main_grad = False
    parameter.zero_out_wgrad = shared
    linear_logprob(hidden, parameter, target).sum().backward()
    assert parameter.grad_added_to_main_grad and parameter.grad.shape == weight.shape
    assert not shared or parameter.grad.abs().max() == 0
    (-linear_cross_entropy(hidden, parameter, target)).backward()
    assert exact.grad is not None
    assert relative_error(parameter.main_grad - 5.0, exact.grad) < 2**-8


# -- settings and mistakes -------------------------------------------------------------------------------------------


def test_turned_off_they_are_the_definition_on_whole_logits() -> None:
    hidden, weight, _, target, _, _ = problem(*SIZES[0])
    hidden.requires_grad_(), weight.requires_grad_()
    results = []
    try:
        for on in (True, False):
            configure(KernelsConfig(backend="torch", linear_logprob=on, linear_cross_entropy=on))
            loss = linear_cross_entropy(hidden, weight, target)
            results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
            flops = operations(lambda: linear_logprob(hidden, weight, target).sum().backward())
            assert flops == (2 * 37 * 24 * 301 * 3 if not on else 2 * 35 * 24 * 301 * 4)
    finally:
        configure(KernelsConfig())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target has shape"),
        ({"target": torch.zeros(5)}, "int64"),
        ({"temperature": 0.0}, "above 0"),
        ({"weight": torch.zeros(7, 9)}, r"\[N, H\] and \[V, H\]"),
        ({"weight": torch.zeros(7, 8).half()}, "same dtype"),
        ({"bias": torch.zeros(8)}, "bias has shape"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], text: str) -> None:
    right: dict[str, Any] = {"weight": torch.zeros(7, 8), "target": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=text):
        linear_logprob(torch.zeros(5, 8), **(right | change))
