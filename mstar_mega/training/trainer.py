"""The optimizer step through megatron-core's schedules, for the policy and the PRM alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mstar_mega.config import OptimizerConfig, ParallelConfig
from mstar_mega.data.types import Query
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import Prompt
from mstar_mega.platform import watch
from mstar_mega.platform.distributed import device, layout
from mstar_mega.training.batches import Batch, Microbatch, TrainGroup, dealt, microbatches
from mstar_mega.training.optimizer_state import full_precision_weights, restore_training_state, sharded_training_state


class NonFiniteLossError(ValueError):
    """Loss or gradient is NaN or infinite; the weights are as they were before the step."""


@dataclass
class StepStats:
    """What one optimizer step did, equal on every rank."""

    loss: float
    """Mean over the whole batch's counted tokens (SFT) or steps (PRM), in nats; see ``optimizer.loss_mean``."""
    grad_norm: float
    learning_rate: float
    tokens: int
    """Counted tokens (SFT) or steps (PRM)."""
    computed_tokens: int
    """Tokens that went through the model: each response's, and a prompt's once for all responses that shared it."""
    queries: int
    """Distinct ones."""
    responses: int


class Trainer:
    """A model with its optimizer and schedule."""

    def __init__(
        self,
        model: LMM,
        config: OptimizerConfig,
        prompt_of: Callable[[Query], Prompt],
        total_steps: int,
        parallel: ParallelConfig | None = None,
    ) -> None:
        """``parallel``: of its settings those that say how gradients and optimizer state are shared; None: defaults."""
        parallel = parallel or ParallelConfig()
        self.model, self.config, self.prompt_of = model, config, prompt_of
        self._total_steps, self._distributed = total_steps, parallel.distributed_optimizer
        self.optimizer: Any = None
        overlap = device().type == "cuda" if parallel.overlap_reduction is None else parallel.overlap_reduction
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=self._distributed
        )
        self.wrapped = DistributedDataParallel(model.config, ddp_config, model)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.no_sync_func = self.wrapped.no_sync if overlap else None
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments and restart the schedule."""
        config = self.config
        before = full_precision_weights(self.optimizer)
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=self.model.config.bf16,
                params_dtype=self.model.config.params_dtype,
                use_distributed_optimizer=self._distributed,
            ),
            [self.wrapped],
            use_gloo_process_groups=False,
        )
        # bfloat16 weights alone would forget what is smaller than their spacing.
        for old, new in zip(before, full_precision_weights(self.optimizer), strict=bool(before)):
            new.data.copy_(old.data)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=self._decay_steps,
            lr_decay_style="WSD" if config.schedule == "wsd" else config.schedule,
            wsd_decay_steps=self._wsd_steps,
            lr_wsd_decay_style="linear",
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            # The settings rule, not a checkpoint's: equal ones resume exactly, changed ones take effect.
            override_opt_param_scheduler=True,
            use_checkpoint_opt_param_scheduler=False,
        )
        # The schedule's value before the first increment is that of step 0: count from 1, so no step has rate 0.
        self.scheduler.step(increment=1)

    def reconfigure(self, config: OptimizerConfig, total_steps: int) -> None:
        """Go on with other optimizer settings, from fresh optimizer state."""
        self.config, self._total_steps = config, total_steps
        self.reset_optimizer()

    def set_total_steps(self, total_steps: int) -> None:
        """Let the schedule fall within so many steps since the last reset; those that are done count."""
        self._total_steps = total_steps
        self.scheduler.lr_decay_steps, self.scheduler.wsd_decay_steps = self._decay_steps, self._wsd_steps
        self.scheduler.step(increment=0)

    @property
    def _decay_steps(self) -> int:
        return max(self._total_steps, self.config.warmup_steps + 1)

    @property
    def _wsd_steps(self) -> int:
        return round(self._total_steps * self.config.decay_share)

    def step(self, groups: Sequence[TrainGroup]) -> StepStats:
        """One optimizer step on a batch that every rank passes whole; each trains on its data-parallel share.

        Raises NonFiniteLossError, before any weight changes, when loss or gradient norm is not finite.
        """
        mine = self.share(groups) or [_without_loss(groups[0])]
        model = self.model
        batches = microbatches(
            mine, self.prompt_of, self.config, model.stream_multiple, model.rope.regimes, device(),
            model.unpadded_prompts,
        )  # fmt: skip
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[self.wrapped],
            num_microbatches=len(batches),
            seq_length=1,  # shapes travel with the tensors (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=False,
        )
        nothing = torch.zeros((), dtype=torch.float64, device=device())
        names = ("loss", "count", "tokens", "computed_tokens")
        total = torch.stack([sum((output[name] for output in outputs), nothing) for name in names])
        loss_sum, count, tokens, computed = _over_the_job(total).tolist()
        loss = loss_sum / max(count, 1.0)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLossError(f"loss {loss}, gradient norm {grad_norm}")
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step(increment=1)
        # A batch knows its size without reading the other ranks' shares.
        responses = groups.responses if isinstance(groups, Batch) else sum(len(g.responses) for g in groups)
        return StepStats(loss, grad_norm, learning_rate, int(tokens), int(computed), len(groups), responses)

    def share(self, groups: Sequence[TrainGroup]) -> list[TrainGroup]:
        """This data-parallel rank's part of a batch: about as many tokens as the others', not as many groups."""
        place = layout()
        if isinstance(groups, Batch):  # knows without reading the others' groups
            costs = groups.costs
        else:
            costs = [1 + sum(map(len, group.responses)) for group in groups]
        return [groups[i] for i in dealt(costs, place.data_size)[place.data_rank]]

    def sharded_state(self) -> dict[str, Any]:
        """megatron's sharded state of weights and optimizer, to save or as a template to load into."""
        return sharded_training_state(self.model, self.optimizer)

    def load_state(self, state: dict[str, Any], scheduler: dict[str, Any]) -> None:
        """Continue from a state read through :meth:`sharded_state` and the schedule saved with it."""
        restore_training_state(self.model, self.optimizer, state)
        config = self.config
        for group in self.optimizer.param_groups:  # the settings rule, as for the schedule
            group.update(betas=(config.beta1, config.beta2), eps=config.eps)
        self.scheduler.num_steps = 0  # megatron adds the loaded count to the present one
        self.scheduler.load_state_dict(scheduler)

    def load_weights(self, weights: dict[str, Any]) -> None:
        """Replace the model's weights, and the optimizer's full-precision copies of them."""
        self.model.load_state_dict(weights)
        self.optimizer.reload_model_params()

    def copy_weights(self) -> dict[str, Any]:
        """A copy of this rank's weights, for :meth:`load_weights`."""
        return {name: value.clone() for name, value in weights_of(self.model).items()}


def weights_of(model: LMM) -> dict[str, Tensor]:
    """This rank's weights by name, as they lie in the model."""
    return {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}


def _forward_step(data: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    watch.beat()
    batch = next(data)
    return model(batch.packed), partial(_loss, batch, model)


def _loss(batch: Microbatch, wrapped: Any, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, count = batch.loss(wrapped.module, hidden)
    # Tensors: a number would have the host wait for this forward before it starts the backward.
    sizes = {"tokens": batch.loss.tokens, "computed_tokens": batch.tokens}
    numbers = {name: loss.detach().new_full((), size, dtype=torch.float64) for name, size in sizes.items()}
    return loss, count, {"loss": loss.detach().double(), "count": count.double(), **numbers}


def _without_loss(group: TrainGroup) -> TrainGroup:
    """For a rank without a share of a small batch: a pass that takes part in the collectives and adds nothing."""
    if group.step_ends is None:
        return TrainGroup(group.query, [[]])
    return TrainGroup(group.query, [[]], [[]], [[]])


def _over_the_job(total: Tensor) -> Tensor:
    """Sum over data-parallel ranks, then tell every pipeline stage what the last one knows."""
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    dist.broadcast(
        total,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return total
