"""Kernels, each beside its plain-PyTorch reference; imported as ``mstar_mega.kernels``."""
