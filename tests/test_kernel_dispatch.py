"""Which implementation runs, how settings choose it, and that compiled kernels suit an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import tiny
import torch
from kernel_cases import BACKENDS, DEVICE
from torch import Tensor

from mstar_mega import kernels
from mstar_mega.config import KernelsConfig, ParallelConfig
from mstar_mega.kernels import dispatch
from mstar_mega.kernels.dispatch import KERNELS, uses_triton
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import next_token_targets, pack
from mstar_mega.platform import distributed


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    yield
    kernels.configure(KernelsConfig())


def test_every_kernel_is_compiled_for_an_h100_within_its_limits() -> None:
    """Shared memory, spills, and matrix instructions where meant, at the production configurations; no GPU needed."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "mstar_mega.kernels.report", "--json"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["problems"] == []
    compiled = {case["kernel"] for case in result["compiled"]}
    folder = os.path.dirname(dispatch.__file__)
    sources = "".join(open(os.path.join(folder, name)).read() for name in os.listdir(folder) if name.endswith(".py"))
    launched = {text.rsplit(" ", 1)[-1] for text in sources.split("_kernel[(")[:-1]}
    assert {f"{name.strip()}_kernel" for name in launched} == compiled, "a kernel that is launched is not compiled here"
    fused = [case for case in result["compiled"] if case["kernel"] == "linear_stats_kernel"]
    assert fused and all(case["tma_loads"] and case["wgmma"] for case in fused)


def test_backends() -> None:
    with kernels.forced_backend(None):
        assert kernels.backend("cpu") == "torch"
        assert kernels.backend() == ("triton" if DEVICE == "cuda" else "torch")
        assert not uses_triton("norms", torch.zeros(1, device="cpu"))
    with kernels.forced_backend(BACKENDS[1]):
        assert kernels.backend() == BACKENDS[1] and uses_triton("norms", torch.zeros(1, device=DEVICE))
    with pytest.raises(ValueError, match="must be auto, triton, interpreter or torch"):
        kernels.force_backend("fast")
    impossible = "triton" if BACKENDS[1] == "interpreter" else "interpreter"
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        kernels.force_backend(impossible)


def test_settings_choose_backend_budget_and_switches() -> None:
    kernels.configure(KernelsConfig(backend="torch", chunk_mb=3, norms=False))
    assert kernels.backend() == "torch" and dispatch.chunk_bytes() == 3 * 2**20
    assert [name for name in KERNELS if not dispatch.is_on(name)] == ["norms"]
    kernels.configure(KernelsConfig(backend=BACKENDS[1], norms=False))  # type: ignore[arg-type]
    x = torch.zeros(1, device=DEVICE)
    assert uses_triton("attention", x) and not uses_triton("norms", x)
    with pytest.raises(ValueError, match="no kernel 'speed'"):
        dispatch.turn_off(["speed"])


# -- in the model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Iterator[LMM]:
    yield tiny.randomize(tiny.build(ParallelConfig())[0])
    distributed.shutdown()


def loss_and_gradients(model: LMM, tokens: int = 24) -> tuple[float, list[Tensor]]:
    prompts, responses = [tiny.prompt(0, 13, tiles=1)], [[[5 + i % 40 for i in range(tokens)], [7, 8, 9]]]
    batch = pack(prompts, responses, 1)
    source, target = next_token_targets(batch, responses)
    loss = model.token_loss(model(batch)[source], target)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return float(loss.detach()), list(torch.autograd.grad(loss, parameters))


@pytest.mark.skipif(DEVICE != "cpu", reason="the model's streams are made on the CPU here")
def test_each_switch_and_the_interpreter_leave_the_training_step_as_it_is(model: LMM) -> None:
    loss, gradients = loss_and_gradients(model)
    settings = [KernelsConfig(**{name: False}) for name in ("linear_cross_entropy", "linear_logprob")]  # type: ignore[arg-type]
    settings += [
        KernelsConfig(linear_logprob=False, linear_cross_entropy=False, vocab_parallel_logprob=False),
        KernelsConfig(chunk_mb=1),
        KernelsConfig(backend="interpreter"),
        KernelsConfig(backend="interpreter", norms=False, attention=False),
    ]
    for setting in settings:
        kernels.configure(setting)
        again, others = loss_and_gradients(model)
        assert again == pytest.approx(loss, rel=1e-6), setting
        for a, b in zip(gradients, others, strict=True):
            assert (a - b).abs().max() <= 2e-5 * max(1.0, float(a.abs().max())), setting
