"""Gathering ZeRO-3 shards into whole tensors, bucket by bucket.

A bucket holds many parameters up to a byte cap, so memory beyond the shards is that of one bucket. Gathering the whole
model was left out for its memory, and a call per parameter for its time: of the 399 in an 8B model 145 are a few
kilobytes. A checkpoint on disk was left out too: it costs one write, and a read by every rollout actor.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from common.weights.transport import Bucket


def gathered_buckets(model: nn.Module, bucket_bytes: int) -> Iterator[Bucket]:
    """Yield buckets of (name, whole tensor): every parameter that is trained, once, tied ones too, in the same order on
    all ranks.

    A bucket is valid until the next one is asked for, so it must be copied before. Gathering is collective: all ranks
    must go through the whole iterator.
    """
    import deepspeed  # slow to import and chatty: only in the ranks

    for bucket in parameter_buckets(model, bucket_bytes):
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
            yield [(name, parameter.data) for name, parameter in bucket]


def parameter_buckets(model: nn.Module, bucket_bytes: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Named parameters that are trained, in buckets of at most `bucket_bytes`, counted whole; a larger parameter has
    its own bucket."""
    bucket: list[tuple[str, nn.Parameter]] = []
    filled = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the base of an adapter
            continue
        # numel() of a partitioned parameter is 0
        nbytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if bucket and filled + nbytes > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, parameter))
        filled += nbytes
    if bucket:
        yield bucket
