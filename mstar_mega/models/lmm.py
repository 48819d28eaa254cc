"""The large multimodal model: vision tower -> connector -> language model -> vocabulary head or score head.

Vision tower and connector live on the first pipeline stage, the heads on the last. The policy ends in the vocabulary
head; the process reward model (PRM) is the same trunk with a score head.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mstar_mega.config import ParallelConfig, Recompute
from mstar_mega.kernels import flash
from mstar_mega.kernels.linear_head import linear_logits
from mstar_mega.kernels.linear_logprob import linear_cross_entropy, linear_logprob
from mstar_mega.kernels.process_scores import span_sums, step_scores
from mstar_mega.models.attention import AttentionPlan
from mstar_mega.models.connectors import build_connector
from mstar_mega.models.language import LanguageModel
from mstar_mega.models.mapping import Head
from mstar_mega.models.packing import PackedBatch, StepIndex
from mstar_mega.models.rope import Rope
from mstar_mega.models.sizes import LanguageSize, VisionSize
from mstar_mega.models.vision import build_tower
from mstar_mega.platform.distributed import device

WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""An extension of NVIDIA's apex (built with ``--cuda_ext``): adds a product to a float32 gradient in one kernel."""


class LMM(MegatronModule):
    """One pipeline stage of the model."""

    def __init__(
        self,
        vision: VisionSize,
        language: LanguageSize,
        config: TransformerConfig,
        head: Head = "vocabulary",
        recompute_vision: bool = False,
    ) -> None:
        super().__init__(config)
        self.size = language
        self.head = head
        self.model_type = ModelType.encoder_or_decoder  # asked for by megatron's schedules
        self.share_embeddings_and_output_weights = False  # likewise
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.rope = Rope(language.head_dim, language.rope_theta, language.rope_scaling)
        if self.pre_process:
            self.vision = build_tower(_vision_config(config, vision), vision, recompute_vision)
            self.connector = build_connector(config, vision)
        self.language = LanguageModel(
            config, language.padded_vocab, self.pre_process, self.post_process, head=head != "linear"
        )
        if self.post_process and head != "vocabulary":
            self.score_head = nn.Parameter(torch.zeros(2, language.hidden))
        if self.post_process and head == "likelihood":
            self.likelihood_weights = nn.Parameter(torch.zeros(2))
        _mark_shards(self)

    @property
    def stream_multiple(self) -> int:
        """Streams must be this many tokens long, times anything."""
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1

    @property
    def unpadded_prompts(self) -> bool:
        """Whether attention within prompts is flash-attn's; see ``pack``."""
        return flash.takes(next(self.parameters()).device, self.config.params_dtype, self.size.head_dim)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Called by megatron's schedules with the previous stage's output."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.language.set_input_tensor(tensor)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden] (first stage only)."""
        embedded: Tensor = self.language.embedding.word_embeddings(tokens[None]).squeeze(0)
        return embedded

    def embed(self, batch: PackedBatch) -> Tensor:
        """Token embeddings [T, hidden] with image features written over their positions (first stage only)."""
        embedded = self.embed_tokens(batch.tokens)
        if batch.pixels is None:
            return with_zero_gradients(embedded, [*self.vision.parameters(), *self.connector.parameters()])
        features = self.image_features(batch.pixels.to(embedded.device, embedded.dtype), batch.grids)
        if batch.feature_index is not None:
            features = features[batch.feature_index]
        assert features.size(0) == batch.image_index.numel(), (features.shape, batch.image_index.shape)
        return embedded.index_copy(0, batch.image_index, features.to(embedded.dtype))

    def image_features(self, pixels: Tensor, grids: Tensor | None) -> Tensor:
        """What replaces token embeddings, [features, hidden], of pictures as ``Prompt`` holds them (first stage)."""
        return self.connector(self.vision(pixels, grids), grids).flatten(0, -2)

    def trunk(
        self, embedded: Tensor | None, positions: Tensor, plan: AttentionPlan, lengths: Tensor | None = None
    ) -> Tensor:
        """Run this stage's layers.

        Args:
            embedded: [T, hidden] on the first stage, None on the others (their input was set).
            positions: int64 [T].
            lengths: int64 [T], the length of each token's sequence; None: it ends with the token.

        Returns:
            Last stage: [T, hidden] after the final norm, whole on every tensor rank.
            Other stages: [T, 1, hidden], or this rank's slice of T under sequence parallelism.
        """
        if embedded is not None:
            embedded = embedded[:, None]
            if self.config.sequence_parallel:
                embedded = scatter_to_sequence_parallel_region(embedded)
        hidden = self.language.decoder(
            hidden_states=embedded,
            attention_mask=None,
            attention_bias=self.rope.rotating(plan, positions, self.config.params_dtype, lengths),
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # Behind the vocabulary head each rank holds a partial gradient (reduce-scatter adds them); behind the
            # replicated score head each holds the whole (take the slice).
            partial = self.head == "vocabulary"
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=partial).squeeze(1)
        if self.head == "vocabulary":
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return hidden.squeeze(1)

    def forward(self, batch: PackedBatch) -> Tensor:
        """One packed batch through this stage; see :meth:`trunk` for the result."""
        embedded = self.embed(batch) if self.pre_process else None
        return self.trunk(embedded, batch.positions, batch.plan, batch.lengths)

    def logits(self, hidden: Tensor) -> Tensor:
        """[K, hidden] from :meth:`trunk` -> this rank's float32 logits [K, padded_vocab / tensor] (last stage)."""
        return linear_logits(hidden, self.language.output_layer.weight)

    def log_probs(self, hidden: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of target ids, float32 [K], for selected rows [K, hidden] (last stage)."""
        weight = self.language.output_layer.weight
        return linear_logprob(hidden, weight, target, temperature=temperature, **self._vocabulary())

    def token_loss(self, hidden: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Minus the sum of the target ids' log-probabilities, each times its ``weight`` (float32 [K]; None: 1), for
        selected rows [K, hidden] (last stage)."""
        output = self.language.output_layer.weight
        return linear_cross_entropy(hidden, output, target, row_weight=weight, **self._vocabulary())

    def _vocabulary(self) -> dict[str, Any]:
        """This rank's slice, for the kernels; the gradient of hidden rows is summed where the trunk hands them out."""
        local = self.size.padded_vocab // self.tensor_group.size()
        return {
            "valid_vocab": self.size.vocab,
            "vocab_start": self.tensor_group.rank() * local,
            "group": self.tensor_group,
            "reduce_hidden_grad": False,
        }

    def step_logits(self, hidden: Tensor, steps: StepIndex) -> Tensor:
        """PRM logits, float32 [K]: that a step is good (last stage, score head).

        linear: two rows on the trunk's output at the step's last token. likelihood: that, and the weighted
        log-probabilities, by this trunk's own vocabulary head, of the response up to the step's end and of the step
        alone. The trunk already knows what it would have written: judging needs no second way of seeing the image, and
        every token of a step with a bad label is made less likely where it is wrong.
        """
        logits = step_scores(hidden, steps.position, self.score_head, as_logit=True)
        if self.head == "likelihood":
            # Each rank's slice of the vocabulary gives a part of the gradient; the score rows give each rank all of it.
            whole = copy_to_tensor_model_parallel_region(hidden)
            log_probs = self.log_probs(whole[steps.source], steps.target)
            of_response, of_step = (span_sums(log_probs, start, steps.end) for start in (steps.response, steps.start))
            logits = logits + self.likelihood_weights[0] * of_response + self.likelihood_weights[1] * of_step
        return logits

    def no_loss(self, hidden: Tensor) -> Tensor:
        """Zero, for a batch without anything to train on; every parameter gets a gradient (last stage)."""
        heads = [] if self.head == "vocabulary" else self.score_parameters()
        if self.head != "linear":
            heads.append(self.language.output_layer.weight)
        return with_zero_gradients(hidden, heads).sum() * 0.0

    def score_parameters(self) -> list[nn.Parameter]:
        """What a score head has besides the policy's weights (last stage)."""
        return [self.score_head, *([self.likelihood_weights] if self.head == "likelihood" else [])]


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def with_zero_gradients(x: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """``x`` itself; in its backward pass each trained parameter gets a gradient of zeros.

    A reduction that starts as soon as gradients are complete waits for every parameter in every batch.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not (torch.is_grad_enabled() and trained):
        return x
    wide: Tensor = _ZeroGradients.apply(x, *trained)
    return wide


def _mark_shards(model: nn.Module) -> None:
    """Say of every cut weight along which dimension it is cut, where it is not said yet.

    Initialisation and the gradient norm ask for it. megatron-core up to 0.18 says it only while it initialises, which
    we do ourselves.
    """
    for part in model.modules():
        dim = 0 if isinstance(part, ColumnParallelLinear | VocabParallelEmbedding) else 1
        if isinstance(part, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            if not hasattr(part.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(part.weight, is_parallel=True, dim=dim, stride=1)
            assert part.weight.tensor_model_parallel and part.weight.partition_dim == dim, part


def transformer_config(
    size: LanguageSize,
    *,
    dtype: torch.dtype,
    parallel: ParallelConfig | None = None,
    recompute: Recompute = "none",
    fused: bool = False,
) -> TransformerConfig:
    """The language model's megatron configuration.

    ``fused``: megatron's own fusions that need no TransformerEngine, weight gradients only where apex's extension is
    there and the model on CUDA.
    """
    parallel = parallel or ParallelConfig()
    return TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_hidden_size=size.ffn,
        num_attention_heads=size.heads,
        num_query_groups=size.kv_heads,
        kv_channels=size.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=size.eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=size.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers if parallel.pipeline > 1 else None,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # unused, but variable lengths refuse the default
        calculate_per_token_loss=True,
        batch_p2p_comm=False,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        recompute_modules=["core_attn", "mlp"] if recompute == "selective" else None,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=fused and device().type == "cuda" and find_spec(WEIGHT_GRADIENTS) is not None,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _vision_config(config: TransformerConfig, size: VisionSize) -> TransformerConfig:
    return replace(
        config,
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_hidden_size=size.ffn,
        num_attention_heads=size.heads,
        num_query_groups=size.heads,
        kv_channels=size.hidden // size.heads,
        layernorm_epsilon=size.eps,
        normalization="LayerNorm",
        gated_linear_unit=False,
        add_bias_linear=True,
        bias_activation_fusion=False,  # its GELUs are its own, and it adds no dropout
        bias_dropout_fusion=False,
        sequence_parallel=False,
        pipeline_model_parallel_size=1,
        num_layers_in_first_pipeline_stage=None,
        recompute_granularity=None,  # megatron's layers only; see Tower.recompute
        recompute_method=None,
        recompute_num_layers=None,
    )
