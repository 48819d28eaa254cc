"""Shared set-up: one thread per process (several test processes share the cores), and an end to the workers."""

from __future__ import annotations

import os

# Before anything imports torch, and inherited by the workers.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from parallel import close_pools


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the shared worker processes."""
    close_pools()
