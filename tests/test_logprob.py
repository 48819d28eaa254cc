"""Log-probs of targets and their gradients against float64, whole and cut over the ranks of a gloo group."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, randint, randn, relative_error
from parallel import run_parallel
from torch import Tensor
from torch.distributed import get_rank, get_world_size, group

from mstar_mega.kernels.logprob import logprob_reference, target_logprob_reference, vocab_parallel_logprob

INF = float("inf")
IGNORE = -100


def logprob_problem(vocabulary: int, scale: float = 3.0, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (first and last column, ignored and other rows) and upstream gradients (a zero among them)."""
    logits = scale * randn(12, vocabulary, seed=vocabulary) + shift
    target = randint(0, vocabulary, (12,), seed=1)
    target[0], target[1], target[2], target[5] = 0, vocabulary - 1, IGNORE, IGNORE
    upstream = randn(12, seed=8)
    upstream[7] = 0.0
    return logits, target, upstream


def by_definition(
    logits: Tensor, target: Tensor, upstream: Tensor, temperature: float, valid: int
) -> tuple[Tensor, Tensor]:
    """Forward and gradient in float64."""
    exact = logits.double().requires_grad_()
    counted = target != IGNORE
    chosen = target_logprob_reference(exact[:, :valid], target.clamp(min=0), temperature)
    values = torch.where(counted, chosen, 0.0)
    (values * upstream.double()).sum().backward()
    assert exact.grad is not None
    return values.detach(), exact.grad


@pytest.mark.parametrize("temperature", [1.0, 0.3, 3.0])
@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0])
@pytest.mark.parametrize(("vocabulary", "valid"), [(101, None), (128, 121), (1, None)])
def test_log_probs_and_gradients_against_float64(
    backend: str, temperature: float, shift: float, vocabulary: int, valid: int | None
) -> None:
    logits, target, upstream = logprob_problem(vocabulary, shift=shift)
    logits[:, valid or vocabulary :] = 300.0 + shift  # padding must not count even where it is large
    target = target.clamp(max=(valid or vocabulary) - 1)
    z = logits.clone().requires_grad_()
    values = vocab_parallel_logprob(z, target, temperature=temperature, valid_vocab=valid)
    assert values.dtype == torch.float32
    (values * upstream).sum().backward()
    expected, gradient = by_definition(logits, target, upstream, temperature, valid or vocabulary)
    # A logit of 200 is stored to 1.5e-5, divided by 0.3 that is 5e-5.
    accuracy = 2e-6 if not shift else 6e-5 / min(temperature, 1.0)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=accuracy)
    assert z.grad is not None
    torch.testing.assert_close(z.grad.double(), gradient, rtol=1e-5, atol=accuracy / min(temperature, 1.0))
    assert z.grad[[2, 5, 7]].abs().max() == 0, "ignored rows and zero upstream gradients"
    assert torch.equal(logits, z.detach()), "the input was changed"


