"""How many slots there is memory for, and what is left for prompts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mstar_mega.config import GenerationConfig
from mstar_mega.generation.runner import buckets
from mstar_mega.models.lmm import LMM
from mstar_mega.platform.distributed import model_copy

MOST = 512
"""Slots that ``auto`` takes: beyond, a step's time grows as fast as they do."""
_SHARE, _OWN_SHARE = 0.7, 0.35
"""Of a GPU's free memory that caches may take, the rest is for prefills; and that samples' own tokens may take."""
_CPU_BYTES = 4 * 2**30
"""On the CPU, in place of what a device has free."""


def slots_within(free: int, per_token: int, limit: int) -> int:
    """What ``generation.slots auto`` means with so many free bytes: of the sizes that steps come in, the largest whose
    samples' own tokens, ``limit`` each of ``per_token`` bytes, take their share; at least 1."""
    fitting = int(_OWN_SHARE * free) // (per_token * limit)
    return max([1, *(size for size in buckets(MOST) if size <= fitting)])


def bytes_per_token(model: LMM) -> int:
    """Keys and values of a token on this rank."""
    size = model.size
    layers, heads = len(model.language.decoder.layers), size.kv_heads // model.tensor_group.size()
    return 2 * layers * heads * size.head_dim * model.config.params_dtype.itemsize


def slots_of(model: LMM, config: GenerationConfig, device: torch.device) -> int:
    """The settings' slots. Collective over the model copy where they are ``auto``."""
    if config.slots != "auto":
        return config.slots
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _CPU_BYTES
    return _least(slots_within(free, bytes_per_token(model), config.max_new_tokens), device)


def slab_tokens(model: LMM, wanted: int, own: int, device: torch.device) -> int:
    """Tokens of prompts that there is memory for beside ``own`` tokens of samples, at most ``wanted``. On the CPU
    untouched memory costs nothing. Collective over the model copy."""
    if device.type != "cuda":
        return wanted
    room = int(_SHARE * torch.cuda.mem_get_info(device)[0]) // bytes_per_token(model) - own
    return _least(max(0, min(wanted, room)), device)


def _least(number: int, device: torch.device) -> int:
    """The least of the model copy's ranks: all run one schedule."""
    group = model_copy()
    if group.size() == 1:
        return number
    least = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return int(least)
