"""Vision towers, tensor-parallel: InternViT and CLIP on square tiles, SigLIP on strips of patches.

Sources of the maths: OpenGVLab/InternVL ``modeling_intern_vit.py``; CLIP ViT as in Phi-3.5-vision; the Idefics2 tower
as MiniCPM-Llama3-V 2.5 calls it (shapes and order checked against their outputs). Heads and the MLP are cut over tensor
ranks; norms, layer scale, patch and position embeddings are replicated (small). Sequence parallelism does not reach
the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from mstar_mega.kernels import flash
from mstar_mega.models.norms import LayerNorm
from mstar_mega.models.sizes import Activation, VisionSize


class ParallelMLP(MegatronModule):
    """Linear -> GELU -> Linear, with biases, cut over tensor ranks."""

    def __init__(
        self, config: TransformerConfig, inputs: int, hidden: int, outputs: int, activation: Activation = "gelu"
    ) -> None:
        super().__init__(config)
        self.activation = activation
        self.fc1 = column_parallel(config, inputs, hidden)
        self.fc2 = row_parallel(config, hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x)[0], self.activation))[0]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The three GELUs of :data:`Activation`."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class VisionBlock(MegatronModule):
    """x += ls1 * Attn(LN1(x)); x += ls2 * MLP(LN2(x)). Query, key and value rows are interleaved per head."""

    def __init__(self, config: TransformerConfig, size: VisionSize) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.norm1 = LayerNorm(hidden, eps=config.layernorm_epsilon)
        self.norm2 = LayerNorm(hidden, eps=config.layernorm_epsilon)
        self.qkv = column_parallel(config, hidden, 3 * hidden)
        self.proj = row_parallel(config, hidden, hidden)
        self.mlp = ParallelMLP(config, hidden, config.ffn_hidden_size, hidden, size.activation)
        self.layer_scale = size.layer_scale
        if size.layer_scale:
            self.ls1 = nn.Parameter(torch.ones(hidden))
            self.ls2 = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor, spans: flash.Spans | None = None) -> Tensor:
        """[tiles, positions, hidden] -> the same. ``spans``: where pictures begin, for flash-attn; else each row is
        one."""
        tiles, positions, _ = x.shape
        qkv = self.qkv(self.norm1(x))[0].view(tiles, positions, -1, 3, self.config.kv_channels)
        if spans is not None:
            q, k, v = qkv.flatten(0, 1).unbind(2)
            attended = flash.attention(q, k, v, spans, causal=False)
        else:
            q, k, v = qkv.permute(3, 0, 2, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        projected = self.proj(attended.reshape(tiles, positions, -1))[0]
        x = torch.addcmul(x, self.ls1, projected) if self.layer_scale else x + projected
        moved = self.mlp(self.norm2(x))
        return torch.addcmul(x, self.ls2, moved) if self.layer_scale else x + moved


class Tower(MegatronModule):
    """What the towers share: patch embedding, blocks, the norms around them, and their checkpoint state.

    Parts that the checkpoint has but nothing uses (``VisionSize.unused_layers``, a kept ``post_norm``) are frozen
    parameters: they are loaded, saved and exported like all others.
    """

    def __init__(self, config: TransformerConfig, size: VisionSize, recompute: bool = False) -> None:
        super().__init__(config)
        self.grid, self.used = size.grid, size.layers - size.unused_layers
        self.recompute = recompute
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, size.patch_size, stride=size.patch_size, bias=size.patch_bias
        )
        self.blocks = nn.ModuleList(VisionBlock(config, size) for _ in range(size.layers))
        for block in self.blocks[self.used :]:
            block.requires_grad_(False)
        self.pre_norm = LayerNorm(config.hidden_size, eps=size.eps) if size.pre_norm else None
        self.post_norm = LayerNorm(config.hidden_size, eps=size.eps) if size.post_norm != "none" else None
        self.applies_post_norm = size.post_norm == "applied"
        if self.post_norm is not None and not self.applies_post_norm:
            self.post_norm.requires_grad_(False)

    def encode(self, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Embedded patches [pictures, positions, hidden] through norms and used blocks.

        ``lengths``: the rows are one, [1, all positions, hidden], in which pictures of these lengths stand one after
        another; only for flash-attn.
        """
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        spans = None
        if lengths is not None or flash.takes(x.device, x.dtype, self.config.kv_channels):
            spans = flash.Spans.of(lengths or [x.size(1)] * x.size(0), x.device)
        recompute = self.recompute and self.training and x.requires_grad and torch.is_grad_enabled()
        for block in self.blocks[: self.used]:
            x = checkpoint(partial(block, spans=spans), False, x) if recompute else block(x, spans)
        if self.post_norm is not None and self.applies_post_norm:
            x = self.post_norm(x)
        return x

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """As megatron's default, which does not look inside a ModuleList."""
        own = {name: parameter for name, parameter in self.named_parameters(recurse=False)}
        state = make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets)
        for name, part in self.named_children():
            if part is not self.blocks:
                state.update(sharded_state_dict_default(part, f"{prefix}{name}.", sharded_offsets, metadata))
        for i, block in enumerate(self.blocks):
            state.update(sharded_state_dict_default(block, f"{prefix}blocks.{i}.", sharded_offsets, metadata))
        return state


