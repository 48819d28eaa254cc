"""InternViT, tensor-parallel: pre-norm blocks with layer scale, every layer used, no final norm.

Source of the maths: OpenGVLab/InternVL ``modeling_intern_vit.py`` (shapes and order checked against its outputs).
Heads and the MLP are cut over tensor ranks; norms, layer scale, patch and position embeddings are replicated (small).
Sequence parallelism does not reach the vision tower.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn


class ParallelMLP(MegatronModule):
    """Linear -> exact GELU -> Linear, with biases, cut over tensor ranks."""

    def __init__(self, config: TransformerConfig, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(config)
        self.fc1 = _column(config, inputs, hidden)
        self.fc2 = _row(config, hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)[0]))[0]


class VisionBlock(MegatronModule):
    """x += ls1 * Attn(LN1(x)); x += ls2 * MLP(LN2(x)). Query, key and value rows are interleaved per head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.norm1 = nn.LayerNorm(hidden, eps=config.layernorm_epsilon)
        self.norm2 = nn.LayerNorm(hidden, eps=config.layernorm_epsilon)
        self.qkv = _column(config, hidden, 3 * hidden)
        self.proj = _row(config, hidden, hidden)
        self.mlp = ParallelMLP(config, hidden, config.ffn_hidden_size, hidden)
        self.ls1 = nn.Parameter(torch.ones(hidden))
        self.ls2 = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """[tiles, positions, hidden] -> the same."""
        tiles, positions, _ = x.shape
        qkv = self.qkv(self.norm1(x))[0].view(tiles, positions, -1, 3, self.config.kv_channels)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.ls1 * self.proj(attended.transpose(1, 2).reshape(tiles, positions, -1))[0]
        return x + self.ls2 * self.mlp(self.norm2(x))


class VisionTower(MegatronModule):
    """Tiles -> patch features, the class token dropped."""

    def __init__(self, config: TransformerConfig, image_size: int, patch_size: int) -> None:
        super().__init__(config)
        self.grid = image_size // patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, patch_size, stride=patch_size)
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + self.grid**2, config.hidden_size))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """float [tiles, 3, image_size, image_size] -> [tiles, grid * grid, hidden], row-major."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.size(0), -1, -1), x], dim=1) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """As megatron's default, which does not look inside a ModuleList."""
        state = sharded_state_dict_default(self.patch_embedding, f"{prefix}patch_embedding.", sharded_offsets, metadata)
        own = {"class_embedding": self.class_embedding, "position_embedding": self.position_embedding}
        state.update(make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets))
        for i, block in enumerate(self.blocks):
            state.update(sharded_state_dict_default(block, f"{prefix}blocks.{i}.", sharded_offsets, metadata))
        return state


class PixelShuffleConnector(MegatronModule):
    """Merge 2 x 2 patches into channels (InternVL's version 2 order), LayerNorm, two-layer MLP to the LM's width."""

    def __init__(self, config: TransformerConfig, vision_hidden: int) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(4 * vision_hidden, eps=1e-5)
        self.mlp = ParallelMLP(config, 4 * vision_hidden, config.hidden_size, config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """[tiles, grid * grid, C] -> [tiles, grid * grid / 4, hidden]."""
        return self.mlp(self.norm(pixel_shuffle(features)))


def pixel_shuffle(features: Tensor) -> Tensor:
    """[tiles, g * g, C] -> [tiles, (g / 2)^2, 4 C]; token (R, S) holds patches (2R, 2S), (2R, 2S+1), (2R+1, 2S), ..."""
    tiles, patches, channels = features.shape
    half = int(patches**0.5) // 2
    x = features.view(tiles, half, 2, half, 2, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(tiles, half * half, 4 * channels)


def _column(config: TransformerConfig, inputs: int, outputs: int) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        inputs, outputs, config=config, init_method=config.init_method, bias=True, gather_output=False
    )


def _row(config: TransformerConfig, inputs: int, outputs: int) -> RowParallelLinear:
    return RowParallelLinear(
        inputs, outputs, config=config, init_method=config.init_method, bias=True, input_is_parallel=True,
        skip_bias_add=False,
    )  # fmt: skip
