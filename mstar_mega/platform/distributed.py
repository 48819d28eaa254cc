"""Processes, devices and model-parallel groups of a job, and the few collectives the recipe needs."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mstar_mega.config import ParallelConfig
from mstar_mega.platform import watch
from mstar_mega.platform.cpu import apply_cpu_platform
from mstar_mega.platform.memory import keep_freed_memory

_TIMEOUT = timedelta(hours=2)
"""Ranks wait for the slowest one's blocks of queries, and for rank 0 while it makes data or the report."""

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Where this process stands among the job's ranks."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def is_main(self) -> bool:
        """The one process that prints and writes files for all."""
        return self.rank == 0


def check_sizes(parallel: ParallelConfig, world_size: int) -> None:
    """Raise ValueError, with the numbers and what to do, when ``world_size`` ranks cannot be laid out so."""
    for name in ("tensor", "pipeline"):
        if getattr(parallel, name) < 1:
            raise ValueError(f"parallel.{name} is {getattr(parallel, name)}; it must be 1 or more")
    size = parallel.tensor * parallel.pipeline
    if world_size % size:
        raise ValueError(
            f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline} = {size} ranks per model copy, "
            f"but the job has {world_size} rank{'s' if world_size > 1 else ''}. Start a multiple of {size} "
            f"(torchrun --nproc-per-node {size} ...), or lower one of the two settings"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError(
            "parallel.sequence is true but parallel.tensor is 1: sequence parallelism splits over the tensor-parallel "
            "ranks. Set parallel.tensor to 2 or more, or parallel.sequence to false"
        )


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Join the job that torchrun's environment describes (alone without it) and build the model-parallel groups.

    Uses nccl where CUDA is available and gloo elsewhere. A second call only changes layout and seed. Raises ValueError
    for impossible sizes, before any process waits for another.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_sizes(parallel, world_size)
    apply_cpu_platform()
    if not dist.is_initialized():
        _join(world_size)
    reset_model_parallel(parallel, seed)


def _join(world_size: int) -> None:
    on_cuda = torch.cuda.is_available()
    _check_gpus(on_cuda)
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Full float32: reduced precision would differ with the batch, and generation from training.
        torch.backends.cudnn.allow_tf32 = False
    else:
        keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))))
    backend = "nccl" if on_cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        # In-memory store: no port that another job could hold.
        dist.init_process_group(backend, timeout=_TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)


def _check_gpus(on_cuda: bool) -> None:
    """Raise ValueError where SLURM gave the job GPUs that torch does not see: nobody wants a silent run on the CPU.

    ``MSTAR_DEVICE=cpu`` allows it.
    """
    granted = os.environ.get("SLURM_GPUS_ON_NODE", "0") if "SLURM_STEP_ID" in os.environ else "0"
    if granted not in ("", "0") and not on_cuda and os.environ.get("MSTAR_DEVICE") != "cpu":
        raise ValueError(
            f"SLURM gives this job {granted} GPUs on {socket.gethostname()}, and PyTorch sees none: a build for the "
            "CPU, another driver, or a container without --nv. MSTAR_DEVICE=cpu runs on the CPU all the same"
        )


def devices_in_words() -> str:
    """Which devices, where, and in which layout: the first line of a job's log. Collective."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = together("devices", lambda: (name, socket.gethostname()))
    counts = Counter(device for device, _ in found)
    hosts = list(dict.fromkeys(host for _, host in found))
    shown = ", ".join(hosts[:_HOSTS]) + (f" and {len(hosts) - _HOSTS} more" if len(hosts) > _HOSTS else "")
    place = layout()
    return (
        f"{' + '.join(f'{count} x {device}' for device, count in counts.items())} ({dist.get_backend()}) on {shown}; "
        f"tensor {place.tensor_size} x pipeline {place.pipeline_size} x data {place.data_size}"
    )


def reset_model_parallel(parallel: ParallelConfig, seed: int) -> None:
    """(Re)build the model-parallel groups in the running process group and seed torch. Collective.

    Models and optimizers made under the former layout must not be used any more.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    check_sizes(parallel, dist.get_world_size())
    _destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        # Only the distributed optimizer would use them.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(_TIMEOUT.total_seconds() // 60),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the job. Safe to call when nothing was initialised."""
    if dist.is_initialized():
        _destroy_model_parallel()
        dist.destroy_process_group()


def _destroy_model_parallel() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # megatron only forgets its groups; their threads and connections would pile up.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def layout() -> Layout:
    """This process's place in the current layout. Needs :func:`initialize`."""
    from megatron.core import parallel_state as ps

    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=ps.get_tensor_model_parallel_rank(),
        tensor_size=ps.get_tensor_model_parallel_world_size(),
        pipeline_rank=ps.get_pipeline_model_parallel_rank(),
        pipeline_size=ps.get_pipeline_model_parallel_world_size(),
        data_rank=ps.get_data_parallel_rank(),
        data_size=ps.get_data_parallel_world_size(),
    )


