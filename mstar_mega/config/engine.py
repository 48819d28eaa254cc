"""Settings of generation and of the kernels: they change how fast results come, and how many tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class GenerationConfig:
    """The coupled generation engine."""

    max_new_tokens: int = 512
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    prefill_tokens: int = 16_384
    """Most prompt tokens in one prefill batch."""
    slots: int | Literal["auto"] = "auto"
    """Responses decoded at once on one rank. auto: as many as the free memory holds, at most 512."""
    queries_per_block: int = 64
    """Queries whose responses are written to disk together: what a killed run loses at most, per rank."""
    log_prob_gap_limit: float | None = None
    """Stop where a token's log-prob differs by more between generating and training; None: 1e-3 in float32, 0.5 in
    bfloat16, where one token in a thousand may."""
    log_prob_gap_queries: int = 8
    """Queries per iteration and model copy whose responses are scored again by the training forward; 0: none."""


@dataclass
class KernelsConfig:
    """Fused kernels of ``mstar_mega/kernels``. Each switch set to false leaves one to its plain PyTorch definition."""

    backend: Literal["auto", "triton", "interpreter", "torch"] = "auto"
    """auto: Triton on CUDA; on the CPU plain PyTorch, and C for decode steps where there is a compiler. interpreter:
    Triton's own, for tests (TRITON_INTERPRET=1)."""
    chunk_mb: int = 1024
    """Most MiB of logits, and of what is computed from them, that exist at once in training and scoring. In training a
    quarter of the rows is the most in any case."""
    linear_logprob: bool = True
    """Log-probabilities straight from hidden states, in chunks; false: from whole logits."""
    linear_cross_entropy: bool = True
    """The SFT loss takes its gradient chunk by chunk in the forward; false: through log-probabilities."""
    vocab_parallel_logprob: bool = True
    """Log-probabilities from given logits."""
    sampling: bool = True
    step_scores: bool = True
    """PRM scores at step ends, and the reduction over steps."""
    selection: bool = True
    """The best correct responses, for all queries at once."""
    norms: bool = True
    attention: bool = True
    """Attention of many responses to one prompt, in training and scoring."""
    decode: bool = True
    """What a decode step does between its matrix products, attention included."""
    flash_attention: bool = True
    """Attention within prompts and within pictures by ``flash_attn`` on CUDA in bfloat16, where it is importable."""