def test_log_probs_agree_with_ligers_cross_entropy(backend: str) -> None:
    """A second, independent implementation of values and gradients."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (setup.py's extra 'dev')")
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    logits, target, _ = logprob_problem(301)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    value = -vocab_parallel_logprob(ours, target).sum()
    # It writes its gradient over the logits.
    peer = LigerCrossEntropyFunction.apply(theirs * 1.0, target, None, IGNORE, 0.0, 0.0, "sum")[0]
    assert relative_error(value, peer) < 1e-6
    (gradient,), (expected,) = torch.autograd.grad(value, ours), torch.autograd.grad(peer, theirs)
    assert relative_error(gradient, expected) < 2e-6


def test_all_ignored_and_empty(backend: str) -> None:
    z = randn(3, 10).requires_grad_()
    values = vocab_parallel_logprob(z, torch.full((3,), IGNORE))
    values.sum().backward()
    assert values.tolist() == [0, 0, 0] and z.grad is not None and z.grad.abs().max() == 0
    nothing = randn(0, 10).requires_grad_()
    vocab_parallel_logprob(nothing, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert nothing.grad is not None and nothing.grad.shape == (0, 10)


def test_logits_of_minus_infinity_give_no_nan(backend: str) -> None:
    z = randn(4, 9)
    z[:, 3] = z[1, 5] = z[2, :8] = -INF
    target = torch.tensor([0, 5, 8, IGNORE])
    z.requires_grad_()
    values = vocab_parallel_logprob(z, target, temperature=0.7)
    assert values[1] == -INF and values[2] == 0 and torch.isfinite(values[[0, 3]]).all()
    values.sum().backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()
    assert z.grad[0, 3] == 0 and z.grad[3].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocabulary", [257, 4097])
def test_log_probs_and_entropies_of_every_dtype(
    backend: str, dtype: torch.dtype, inplace: bool, vocabulary: int
) -> None:
    logits, target, upstream = logprob_problem(vocabulary)
    weights = randn(12, seed=9)
    weights[7] = 0.0
    z = logits.to(dtype).view(3, 4, -1).requires_grad_()
    exact = z.detach().double().view(12, -1).requires_grad_()
    counted = target != IGNORE
    expected = [torch.where(counted, t, 0.0) for t in logprob_reference(exact, target.clamp(min=0), 0.8)]
    (gradient,) = torch.autograd.grad((expected[0] * upstream + expected[1] * weights).sum(), exact)
    got = vocab_parallel_logprob(z, target.view(3, 4), temperature=0.8, with_entropy=True, inplace_backward=inplace)
    memory = z.data_ptr()
    for value, wanted in zip(got, expected, strict=True):
        assert value.dtype == torch.float32 and relative_error(value.view(12), wanted) < 2e-6
    (grad,) = torch.autograd.grad((got[0].view(12) * upstream + got[1].view(12) * weights).sum(), z)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert grad.dtype == dtype and relative_error(grad.view(12, -1), gradient) < rounding
    assert grad.view(12, -1)[[2, 5, 7]].abs().max() == 0
    if inplace and (backend != "torch" or dtype == torch.float32):
        assert grad.data_ptr() == memory, "the gradient has memory of its own"


def test_ids_that_no_rank_holds_are_impossible(backend: str) -> None:
    log_prob = vocab_parallel_logprob(randn(4, 10), torch.tensor([9, 10, 11, -7]), valid_vocab=9)
    assert log_prob.tolist() == [-INF] * 4


def test_rows_beyond_two_to_the_31_elements(backend: str) -> None:
    try:
        memory = torch.empty(2**31 + 4000, dtype=torch.float16)  # touched in two places only
    except RuntimeError:
        pytest.skip("this machine does not lend 4 GiB of untouched memory")
    z = torch.as_strided(memory, (2, 300), (2**31 + 100, 1))
    z.copy_(randn(2, 300))
    target = torch.tensor([5, 299])
    got = vocab_parallel_logprob(z, target)
    torch.testing.assert_close(got, vocab_parallel_logprob(z.clone(), target))
    assert torch.isfinite(got).all() and got[0] != got[1]


def logprob_shards(valid: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Forward and this rank's gradient slice of the problem cut over the group."""
    logits, target, upstream = (t.cpu() for t in logprob_problem(128))
    size, rank = get_world_size(), get_rank()
    z = logits.chunk(size, dim=1)[rank].clone().requires_grad_()
    values = vocab_parallel_logprob(
        z, target.clamp(max=valid - 1), temperature=temperature, valid_vocab=valid, vocab_start=rank * (128 // size),
        group=group.WORLD,
    )  # fmt: skip
    (values * upstream).sum().backward()
    assert z.grad is not None
    return values.detach(), z.grad


@pytest.mark.parametrize("valid", [128, 121, 70])
def test_log_probs_from_vocabulary_shards_equal_the_whole(valid: int) -> None:
    # 70 leaves the last of 4 ranks (columns 96 to 127) nothing but padding.
    for temperature in (1.0, 0.5):
        whole, gradient = run_parallel(1, "test_logprob:logprob_shards", valid, temperature)[0]
        logits, target, upstream = (t.cpu() for t in logprob_problem(128))
        expected, _ = by_definition(logits, target.clamp(max=valid - 1), upstream, temperature, valid)
        torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=2e-6)
        for size in (2, 4):
            ranks = run_parallel(size, "test_logprob:logprob_shards", valid, temperature)
            for values, _ in ranks:
                torch.testing.assert_close(values, whole, rtol=1e-6, atol=1e-6)
            cut = torch.cat([part for _, part in ranks], dim=1)
            torch.testing.assert_close(cut, gradient, rtol=1e-6, atol=1e-6)
            assert cut[:, valid:].abs().max() == 0 if valid < 128 else True
