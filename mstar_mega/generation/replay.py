"""Steps that are launched again and again: as they are, or recorded once as a CUDA graph and replayed.

A step that can be recorded reads and writes fixed places only, and asks the host nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core import parallel_state


class Replay(Protocol):
    """How steps are run."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """What does the same as ``step`` whenever it is called. Recording may run the step any number of times."""
        ...


class Straight:
    """Every launch anew."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step itself."""
        return step


class CudaGraphs:
    """One graph for each recorded step; they share one pool of memory, for only one runs at a time.

    The pool goes with its last graph: make another object for other steps.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Warm up (kernels are compiled, libraries take their workspaces), capture, and give the replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (images, collectives' watchdog) go on calling CUDA.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        self._pool = self._pool or graph.pool()
        return graph.replay


def replay_for(device: torch.device) -> Replay:
    """CUDA graphs where a step does not talk to other pipeline stages, whose turns the host decides."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return CudaGraphs() if device.type == "cuda" and stages == 1 else Straight()
