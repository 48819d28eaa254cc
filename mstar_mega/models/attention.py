"""Core attention of the language model: what a token attends to is said by an attention plan.

The model always sees one packed stream of tokens [T, 1, H]. The plan that travels with it knows which stream positions
form prompts, which form the responses that continue them, and whether keys and values are kept; so training, scoring
and prefill are one model with different plans. Decoding is ``decoder.py``.

megatron-core hands ``attention_bias`` untouched through block, layer and recomputation to the core attention: that is
the plan's way in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mstar_mega.kernels.flash import Spans, attention
from mstar_mega.kernels.prefix_attention import causal_attention, prefix_attention


class AttentionPlan(Protocol):
    """Who attends to whom in one forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]; ``layer`` counts from 1 over all stages."""
        ...


class PlannedAttention(torch.nn.Module):
    """The layer spec's ``core_attention``: delegates to the plan."""

    def __init__(self, config: TransformerConfig, layer_number: int, **unused: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[T, 1, heads, D] -> [T, 1, Hq * D]."""
        plan: AttentionPlan = attention_bias
        out = plan.attend(self.layer_number, query.squeeze(1), key.squeeze(1), value.squeeze(1), self.scale)
        return out.reshape(out.size(0), 1, -1)


def bias_from_mask(allowed: Tensor) -> Tensor:
    """Boolean mask -> float32 additive bias, 0 where allowed and minus infinity elsewhere."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, float("-inf"))


@dataclass
class KeyValues:
    """Keys and values of one layer, [rows, Hk, length, D] each."""

    k: Tensor
    v: Tensor


@dataclass
class GroupPlan:
    """Prompts, each followed in the stream by the responses that share it.

    G prompts of at most P tokens; group g has at most n responses of at most R tokens. All indices are stream
    positions, int64; padding points at position 0 and is masked.
    """

    prompt_index: Tensor
    """[G, P]"""
    prompt_allowed: Tensor
    """bool [G, P]"""
    response_index: Tensor | None
    """[G, n, R], or None when there are no responses."""
    response_allowed: Tensor | None
    """bool [G, n, R]"""
    stream_from: Tensor
    """[T]: where each stream token stands in the concatenation of flattened prompts and flattened responses; with
    ``spans``, of the prompts one after another and flattened responses."""
    spans: Spans | None = None
    """Where the prompts begin in ``prompt_tokens``: for flash-attn, which wants no padding."""
    prompt_tokens: Tensor | None = None
    """[prompt tokens], with ``spans``: stream positions."""
    keep: bool = False
    """Store every layer's keys and values in ``prompts`` and ``responses`` (prefill)."""
    prompts: dict[int, KeyValues] = field(default_factory=dict)
    """Per layer, rows G, after a forward with ``keep``."""
    responses: dict[int, KeyValues] = field(default_factory=dict)
    """Per layer, rows G * n."""

    def __post_init__(self) -> None:
        self._prompt_bias = bias_from_mask(self.prompt_allowed)
        if self.response_index is not None:
            R = self.response_index.size(2)
            # Rows begin at 64 bytes whatever R is: compiled for any stride, the backward spills 136 bytes a thread.
            causal = torch.ones(R, R + -R % 16, dtype=torch.bool, device=self.response_index.device).tril()
            self._own_bias = bias_from_mask(causal)[None, None, :, :R]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k_prompt, v_prompt = k[self.prompt_index], v[self.prompt_index]
        if self.spans is not None:
            packed_q, packed_k, packed_v = (x[self.prompt_tokens] for x in (q, k, v))
            parts = [attention(packed_q, packed_k, packed_v, self.spans, causal=True, scale=scale)]
        else:
            parts = [causal_attention(q[self.prompt_index], k_prompt, v_prompt, scale).flatten(0, 1)]
        # One transposed copy per layer serves every response, and later the cache.
        k_prompt, v_prompt = (x.transpose(1, 2).contiguous() for x in (k_prompt, v_prompt))
        if self.keep:
            self.prompts[layer] = KeyValues(k_prompt, v_prompt)
        if self.response_index is not None:
            G, n, R = self.response_index.shape
            k_own, v_own = (x[self.response_index].transpose(2, 3).contiguous() for x in (k, v))
            if self.keep:
                self.responses[layer] = KeyValues(k_own.flatten(0, 1), v_own.flatten(0, 1))
            # Right padding of a response comes after its tokens, so causality alone hides it.
            out = prefix_attention(
                q[self.response_index], k_prompt, v_prompt, self._prompt_bias, k_own, v_own, self._own_bias, scale
            )
            parts.append(out.reshape(G * n * R, *out.shape[3:]))
        return torch.cat(parts)[self.stream_from]
