"""Gathering ZeRO-3 shards into whole tensors, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from common.weights.transport import Bucket


def gathered_buckets(model: nn.Module, bucket_bytes: int) -> Iterator[Bucket]:
    """Yield buckets of (name, whole tensor), every parameter once (tied ones once), on all ranks in the same order.

    Parameters are gathered together up to `bucket_bytes`. A bucket is valid until the next one is asked for: it must
    be copied before. All ranks must exhaust the iterator, since gathering is collective.
    """
    import deepspeed  # slow to import and chatty: only in the ranks

    for bucket in parameter_buckets(model, bucket_bytes):
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
            yield [(name, parameter.data) for name, parameter in bucket]


def parameter_buckets(model: nn.Module, bucket_bytes: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Named parameters, whole or partitioned, in buckets of at most `bucket_bytes` when whole, or of one parameter."""
    bucket: list[tuple[str, nn.Parameter]] = []
    filled = 0
    for name, parameter in model.named_parameters():
        # numel() of a partitioned parameter is 0
        nbytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if bucket and filled + nbytes > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, parameter))
        filled += nbytes
    if bucket:
        yield bucket
