"""New values for a model's parameters, in their own memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def copy_into(parameters: Mapping[str, nn.Parameter], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy a tensor into each of these parameters, by name, in the parameter's dtype.

    Raises:
        ValueError: one is missing, unknown, or of another shape; the parameters are then partly updated.
    """
    seen = set()
    with torch.no_grad():
        for name, tensor in tensors:
            if name not in parameters:
                raise ValueError(f"published weights hold {name!r}, which the model lacks")
            if parameters[name].shape != tensor.shape:
                raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}")
            parameters[name].copy_(tensor, non_blocking=True)
            seen.add(name)
    missing = sorted(set(parameters) - seen)
    if missing:
        raise ValueError(f"published weights lack {missing[:5]}{' ...' if len(missing) > 5 else ''}")