class VisionTower(Tower):
    """Square tiles -> patch features, the class token dropped (InternViT, CLIP)."""

    def __init__(self, config: TransformerConfig, size: VisionSize, recompute: bool = False) -> None:
        super().__init__(config, size, recompute)
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + self.grid**2, config.hidden_size))

    def forward(self, pixels: Tensor, grids: Tensor | None = None) -> Tensor:
        """float [tiles, 3, image_size, image_size] -> [tiles, grid * grid, hidden], row-major; ``grids`` unused."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.size(0), -1, -1), x], dim=1) + self.position_embedding
        return self.encode(x)[:, 1:]


class StripTower(Tower):
    """Slices as strips of patches -> patch features (SigLIP NaViT, called as MiniCPM-Llama3-V 2.5 calls it).

    Two quirks of the original change results and are kept: (1) a patch's position is that of its place along the
    strip, spread over the first row of the position table, not its place in the picture; (2) the strip is filled up
    with empty patches to the longest slice of the call, nothing hides them from attention, and the spread is over
    that length. So a slice's features depend on the length that it is filled up to; it travels with the slice.
    """

    def __init__(self, config: TransformerConfig, size: VisionSize, recompute: bool = False) -> None:
        super().__init__(config, size, recompute)
        self.position_embedding = nn.Parameter(torch.empty(self.grid**2, config.hidden_size))

    def forward(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """
        Args:
            pixels: float [patches, 3, P, P], the patches of all slices one after another.
            grids: int64 [slices, 3]: rows, columns and the length filled up to, in patches.

        Returns:
            [slices, longest length, hidden]; places past a slice's length are zero.
        """
        rows, columns, lengths = grids.unbind(1)
        counts, filled = (rows * columns).tolist(), lengths.tolist()
        embedded = self.patch_embedding(pixels).flatten(1).split(counts)
        empty = torch.zeros_like(embedded[0][:1])
        if self.patch_embedding.bias is not None:
            empty = empty + self.patch_embedding.bias
        strips = [
            torch.cat([patches, empty.expand(length - count, -1)])
            + self.position_embedding[strip_positions(length, self.grid).to(pixels.device)]
            for patches, count, length in zip(embedded, counts, filled, strict=True)
        ]
        if flash.takes(empty.device, empty.dtype, self.config.kv_channels):  # of any lengths at once
            features = list(self.encode(torch.cat(strips)[None], filled)[0].split(filled))
            return nn.utils.rnn.pad_sequence(features, batch_first=True)
        features = list(strips)
        for length in sorted(set(filled)):
            chosen = [i for i, n in enumerate(filled) if n == length]
            for i, strip in zip(chosen, self.encode(torch.stack([strips[i] for i in chosen])), strict=True):
                features[i] = strip
        return nn.utils.rnn.pad_sequence(features, batch_first=True)


@lru_cache(maxsize=4096)
def strip_positions(length: int, buckets: int) -> Tensor:
    """Rows of the position table for a strip of patches, int64 [length], in the original's float32 arithmetic.

    It is not floor(i * buckets / length): the step is rounded to float32 before it is multiplied.
    """
    step = torch.tensor(1.0, device="cpu") / torch.tensor(length, device="cpu")
    places = torch.arange(0, 1 - 1e-6, float(step), dtype=torch.float32, device="cpu")
    boundaries = torch.arange(1 / buckets, 1.0, 1 / buckets, dtype=torch.float32, device="cpu")
    return torch.bucketize(places, boundaries, right=True)


def column_parallel(
    config: TransformerConfig, inputs: int, outputs: int, bias: bool = True, gather: bool = False
) -> ColumnParallelLinear:
    """A linear layer whose outputs are cut over tensor ranks (and collected again with ``gather``)."""
    return ColumnParallelLinear(
        inputs, outputs, config=config, init_method=config.init_method, bias=bias, gather_output=gather
    )


def row_parallel(
    config: TransformerConfig, inputs: int, outputs: int, bias: bool = True, parallel_input: bool = True
) -> RowParallelLinear:
    """A linear layer whose inputs are cut over tensor ranks."""
    return RowParallelLinear(
        inputs, outputs, config=config, init_method=config.init_method, bias=bias, input_is_parallel=parallel_input,
        skip_bias_add=False,
    )  # fmt: skip


def build_tower(config: TransformerConfig, size: VisionSize, recompute: bool = False) -> Tower:
    """The tower of a size; ``config`` is the vision tower's own. ``recompute``: keep only each block's input."""
    return StripTower(config, size, recompute) if size.tower == "strips" else VisionTower(config, size, recompute)