def device() -> torch.device:
    """The device of this process's tensors."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def model_copy() -> dist.ProcessGroup:
    """The ranks that hold this rank's copy of the model together. Needs :func:`initialize`."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_model_parallel_group()
    return group


def from_lead(obj: T) -> T:
    """The picklable object of the model copy's first rank. Collective over the copy."""
    group, holder = model_copy(), [obj]
    if group.size() > 1:
        dist.broadcast_object_list(holder, src=dist.get_global_rank(group, 0), group=group)
    return holder[0]


def all_gather_objects(obj: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's picklable object, in group-rank order; ``group`` None: the data-parallel group. Collective."""
    from megatron.core import parallel_state

    group = group if group is not None else parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return [obj]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, obj, group=group)
    return gathered


def broadcast_object(obj: T) -> T:
    """Global rank 0's picklable object, on every rank; the others' argument is ignored. Collective over the job."""
    if dist.get_world_size() == 1:
        return obj
    holder: list[Any] = [obj if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(holder, src=0)
    received: T = holder[0]
    return received


def taken(items: Sequence[T], name: str, place: Layout) -> Iterator[T]:
    """Items in order, each for one model copy: a copy gets the next one when it asks.

    ``name`` is this list's alone. The ranks of a copy ask at the same points of their work.
    """
    if place.data_size == 1:
        yield from items
        return
    leads = model_copy().rank() == 0
    store = dist.distributed_c10d._get_default_store()
    while (number := from_lead(store.add(name, 1) - 1 if leads else 0)) < len(items):
        yield items[number]


def sum_over_data(values: Mapping[str, float]) -> dict[str, float]:
    """Sum each value over the data-parallel ranks, in rank order; a name may be missing on some. Collective."""
    total: dict[str, float] = {}
    for part in all_gather_objects(dict(values)):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


_HOSTS = 8
"""So many nodes are named."""
_NEWS_S = 3.0
"""Seconds that a rank waits for rank 0 to say the same, before it speaks itself."""


def own_store(seconds: float) -> dist.Store:
    """A connection of one's own to the job's store, for another thread or a last word. Raises where there is none."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=seconds)
    return dist.TCPStore(address, port, None, is_master=False, timeout=timeout, wait_for_workers=False)


@contextmanager
def watched(limit: float) -> Iterator[None]:
    """A rank that hangs for so many seconds ends the job while the context lasts (``platform/watch.py``)."""
    world_size = dist.get_world_size()
    store: watch.Store | None = watch.LocalStore()
    if world_size > 1:
        store = None
        with contextlib.suppress(RuntimeError, KeyError):  # a group that was not made from torchrun's environment
            store = own_store(60.0)
    if store is None:
        yield
        return
    cpu_counts = not torch.cuda.is_available()
    running = watch.Watch(store, dist.get_rank(), world_size, limit, watch.end_job, cpu_counts)
    try:
        yield
    finally:
        running.close()


def is_news(message: str, is_main: bool) -> bool:
    """Whether a rank must say itself why it fails: rank 0, which speaks for all, does not fail for the same reason."""
    key = f"mstar/failed/{sha256(message.encode()).hexdigest()}"
    try:
        store = own_store(_NEWS_S)
        if is_main:
            store.set(key, "1")
            time.sleep(0.2)  # with this process the store may end
        else:
            store.wait([key], timedelta(seconds=_NEWS_S))
    except (RuntimeError, ValueError):  # nobody there, or nothing said
        return not is_main
    return False


def barrier() -> None:
    """Wait for every rank of the job."""
    if dist.get_world_size() > 1:
        dist.barrier()


class FailedTogether(Exception):
    """Some rank failed; all ranks raise this with the same text."""


def together(what: str, action: Callable[[], Any]) -> list[Any]:
    """Run ``action`` on every rank and gather the results; when any rank raised, all raise. Collective."""
    result, failure, cause = None, "", None
    try:
        result = action()
    except Exception as error:
        failure, cause = f"{what}: {type(error).__name__}: {error}", error
    outcomes: list[Any] = [(result, failure)]
    if dist.get_world_size() > 1:
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (result, failure))
    failures = [f"rank {rank}, {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if failures:
        raise FailedTogether("; ".join(failures)) from cause
    return [result for result, _ in outcomes]


def on_main(action: Callable[[], None]) -> Callable[[], None]:
    """``action`` on global rank 0, nothing elsewhere."""
    return action if dist.get_rank() == 0 else lambda: None
