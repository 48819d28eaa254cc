"""Whole tensors into this rank's part of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mstar_mega.models.initialization import canonical_name
from mstar_mega.models.lmm import LMM
from mstar_mega.models.mapping import Mapping


def load_originals(model: LMM, maps: Sequence[Mapping], read: Callable[[str], Tensor]) -> None:
    """Fill every parameter of this rank from the original's tensors, in the parameters' dtype.

    Args:
        maps: the family's weight map for this model's head.
        read: gives an original tensor by name; called for those of this stage only.

    Raises:
        ValueError: a parameter stands in no mapping, or a tensor has another shape than the map says.
    """
    by_name = {mapping.name: mapping for mapping in maps}
    size, rank = model.tensor_group.size(), model.tensor_group.rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            canonical = canonical_name(name, model)
            if canonical not in by_name:
                raise ValueError(f"the weight map has nothing for the parameter {canonical}")
            mapping = by_name[canonical]
            whole = mapping.to_ours([read(source.name) for source in mapping.sources])
            parameter.copy_(mapping.cut(whole, size, rank))
