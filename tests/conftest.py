"""Shared set-up: one thread per process (several test processes share the cores), and an end to the workers."""

from __future__ import annotations

import os

# Before anything imports torch, and inherited by the workers.
os.environ["OMP_NUM_THREADS"] = "1"
# On the CPU, as in CI, also where there is a GPU. benchmarks/gpu_check.py asks for the kernels' tests to run on it.
if os.environ.get("MSTAR_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its functions are interpreted or compiled, for the life of the process.
    os.environ["TRITON_INTERPRET"] = "1"

from kernel_cases import BACKENDS, DEVICE
from parallel import close_pools


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with every implementation of the kernels: plain PyTorch, and Triton (interpreted without a GPU)."""
    from mstar_mega.kernels import forced_backend

    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
    with forced_backend(request.param):
        yield request.param
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def job_of_one() -> Iterator[None]:
    """The test process is itself a job of one rank."""
    from mstar_mega.config import ParallelConfig
    from mstar_mega.platform import distributed

    distributed.initialize(ParallelConfig(), 0)
    yield
    distributed.shutdown()


SLOWEST_FIRST = (
    "test_resume.py", "test_resume_disk.py", "test_families_recipe.py", "test_parallel_truth.py",
    "test_kernel_dispatch.py", "test_checkpoint.py", "test_bad_input.py", "test_linear_logprob.py",
)  # fmt: skip
"""Files of a minute and more: dealt out first, so that pytest-xdist's workers end at about the same time."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist put the slow files first; the order inside a file stays."""
    if hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(SLOWEST_FIRST)}
        items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the shared worker processes."""
    close_pools()
