"""A short name of a model's weights: equal for equal weights in whatever layout, different after any training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mstar_mega.kernels.noise import key_of, mix
from mstar_mega.models.initialization import canonical_name
from mstar_mega.models.lmm import LMM

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: LMM) -> str:
    """16 hexadecimal digits of the weights of all stages and tensor ranks. Collective over the model copy.

    A whole-number sum over all values, so that neither the cut over ranks nor the order of the additions changes it;
    each tensor counts times a number of its name.
    """
    total = torch.zeros(1, dtype=torch.int64, device="cpu")
    for name, parameter in model.named_parameters():
        # What every tensor rank holds whole counts once.
        if getattr(parameter, "tensor_model_parallel", False) or model.tensor_group.rank() == 0:
            total += _bits(parameter.detach()) * (key_of("fingerprint", canonical_name(name, model)) | 1)
    copy = parallel_state.get_model_parallel_group()
    if copy.size() > 1:
        total = total.to(next(model.parameters()).device)
        dist.all_reduce(total, group=copy)
    return f"{int(total) & (2**64 - 1):016x}"


def _bits(tensor: Tensor) -> Tensor:
    """Sum of the mixed bit patterns of all values, int64 [1], wrapping around."""
    words = tensor.contiguous().view(_WORDS[tensor.element_size()])
    return mix(words.to(torch.int64)).sum()[None].cpu()
