"""Weights transport: one version of all parameters, from the learner to every rollout actor, in memory.

The learner hands over buckets of whole tensors. A small handle says what was published, and is passed on in place of
the weights. Every tensor has a checksum, which every reader verifies. Tied parameters are sent once.

There are two transports: object_store.py works everywhere; broadcast.py needs a process group, and sends from GPU to
GPU without host memory. Left out: files on a shared disk, because each version would wait for the file system; and CUDA
IPC handles, because they work within one machine only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from common.parameters import copy_into

Bucket = Sequence[tuple[str, Tensor]]  # named tensors that are gathered, copied and sent together


@dataclass(frozen=True)
class TensorSpec:
    """A published tensor; `dtype` without the prefix `torch.`; `checksum` is the transport's own."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class PublishedBucket:
    """The tensors of a bucket in their order; `payload` is the transport's, e.g. a reference to their bytes."""

    tensors: tuple[TensorSpec, ...]
    payload: Any = None


@dataclass(frozen=True)
class WeightsHandle:
    """One published version: small, and passed between processes in place of the weights."""

    version: int
    buckets: tuple[PublishedBucket, ...]

    @property
    def is_shared(self) -> bool:
        """Whether the tensors are in Ray's object store, for everybody; else they are sent to a group."""
        return any(bucket.payload is not None for bucket in self.buckets)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for bucket in self.buckets for spec in bucket.tensors)


class WeightsTransport(ABC):
    """Moves named tensors from the learner's first rank to every rollout actor.

    Life cycle of a version: `publish` in the learner; its handle is sent to every rollout actor, where `fetch` runs
    beside the sampler, which still uses the version before; between two rollouts the tensors are copied into the model.
    `publish` returns as soon as the learner may change its weights again. Versions are published and fetched in order:

        sender, receiver = ObjectStoreTransport(), ObjectStoreTransport("cuda")  # in two processes
        for version in (1, 2):
            handle = sender.publish(version, gathered_buckets(student, bucket_bytes))
            load_weights(model, receiver.fetch(handle))
    """

    @abstractmethod
    def publish(self, version: int, buckets: Iterable[Bucket]) -> WeightsHandle:
        """Copy the tensors of each bucket before the next one is taken: it may overwrite them.

        Raises:
            TimeoutError: an earlier version could not be sent.
        """

    @abstractmethod
    def fetch(self, handle: WeightsHandle) -> list[tuple[str, Tensor]]:
        """The published tensors, verified; may run in a thread of its own while the model is in use.

        The tensors are read-only and valid until the next call.

        Raises:
            ValueError: a checksum differs; the message names the tensor and the version.
            TimeoutError: the version did not arrive in time.
        """


def spec_of(name: str, tensor: Tensor, checksum: int) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes, checksum)


def verify(version: int, tensors: Sequence[TensorSpec], checksums: Sequence[int]) -> None:
    """Compare what arrived with what was published.

    Raises:
        ValueError: a checksum differs.
    """
    for spec, checksum in zip(tensors, checksums, strict=True):
        if spec.checksum != checksum:
            raise ValueError(f"weights version {version}: checksum of {spec.name!r} differs")


def load_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy all parameters into the model's own memory, in the model's dtype.

    Raises:
        ValueError: a parameter is missing, unknown, or of another shape; the model is then partly updated.
    """
    copy_into(dict(model.named_parameters()), tensors)
