"""Kernels, each beside its plain-PyTorch reference; imported as ``mstar_mega.kernels``. See docs/kernels.md."""

from mstar_mega.kernels.dispatch import backend, configure, force_backend, forced_backend
from mstar_mega.kernels.linear_logprob import linear_cross_entropy, linear_logprob
from mstar_mega.kernels.logprob import vocab_parallel_logprob
from mstar_mega.kernels.sampling import sample_with_logprob

__all__ = ["backend", "configure", "force_backend", "forced_backend", "linear_cross_entropy", "linear_logprob", "sample_with_logprob", "vocab_parallel_logprob"]
