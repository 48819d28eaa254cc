"""Weights and optimizer state as megatron shards: one form of them, whichever way the state is held in memory.

A plain optimizer keeps all of its state on every data-parallel rank, a distributed one a part on each
(``parallel.distributed_optimizer``). Both are written as the plain one's tensors, so that either loads what the other
saved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_FORMAT = "fully_reshardable"  # megatron's name for parameter-shaped tensors, which any layout can cut


def sharded_training_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """The sharded state of a megatron model and its optimizer, to save or as load template. Collective."""
    has_step = ensure_adam_state(optimizer)
    weights = model.sharded_state_dict()
    part = _single(optimizer)
    if isinstance(part, DistributedOptimizer):
        return {"model": weights, "optimizer": _gathered_state(part, weights, has_step)}
    states = optimizer.sharded_state_dict(weights)
    if has_step:
        # megatron leaves out a step of zero, without which torch's Adam cannot be loaded.
        states.get("optimizer", states)["state"].setdefault("common_step", torch.tensor(0.0, device="cpu"))
    return {"model": weights, "optimizer": states}


def restore_training_state(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Take over what was loaded for a :func:`sharded_training_state` template; the learning rates stay."""
    model.load_state_dict(state["model"])
    part = _single(optimizer)
    _keep_rates(part.param_groups, state["optimizer"])
    if isinstance(part, DistributedOptimizer):
        _take_own_part(part, state["optimizer"])
    else:
        optimizer.load_state_dict(state["optimizer"])


def full_precision_weights(optimizer: Any) -> list[Tensor]:
    """The float32 copies (a distributed optimizer's: of this rank's part) that a mixed-precision optimizer trains; none
    in float32."""
    if optimizer is None:
        return []
    part = _single(optimizer)
    name = "shard_fp32_from_float16_groups" if isinstance(part, DistributedOptimizer) else "fp32_from_float16_groups"
    return [weight for group in getattr(part, name, []) for weight in group]


def ensure_adam_state(optimizer: Any) -> bool:
    """Give every parameter its Adam moments now, as the first step would: an empty state cannot be resharded.

    True when the optimizer counts steps per parameter (torch's own Adam; fused ones count per group).
    """
    adam = _single(optimizer).optimizer
    has_step = isinstance(adam, torch.optim.Adam)
    for parameter in [p for group in adam.param_groups for p in group["params"]]:
        state = adam.state[parameter]
        if not state:
            if has_step:
                state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"] = torch.zeros_like(parameter.data)
            state["exp_avg_sq"] = torch.zeros_like(parameter.data)
    return has_step


def _single(optimizer: Any) -> Any:
    """The optimizer inside megatron's chain of them, which has one link for a model without experts."""
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return part


_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells parameter groups of one model apart."""


def _keep_rates(present: list[dict[str, Any]], states: dict[str, Any]) -> None:
    """Give loaded parameter groups the present ones' highest and lowest rate: the settings rule, not a checkpoint.

    megatron-core from 0.19 on looks for a group with the same rates, and finds none where the settings have changed.
    """
    rates = {_kind(group): {key: group[key] for key in ("max_lr", "min_lr")} for group in present}
    for group in states.get("optimizer", states)["param_groups"]:
        group.update(rates.get(_kind(group), {}))


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in _KIND)


def _gathered_state(part: DistributedOptimizer, weights: dict[str, Any], has_step: bool) -> dict[str, Any]:
    """All ranks' parts in the shape, and under the names, of the plain optimizer's state."""
    found = part.sharded_state_dict(weights, metadata={"distrib_optim_sharding_type": _FORMAT})
    groups = found["optimizer"]["param_groups"]
    inner: dict[str, Any] = {"param_groups": groups, "state": {}}
    if has_step:
        (step,) = {group.pop("step") for group in groups}
        inner["state"]["common_step"] = torch.tensor(step, device="cpu")
    mixed = bool(full_precision_weights(part))
    states: dict[str, Any] = {"optimizer": inner} if mixed else inner
    states["param_state"] = {i: _as_plain(tensors, mixed) for i, tensors in found["param_state"].items()}
    return states


def _as_plain(tensors: dict[str, Any], mixed: bool) -> dict[str, Any]:
    """Float32 copies of bfloat16 weights go by the plain optimizer's name; float32 weights are the model's already."""
    tensors = dict(tensors)
    copy = tensors.pop("param")
    if mixed:
        name = copy.key.replace("optimizer.state.param.", "optimizer.state.fp32_param.", 1)
        tensors["fp32_param"] = replace(copy, key=name)
    return tensors


def _take_own_part(part: DistributedOptimizer, states: dict[str, Any]) -> None:
    """Load what :func:`_gathered_state` was the template of."""
    inner = states.get("optimizer", states)
    step = inner["state"].get("common_step")
    for group in inner["param_groups"]:
        if step is not None:
            group["step"] = float(step)
    plain = part._set_main_param_and_optimizer_states

    def keep_the_rest(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        # megatron copies every entry of the state and finds no step among the tensors of a file.
        plain(model_param, {**part._get_main_param_and_optimizer_states(model_param), **tensors})

    part._set_main_param_and_optimizer_states = keep_the_rest
    try:
        part.load_state_dict(
            {
                "optimizer": {"param_groups": inner["param_groups"]},
                "param_state": states["param_state"],
                "param_state_sharding_type": _FORMAT,
            }
        )
    finally:
        del part._set_main_param_and_optimizer_states
    for own in part.optimizer.state.values():
        if "step" in own:  # megatron gives all parameters one tensor, which torch's Adam would count up for each
            own["step"] = own["step"].detach().to("cpu", copy=True)
