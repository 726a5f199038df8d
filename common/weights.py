"""Weights transport: one version of all parameters, from the learner to every rollout actor, in memory.

Tensors are copied into byte buffers of at most `bucket_bytes` (a larger tensor gets a buffer of its own), each put in
Ray's object store once and read there without a copy. Every tensor carries a checksum, which every reader verifies.
Tied parameters travel once.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor, nn

_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor stands: buffer number and byte offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class WeightsHandle:
    """One published version: small, and passed between processes in place of the weights."""

    version: int
    tensors: tuple[TensorSpec, ...]
    buckets: tuple[Any, ...]
    nbytes: int


class WeightsTransport(ABC):
    """Moves named tensors: `publish` on the learner's first rank, `fetch` in every rollout actor."""

    @abstractmethod
    def publish(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> WeightsHandle: ...

    @abstractmethod
    def fetch(self, handle: WeightsHandle) -> Iterator[tuple[str, Tensor]]: ...


class ObjectStoreTransport(WeightsTransport):
    """Through Ray's object store, as NumPy bytes (Ray copies torch tensors, but not NumPy arrays)."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes

    def publish(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> WeightsHandle:
        """Copy the tensors out as they come; a tensor may be invalid after the next one was asked for."""
        specs: list[TensorSpec] = []
        refs: list[Any] = []
        parts: list[np.ndarray] = []
        filled = 0
        for name, tensor in tensors:
            data = _bytes_of(tensor)
            padded = -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
            if parts and filled + padded > self.bucket_bytes:
                refs.append(ray.put(np.concatenate(parts)))
                parts, filled = [], 0
            specs.append(
                TensorSpec(
                    name=name,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    shape=tuple(tensor.shape),
                    bucket=len(refs),
                    offset=filled,
                    nbytes=data.nbytes,
                    checksum=xxhash.xxh3_64_intdigest(data.data),
                )
            )
            parts += [data, np.zeros(padded - data.nbytes, np.uint8)]
            filled += padded
        if parts:
            refs.append(ray.put(np.concatenate(parts)))
        return WeightsHandle(version, tuple(specs), tuple(refs), sum(s.nbytes for s in specs))

    def fetch(self, handle: WeightsHandle) -> Iterator[tuple[str, Tensor]]:
        """Yield read-only tensors.

        Raises:
            ValueError: a checksum differs; the message names the tensor and the version.
        """
        bucket, buffer = -1, np.empty(0, np.uint8)
        for spec in handle.tensors:
            if spec.bucket != bucket:
                bucket, buffer = spec.bucket, ray.get(handle.buckets[spec.bucket])
            data = buffer[spec.offset : spec.offset + spec.nbytes]
            if xxhash.xxh3_64_intdigest(data.data) != spec.checksum:
                raise ValueError(f"weights version {handle.version}: checksum of {spec.name!r} differs")
            yield spec.name, _tensor_of(data, spec)


def load_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy all parameters in place, converting dtype where the model's differs.

    Raises:
        ValueError: a parameter is missing, unknown, or of another shape; the model is then partly updated.
    """
    parameters = dict(model.named_parameters())
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


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """uint8 copy of the tensor's memory."""
    return tensor.detach().to("cpu", copy=True).contiguous().flatten().view(torch.uint8).numpy()


def _tensor_of(data: np.ndarray, spec: TensorSpec) -> Tensor:
    with warnings.catch_warnings():
        # torch warns that the buffer is read-only; nobody writes here, load_weights copies
        warnings.filterwarnings("ignore", message=".*not writable")
        tensor = torch.from_numpy(data)
    return tensor.view(getattr(torch, spec.dtype)).view(spec.shape)
