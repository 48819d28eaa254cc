"""The language model's layers once more, written out for decoding: one new token for each row.

The same parameters (no copies) and the same function as megatron's modules, which training, scoring and prefill run
(``LMM.trunk``); a test says so. A layer is four matrix products and six kernels between them, and no sequence-parallel
collective runs: one all-reduce for each half layer. All results lie in fixed scratch, so that a step allocates nothing
where the kernels run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mstar_mega.kernels.decode_attention import PlainReading, Reading, decode_attention, decode_reference
from mstar_mega.kernels.decode_layer import add_rms_norm, rotate_and_store, swiglu
from mstar_mega.models.attention import KeyValues
from mstar_mega.models.lmm import LMM

LEAST_ROWS = 32
"""Rows of every product in plain PyTorch: one of few rows is rounded differently from one of many (MKL's), and what a
sample is must not depend on its company."""


def at_least(x: Tensor, rows: int = LEAST_ROWS) -> Tensor:
    """[B, K] with rows of zeros behind, where there are fewer."""
    return x if x.size(0) >= rows else torch.nn.functional.pad(x, (0, 0, 0, rows - x.size(0)))


def aligned(length: int) -> int:
    """Keys that plain PyTorch pads to: sums over them are the same whatever the padding, for the same reason."""
    return max(LEAST_ROWS, -(-length // 16) * 16)


@dataclass
class Cache:
    """Keys and values of this stage's layers, by layer number: prompts in a slab, own tokens in rows."""

    prefix: dict[int, KeyValues]
    """[tokens * Hk * D] each."""
    own: dict[int, KeyValues]
    """[slots, Hk, limit, D] each."""


@dataclass
class StepInput:
    """What one step is about."""

    tokens: Tensor
    """int64 [B]: each row's newest token."""
    prompt_length: Tensor
    """int64 [slots + 1]"""
    reading: Reading
    plain: PlainReading | None
    """In place of ``reading`` where the kernels do not run."""


@dataclass(frozen=True)
class _Layer:
    number: int
    norm1: Tensor
    qkv: Tensor
    proj: Tensor
    norm2: Tensor
    fc1: Tensor
    fc2: Tensor


class Decoder:
    """One pipeline stage's decode step.

    Made for one ``generate`` call: it keeps views of the parameters, which stay where they are during that call.
    """

    def __init__(self, model: LMM, capacity: int, positions: int, parts: int, device: torch.device) -> None:
        """``capacity``: most rows; ``positions``: longest sequence; ``parts``: most parts of a prompt's attention,
        1 where the kernels are those for the CPU, 0 where none run."""
        language, size = model.language, model.size
        self.model, self.group = model, model.tensor_group
        ranks = self.group.size()
        self.heads, self.key_heads, self.channels = size.heads // ranks, size.kv_heads // ranks, size.head_dim
        self.eps, self.scale = size.eps, size.head_dim**-0.5
        self.layers = [_layer(layer) for layer in language.decoder.layers]
        self.final_norm = language.decoder.final_layernorm.weight if model.post_process else None
        dtype = model.config.params_dtype
        self.cos, self.sin = model.rope.table(positions, dtype, device)
        self._ranks = torch.arange(self.key_heads, device=device)
        self.most_parts = parts

        def scratch(width: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(max(capacity, LEAST_ROWS), width, dtype=of, device=device)

        attended, ffn = self.heads * self.channels, size.ffn // ranks
        self.x, self.normed, self.delta = (scratch(size.hidden) for _ in range(3))
        self.qkv = scratch(attended + 2 * self.key_heads * self.channels)
        self.q, self.attended = scratch(attended), scratch(attended)
        self.h, self.gated = scratch(2 * ffn), scratch(ffn)
        self.local = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.held, self.below = torch.zeros(2, capacity, dtype=torch.bool, device=device)
        self.parts = torch.empty(parts * capacity * attended, device=device)
        self.lse = torch.empty(parts * capacity * self.heads, device=device)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [B] -> [B, hidden], in scratch (first stage)."""
        x = self.x[: tokens.numel()]
        table = self.model.language.embedding.word_embeddings
        if self.group.size() == 1:
            return torch.index_select(table.weight, 0, tokens, out=x)
        # Every rank takes the rows that it holds, the others add zeros.
        B = tokens.numel()
        local, held, below = self.local[:B], self.held[:B], self.below[:B]
        torch.sub(tokens, table.vocab_start_index, out=local)
        torch.ge(local, 0, out=held)
        torch.lt(local, table.weight.size(0), out=below)
        local.mul_(held.logical_and_(below))
        torch.index_select(table.weight, 0, local, out=x)
        x.mul_(held[:, None])
        dist.all_reduce(x, group=self.group)
        return x

    def layers_forward(self, x: Tensor, step: StepInput, cache: Cache) -> Tensor:
        """[B, hidden] (written over) through this stage's layers; the last stage's final norm included."""
        B = x.size(0)
        cos, sin, at = self.cos, self.sin, None
        if step.plain is not None:
            slots = step.reading.rows
            own = step.reading.length.index_select(0, slots) - 1
            positions = step.prompt_length.index_select(0, slots) + own
            cos, sin = cos.index_select(0, positions), sin.index_select(0, positions)
            limit = next(iter(cache.own.values())).k.size(2)
            at = ((slots[:, None] * self.key_heads + self._ranks) * limit + own[:, None]).flatten()
        delta: Tensor | None = None
        for layer in self.layers:
            y = add_rms_norm(x, delta, layer.norm1, self.eps, self.normed[:B])
            qkv = self._product(y, layer.qkv, self.qkv).view(B, self.key_heads, -1, self.channels)
            own_cache = cache.own[layer.number]
            q = rotate_and_store(
                qkv, cos, sin, step.reading.rows, step.reading.length, step.prompt_length, own_cache.k, own_cache.v, at,
                self.q[:B].view(B, self.heads, self.channels),
            )  # fmt: skip
            attended = self._attend(q, step, cache.prefix[layer.number], own_cache)
            delta = self._sum(self._product(attended.view(B, -1), layer.proj, self.delta))
            y = add_rms_norm(x, delta, layer.norm2, self.eps, self.normed[:B])
            gated = swiglu(self._product(y, layer.fc1, self.h), self.gated[:B])
            delta = self._sum(self._product(gated, layer.fc2, self.delta))
        assert delta is not None
        if self.final_norm is None:
            return x.add_(delta)
        return add_rms_norm(x, delta, self.final_norm, self.eps, self.normed[:B])

    def _attend(self, q: Tensor, step: StepInput, prefix: KeyValues, own: KeyValues) -> Tensor:
        if step.plain is None:
            out = self.attended[: q.size(0)].view(q.shape)
            return decode_attention(
                q, prefix.k, prefix.v, own.k, own.v, step.reading, self.scale, self.parts, self.lse, out
            )
        shape = (-1, self.key_heads, step.plain.capacity, self.channels)
        return decode_reference(q, prefix.k.view(shape), prefix.v.view(shape), own.k, own.v, step.plain, self.scale)

    def _product(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """x [B, K] @ weight [K, N], in ``out``."""
        B = x.size(0)
        if B < LEAST_ROWS and self.most_parts <= 1:
            # The kernels' results lie in scratch, and what lies there behind them does not matter.
            x = x.as_strided((LEAST_ROWS, x.size(1)), x.stride()) if self.most_parts else at_least(x)
        return torch.mm(x, weight, out=out[: x.size(0)])[:B]

    def _sum(self, x: Tensor) -> Tensor:
        if self.group.size() > 1:
            dist.all_reduce(x, group=self.group)
        return x


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attention, layer.mlp
    return _Layer(
        layer.layer_number,
        layer.input_layernorm.weight,
        attention.linear_qkv.weight.t(),
        attention.linear_proj.weight.t(),
        layer.pre_mlp_layernorm.weight,
        mlp.linear_fc1.weight.t(),
        mlp.linear_fc2.weight.t(),
    )
