"""Hides warnings that are normal without a GPU. Imports no torch: every command passes here, ``--help`` too."""

from __future__ import annotations

import logging
import warnings

# Printed when megatron is imported or a model is built without CUDA.
_NORMAL_WARNINGS = (
    r"Transformer Engine and Apex are not installed\. Falling back to",
    r"Apex is not installed\. Falling back to Torch Norm",
    r"full scope is deprecated\. Use empty cuda_graph_scope",
    # megatron-core 0.16 calls collectives by the names that torch 2.13 replaces.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    # The distributed optimizer trains views of the weights.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
)


def silence_normal_warnings() -> None:
    """Hide what megatron-core warns about where Transformer Engine, apex and CUDA cannot be there anyway.

    Most of it is said while megatron is imported, so call this before that.
    """
    for message in _NORMAL_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_about_a_missing_driver)


def _is_not_about_a_missing_driver(record: logging.LogRecord) -> bool:
    # A CUDA build of torch says so on a machine that has a compiler for CUDA and no GPU.
    return "No CUDA runtime is found" not in record.getMessage()
