"""One pipeline stage of the language model, of megatron's parts: embeddings, transformer block, vocabulary head.

Not of megatron's ``GPTModel``, which is being retired. Names, order and sharding of the parameters are that model's, so
that weights and checkpoints are the same.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mstar_mega.models.attention import PlannedAttention
from mstar_mega.models.norms import RMSNorm


class LanguageModel(MegatronModule):
    """Embeddings on the first stage, this stage's layers, on the last stage the final norm and the vocabulary head."""

    def __init__(
        self, config: TransformerConfig, vocabulary: int, pre_process: bool, post_process: bool, head: bool = True
    ) -> None:
        """``vocabulary``: rows, padded. ``head`` false: no vocabulary head behind the last stage's norm."""
        super().__init__(config)
        group = parallel_state.get_tensor_model_parallel_group()
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, vocabulary, 0, position_embedding_type="none", scatter_to_sequence_parallel=False,
                tp_group=group,
            )  # fmt: skip
        self.decoder = TransformerBlock(config, block_spec(config), pre_process=pre_process, post_process=post_process)
        if post_process and head:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size, vocabulary, config=config, init_method=config.init_method, bias=False,
                gather_output=False, skip_bias_add=False, tp_group=group,
            )  # fmt: skip

    def set_input_tensor(self, tensor: Tensor | None) -> None:
        """What the next forward pass takes instead of embeddings: the previous stage's output."""
        self.decoder.set_input_tensor(tensor)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """As megatron's default; of the head, as of the embeddings, the weight alone, padded to any length."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)
        if (head := state.get(f"{prefix}output_layer.weight")) is not None:
            head.allow_shape_mismatch = True
        return state


class FeedForward(MLP):
    """megatron's gated MLP, from the config alone: what else a layer hands to its parts differs between releases."""

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size, tp_group=group)


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """This stage's layers: pre-norm attention by a plan (``attention.py``) and a gated MLP."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PlannedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=FeedForward,
        mlp_bda=get_bias_dropout_add,
        # The names that the norms have where they are fused with the next matrix.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    layers = [ModuleSpec(TransformerLayer, submodules=layer)] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
