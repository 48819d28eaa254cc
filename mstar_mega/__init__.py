"""Self-evolving training of large multimodal models (MSTaR) on megatron-core."""

from mstar_mega.platform.quiet import silence_normal_warnings

__version__ = "0.1.0"

# Before any module of this package imports megatron, which warns of what is normal without a GPU.
silence_normal_warnings()
