"""Kernels, each beside its plain-PyTorch reference; imported as ``mstar_mega.kernels``. See docs/kernels.md."""

from mstar_mega.kernels.dispatch import backend, configure, force_backend, forced_backend
from mstar_mega.kernels.linear_head import linear_logits
from mstar_mega.kernels.linear_logprob import linear_cross_entropy, linear_logprob
from mstar_mega.kernels.logprob import vocab_parallel_logprob
from mstar_mega.kernels.norms import layer_norm, rms_norm
from mstar_mega.kernels.prefix_attention import prefix_attention
from mstar_mega.kernels.process_scores import reduce_steps, step_scores
from mstar_mega.kernels.sampling import sample_with_logprob
from mstar_mega.kernels.selection import select_topk

__all__ = [
    "backend",
    "configure",
    "force_backend",
    "forced_backend",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logits",
    "linear_logprob",
    "prefix_attention",
    "reduce_steps",
    "rms_norm",
    "sample_with_logprob",
    "select_topk",
    "step_scores",
    "vocab_parallel_logprob",
]
