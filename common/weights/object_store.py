"""Weights through Ray's object store: on every machine, between every two devices.

Each bucket is one object: a list of NumPy arrays. Ray copies them once into shared memory, and every reader on the node
maps that memory without a copy. Each object is sent once to every other node.

Tensors in host memory are put into the object store directly. Tensors on a GPU are copied through two page-locked
buffers: while one is hashed and put, the next bucket is copied into the other. A reader on a GPU copies pieces of
16 MiB through page-locked buffers, one per thread, into a staged copy. A reader on CPU uses the shared memory itself.

Left out: torch tensors as objects, which Ray would copy twice; and joining a bucket's tensors into one array, which
would be one more copy.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import ray
import torch
from torch import Tensor

from common.weights.checksums import PIECE_BYTES, combined, host_checksums, piece_digest, pieces
from common.weights.staged_buckets import StagedBuckets, as_tensor
from common.weights.transport import Bucket, PublishedBucket, WeightsHandle, WeightsTransport, spec_of, verify

_IN_TRANSIT = 2  # buckets that are hashed and put at the same time, each in a buffer of its own


class ObjectStoreTransport(WeightsTransport):
    """Checksums are XXH3 of the bytes in host memory: those that are put, and those that the reader maps."""

    def __init__(self, device: torch.device | str = "cpu", timeout_s: float = 1800.0) -> None:
        """`device` is where a reader wants the tensors; `timeout_s` bounds its wait for them."""
        self.device = torch.device(device)
        self.timeout_s = timeout_s
        self._pieces = ThreadPoolExecutor(min(os.cpu_count() or 1, 16), "weights-pieces")
        self._shipping = ThreadPoolExecutor(_IN_TRANSIT, "weights-shipping")
        self._outgoing = StagedBuckets(torch.device("cpu"), pinned=True)
        self._staged = StagedBuckets(self.device)
        self._of_thread = threading.local()
        # torch warns that mapped memory is read-only; nothing writes to it
        warnings.filterwarnings("ignore", message=".*not writable")

    def publish(self, version: int, buckets: Iterable[Bucket]) -> WeightsHandle:
        shipped: list[Future[PublishedBucket] | PublishedBucket] = []
        for number, bucket in enumerate(buckets):
            if all(tensor.device.type == "cpu" for _, tensor in bucket):
                shipped.append(self._ship(bucket))
                continue
            if number >= _IN_TRANSIT:
                _result(shipped[number - _IN_TRANSIT])  # this bucket reuses its buffer
            copies, copied = self._to_host(number % _IN_TRANSIT, bucket)
            shipped.append(self._shipping.submit(self._ship, copies, copied))
        return WeightsHandle(version, tuple(_result(bucket) for bucket in shipped))

    def fetch(self, handle: WeightsHandle) -> list[tuple[str, Tensor]]:
        fetched: list[tuple[str, Tensor]] = []
        arrays_of_all = ray.get([bucket.payload for bucket in handle.buckets], timeout=self.timeout_s)
        for number, (bucket, arrays) in enumerate(zip(handle.buckets, arrays_of_all, strict=True)):
            if self.device.type == "cpu":
                parts = [torch.from_numpy(array) for array in arrays]
                checksums = host_checksums(arrays, self._pieces)
            else:
                parts = self._staged.parts(number, bucket.tensors)
                checksums = self._to_device(arrays, parts)
            verify(handle.version, bucket.tensors, checksums)
            fetched += [(s.name, as_tensor(part, s)) for s, part in zip(bucket.tensors, parts, strict=True)]
        return fetched

    def _to_host(self, number: int, bucket: Bucket) -> tuple[Bucket, torch.cuda.Event]:
        """Copies of the tensors in page-locked buffer `number`, and an event that is recorded behind them."""
        parts = self._outgoing.parts(number, [tensor for _, tensor in bucket])
        copies = []
        for (name, tensor), part in zip(bucket, parts, strict=True):
            copies.append((name, as_tensor(part, tensor).copy_(tensor.detach(), non_blocking=True)))
        copied = torch.cuda.Event()
        copied.record()
        return copies, copied

    def _ship(self, bucket: Bucket, copied: torch.cuda.Event | None = None) -> PublishedBucket:
        if copied:
            copied.synchronize()
        arrays = [_bytes_of(tensor) for _, tensor in bucket]
        checksums = host_checksums(arrays, self._pieces)
        specs = tuple(spec_of(name, tensor, c) for (name, tensor), c in zip(bucket, checksums, strict=True))
        return PublishedBucket(specs, ray.put(arrays))

    def _to_device(self, arrays: list[np.ndarray], parts: list[Tensor]) -> list[int]:
        """Copy each array to the beginning of its part; returns their checksums."""
        cut = [list(pieces(array)) for array in arrays]
        targets = [target for part in parts for target in part.split(PIECE_BYTES)]
        digests = self._pieces.map(self._piece_to_device, [piece for array in cut for piece in array], targets)
        return [combined(next(digests) for _ in array) for array in cut]

    def _piece_to_device(self, piece: np.ndarray, target: Tensor) -> bytes:
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self.device)  # not the sampler's
            self._of_thread.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        digest = piece_digest(piece)
        locked = self._of_thread.buffer[: len(piece)]
        np.copyto(locked.numpy(), piece)
        with torch.cuda.stream(self._of_thread.stream):
            target[: len(piece)].copy_(locked, non_blocking=True)
        self._of_thread.stream.synchronize()
        return digest


def _result(bucket: Future[PublishedBucket] | PublishedBucket) -> PublishedBucket:
    return bucket.result() if isinstance(bucket, Future) else bucket


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as uint8, copied only where it is not contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
