"""Gathering ZeRO-3 shards into whole tensors, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def gathered_parameters(model: nn.Module, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) of every parameter once (tied ones once), on all ranks in the same order.

    Parameters are gathered together up to `bucket_bytes`. Each tensor is valid until the next one is asked for: it
    must be copied before. All ranks must exhaust the iterator, since gathering is collective.
    """
    import deepspeed  # slow to import and chatty: only in the ranks

    for names, parameters in _buckets(model, bucket_bytes):
        with deepspeed.zero.GatheredParameters(parameters):
            for name, parameter in zip(names, parameters, strict=True):
                yield name, parameter.data


def _buckets(model: nn.Module, bucket_bytes: int) -> Iterator[tuple[list[str], list[nn.Parameter]]]:
    names: list[str] = []
    parameters: list[nn.Parameter] = []
    filled = 0
    for name, parameter in model.named_parameters():
        # numel() of a partitioned parameter is 0
        nbytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if parameters and filled + nbytes > bucket_bytes:
            yield names, parameters
            names, parameters, filled = [], [], 0
        names.append(name)
        parameters.append(parameter)
        filled += nbytes
    if parameters:
        yield names, parameters
