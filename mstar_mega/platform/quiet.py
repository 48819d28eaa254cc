"""Hides warnings that are normal without a GPU. Imports no torch: every command passes here, ``--help`` too."""

from __future__ import annotations

import logging
import warnings

# Printed when megatron is imported or a model is built without CUDA.
_NORMAL_WARNINGS = (
    r"Transformer Engine and Apex are not installed\. Falling back to",
    r"Apex is not installed\. Falling back to Torch Norm",
    r"full scope is deprecated\. Use empty cuda_graph_(scope|modules)",
    # megatron-core 0.19 imports a model that nobody here asks for.
    r"MimoModelConfig is experimental",
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
    for logger, _ in _NORMAL_LOGS:
        logging.getLogger(logger).addFilter(_is_news)


_NORMAL_LOGS = (
    # A CUDA build of torch says so on a machine that has a compiler for CUDA and no GPU.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # megatron-core 0.19: it computes the distributed optimizer's layout itself, as earlier ones did without a word.
    ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided"),
)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(record.name == name and text in record.getMessage() for name, text in _NORMAL_LOGS)
