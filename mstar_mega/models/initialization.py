"""Random weights that do not depend on the parallel layout: every tensor is drawn whole, by its own name."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mstar_mega.kernels.noise import key_of
from mstar_mega.models.lmm import LMM


def initialize_weights(model: LMM, seed: int, draw: bool = True) -> None:
    """Fill all parameters of this stage; without ``draw`` those that are random with NaN, which cannot go unnoticed.

    Matrices and embeddings N(0, init_std), those that write into the language model's residual stream divided by
    sqrt(2 layers); biases 0; norms 1; layer scale 1 (InternVL's own factor). The score head's rows start at 0:
    without likelihoods every step scores 0.5.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if not draw and _is_random(name):
                parameter.fill_(torch.nan)
            else:
                parameter.copy_(_shard_of(_whole_tensor(name, parameter, model, seed), name, parameter, model))


def canonical_name(name: str, model: LMM) -> str:
    """The parameter's name with the layer's number over all pipeline stages."""
    match = re.match(r"language\.decoder\.layers\.(\d+)\.(.*)", name)
    if not match:
        return name
    layer = model.language.decoder.layers[int(match[1])].layer_number - 1
    return f"language.decoder.layers.{layer}.{match[2]}"


def _is_random(name: str) -> bool:
    is_constant = name in ("score_head", "likelihood_weights") or "norm" in name
    return not is_constant and not name.endswith(("bias", ".ls1", ".ls2"))


def _whole_tensor(name: str, parameter: Tensor, model: LMM, seed: int) -> Tensor:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= model.tensor_group.size()  # type: ignore[attr-defined]
    if name == "likelihood_weights":
        # What the trunk itself finds unlikely is doubtful from the start.
        return torch.tensor([0.3, 0.0])
    if name == "score_head" or name.endswith("bias"):
        return torch.zeros(shape)
    if not _is_random(name):
        return torch.ones(shape)
    std = model.size.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= (2 * model.config.num_layers) ** 0.5
    generator = torch.Generator("cpu").manual_seed(key_of(seed, "weights", canonical_name(name, model)))
    return torch.randn(shape, generator=generator, device="cpu") * std


def _shard_of(whole: Tensor, name: str, parameter: Tensor, model: LMM) -> Tensor:
    size, rank = model.tensor_group.size(), model.tensor_group.rank()
    if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
        return whole
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    if name.startswith("language") and "linear_fc1" in name:
        # Gate and up halves are cut separately, then stacked per rank (megatron's gated MLP).
        gate, up = whole.chunk(2, dim=0)
        return torch.cat([gate.chunk(size, dim)[rank], up.chunk(size, dim)[rank]])
    return whole.chunk(size, dim)[rank]
