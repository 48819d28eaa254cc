"""From patch features to the language model's width, tensor-parallel.

Sources: InternVL2's ``pixel_shuffle`` and ``mlp1``; Phi-3.5-vision's HD transform; MiniCPM-Llama3-V 2.5's resampler
(all checked against their outputs). Norms, separators and learned queries are replicated (small); every matrix is cut.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mstar_mega.models.norms import LayerNorm
from mstar_mega.models.sizes import VisionSize
from mstar_mega.models.vision import ParallelMLP, column_parallel, row_parallel


class PixelShuffleConnector(MegatronModule):
    """Merge 2 x 2 patches into channels (InternVL's version 2 order), LayerNorm, two-layer MLP to the LM's width."""

    def __init__(self, config: TransformerConfig, size: VisionSize) -> None:
        super().__init__(config)
        self.norm = LayerNorm(4 * size.hidden, eps=1e-5)
        self.mlp = ParallelMLP(config, 4 * size.hidden, config.hidden_size, config.hidden_size)

    def forward(self, features: Tensor, grids: Tensor | None = None) -> Tensor:
        """[tiles, grid * grid, C] -> [tiles, grid * grid / 4, hidden]; ``grids`` unused."""
        return self.mlp(self.norm(pixel_shuffle(features)))


def pixel_shuffle(features: Tensor) -> Tensor:
    """[tiles, g * g, C] -> [tiles, (g / 2)^2, 4 C]; token (R, S) holds patches (2R, 2S), (2R, 2S+1), (2R+1, 2S), ..."""
    tiles, patches, channels = features.shape
    half = int(patches**0.5) // 2
    x = features.view(tiles, half, 2, half, 2, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(tiles, half * half, 4 * channels)


class HDTransformConnector(MegatronModule):
    """Put an image's crops back together, mark ends of rows and of the picture, two-layer MLP to the LM's width.

    Per image: its crops as one picture, a separator, its global view; a newline ends every row of both. The separators
    go through the MLP like the features.
    """

    def __init__(self, config: TransformerConfig, size: VisionSize) -> None:
        super().__init__(config)
        self.newline = nn.Parameter(torch.empty(4 * size.hidden))
        self.separator = nn.Parameter(torch.empty(4 * size.hidden))
        self.mlp = ParallelMLP(config, 4 * size.hidden, config.hidden_size, config.hidden_size)

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """
        Args:
            features: [tiles, grid * grid, C]; per image the global view, then its crops row by row.
            grids: int64 [images, 2]: rows and columns of the crops.

        Returns:
            [features, hidden].
        """
        merged = pixel_shuffle(features)
        parts: list[Tensor] = []
        first = 0
        for rows, columns in grids.tolist():
            crops = merged[first + 1 : first + 1 + rows * columns]
            parts += [self._lines(crops, rows, columns), self.separator[None], self._lines(merged[first][None], 1, 1)]
            first += 1 + rows * columns
        return self.mlp(torch.cat(parts))

    def _lines(self, crops: Tensor, rows: int, columns: int) -> Tensor:
        """[rows * columns, m * m, D] -> [rows * m * (columns * m + 1), D]."""
        side, channels = int(crops.size(1) ** 0.5), crops.size(2)
        picture = crops.view(rows, columns, side, side, channels).transpose(1, 2)
        picture = picture.reshape(rows * side, columns * side, channels)
        return torch.cat([picture, self.newline.expand(rows * side, 1, -1)], dim=1).flatten(0, 1)


class Resampler(MegatronModule):
    """Learned queries attend to a slice's patches, whose keys carry their place in the picture."""

    def __init__(self, config: TransformerConfig, size: VisionSize) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.head_dim = hidden // size.connector_heads
        self.query = nn.Parameter(torch.empty(size.queries, hidden))
        self.kv_proj = column_parallel(config, size.hidden, hidden, bias=False, gather=True)
        self.norm_q, self.norm_kv, self.norm_post = (LayerNorm(hidden, eps=1e-6) for _ in range(3))
        # Rows are interleaved per head (query, key, value); each of the three reads something else.
        self.in_proj = column_parallel(config, hidden, 3 * hidden)
        self.out_proj = row_parallel(config, hidden, hidden)
        self.proj = row_parallel(config, hidden, hidden, bias=False, parallel_input=False)

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """
        Args:
            features: [slices, length, C], right-padded.
            grids: int64 [slices, at least 2]: rows and columns of each slice's patches.

        Returns:
            [slices, queries, hidden].
        """
        slices, length, _ = features.shape
        values = self.norm_kv(self.kv_proj(features)[0])
        places, shown = grid_positions(grids, length, values.size(-1))
        keys = values + places.to(values.device, values.dtype)
        queries = self.norm_q(self.query)[None].expand(slices, -1, -1)
        q, k, v = (self._heads(x, part) for part, x in enumerate((queries, keys, values)))
        mask = shown.to(values.device)[:, None, None, :]
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))[0]
        return self.proj(self.norm_post(out))[0]

    def _heads(self, x: Tensor, part: int) -> Tensor:
        """[slices, n, hidden] through the query (0), key (1) or value (2) rows -> [slices, local heads, n, D]."""
        weight = self.in_proj.weight.view(-1, 3, self.head_dim, x.size(-1))[:, part].flatten(0, 1)
        bias = self.in_proj.bias.view(-1, 3, self.head_dim)[:, part].flatten()
        projected = nn.functional.linear(copy_to_tensor_model_parallel_region(x), weight, bias)
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def grid_positions(grids: Tensor, length: int, channels: int) -> tuple[Tensor, Tensor]:
    """Where the patches of each slice stand in its picture.

    Returns:
        (float32 [slices, length, channels]: column in the first half of the channels, row in the second, each as sines
        then cosines; bool [slices, length]: True at patches, False at padding).
    """
    rows, columns = grids[:, 0].cpu(), grids[:, 1].cpu()
    index = torch.arange(length, device="cpu")
    shown = index < (rows * columns)[:, None]
    row, column = index // columns[:, None], index % columns[:, None]
    quarter = channels // 4
    frequency = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float32, device="cpu") / quarter)
    angle_c, angle_r = (x.float()[..., None] * frequency for x in (column, row))
    return torch.cat([angle_c.sin(), angle_c.cos(), angle_r.sin(), angle_r.cos()], dim=-1), shown


CONNECTORS = {"pixel_shuffle": PixelShuffleConnector, "hd_transform": HDTransformConnector, "resampler": Resampler}


def build_connector(config: TransformerConfig, size: VisionSize) -> MegatronModule:
    """The connector of a size; ``config`` is the language model's (no sequence parallelism reaches it)."""
    return CONNECTORS[size.connector](replace(config, sequence_parallel=False), size)
