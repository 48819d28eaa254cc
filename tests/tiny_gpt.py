"""A four-layer language model with its optimizer: the smallest thing that exercises every parallel path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mstar_mega.config import ParallelConfig
from mstar_mega.platform import distributed
from mstar_mega.training.optimizer_state import restore_training_state, sharded_training_state

VOCABULARY, LENGTH, MICROBATCH, BATCH = 64, 12, 2, 8


@dataclass
class TinyRun:
    """A model in training; ``bare`` is ``model`` without its data-parallel wrapper."""

    model: Any
    bare: Any
    optimizer: Any

    def sharded_state(self) -> dict[str, Any]:
        """What a checkpoint of this run holds."""
        return sharded_training_state(self.bare, self.optimizer)

    def load(self, state: dict[str, Any]) -> None:
        """Take over a loaded state."""
        restore_training_state(self.bare, self.optimizer, state)


def build(parallel: ParallelConfig, seed: int = 0, hidden: int = 32, precision: torch.dtype = torch.float32) -> TinyRun:
    """Lay the ranks out and make a fresh model."""
    distributed.initialize(parallel, seed)

    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    bf16 = precision is torch.bfloat16
    config = TransformerConfig(
        num_layers=4,
        hidden_size=hidden,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=2 * hidden,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        params_dtype=precision,
        pipeline_dtype=precision,
        bf16=bf16,
        finalize_model_grads_func=finalize_model_grads,
    )
    bare: Any = _model(config)
    inner = Float16Module(config, bare) if bf16 else bare
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner)
    optimizer_config = OptimizerConfig(lr=1e-2, bf16=bf16, params_dtype=precision, clip_grad=0.5)
    return TinyRun(model, bare, get_megatron_optimizer(optimizer_config, [model], use_gloo_process_groups=False))


def train(run: TinyRun, steps: range) -> list[float]:
    """Train on the batches of these step numbers (two, in turn); returns the mean loss of each over all ranks."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    layout = distributed.layout()
    losses = []
    for step in steps:
        mine = _microbatches(step)[layout.data_rank :: layout.data_size]
        run.model.zero_grad_buffer()
        run.optimizer.zero_grad()
        parts = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(mine),
            model=[run.model],
            num_microbatches=len(mine),
            seq_length=LENGTH * MICROBATCH,  # one stream
            micro_batch_size=1,
            forward_only=False,
        )
        run.optimizer.step()
        total = distributed.sum_over_data({"loss": sum(part["loss"].item() for part in parts)})
        losses.append(total["loss"] / (BATCH // MICROBATCH))
    # The last stage computes the losses; the highest rank is always on it.
    return distributed.all_gather_objects(losses, torch.distributed.group.WORLD)[-1]


def weights(run: TinyRun) -> list[torch.Tensor]:
    """This rank's weights and optimizer states, as copies."""
    inner = run.optimizer.chained_optimizers[0].optimizer
    states = [state[key] for state in inner.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return [tensor.detach().clone() for tensor in [*run.bare.parameters(), *states]]


def _model(config: Any) -> Any:
    # Only once the CPU platform is applied.
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from mstar_mega.models.language import LanguageModel

    class Stage(LanguageModel):
        """A stage on its own: token ids to the loss of the next ones."""

        model_type = ModelType.encoder_or_decoder
        share_embeddings_and_output_weights = False

        def __init__(self) -> None:
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            super().__init__(config, VOCABULARY, first, last)
            self.pre_process, self.post_process = first, last

        def set_input_tensor(self, tensor: Any) -> None:
            """megatron's schedules hand over a list of one."""
            super().set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            """int64 [B, LENGTH] each -> losses [B * LENGTH, 1] on the last stage, [B * LENGTH, 1, hidden] elsewhere."""
            embedded = self.embedding(tokens.reshape(1, -1), None) if self.pre_process else None
            hidden = self.decoder(hidden_states=embedded, attention_mask=None, attention_bias=Rows())
            if not self.post_process:
                return hidden
            return vocab_parallel_cross_entropy(self.output_layer(hidden)[0].float(), labels.reshape(-1, 1))

    return Stage()


class Rows:
    """An attention plan: the stream is sequences of LENGTH, one behind the other, each causal."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]."""
        q, k, v = (x.unflatten(0, (-1, LENGTH)).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


def _microbatches(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step % 2)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return list(tokens.split(MICROBATCH))


def _forward(microbatches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(microbatches)
    return model(tokens[:, :-1], tokens[:, 1:]), lambda output: (output.mean(), {"loss": output.mean().detach()})
