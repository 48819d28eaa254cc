"""Checkpoints between Hugging Face and megatron-core; imported as ``mstar_mega.checkpoint_tools``."""
