"""Weights by broadcast: NCCL between GPUs, gloo between CPUs, in a process group of its own.

Members are the learner's first rank and all rollout actors. The group is made of a store and the backend itself, beside
whatever default group a process has (DeepSpeed's), and is used by one thread per process.

One version: the learner copies the gathered buckets into a staged copy and goes on training, while its sending thread
waits until every rollout actor has come to receive; then all buckets are broadcast. A rollout actor receives in a
thread of its own too, into a staged copy, so neither side ever waits for the other's work. The store holds
`ready/RANK`, the version that a receiver waits for, and `sending`, the version that is under way; nobody enters a
broadcast before all others are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.weights.checksums import device_checksums, host_checksums
from common.weights.staged_buckets import StagedBuckets, as_tensor
from common.weights.transport import Bucket, PublishedBucket, WeightsHandle, WeightsTransport, spec_of, verify

_POLL_SECONDS = 0.002


def open_store() -> dist.TCPStore:
    """The meeting point of a group, served by this process on a free port (`port`)."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def connect(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The store that another process opened."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


class BroadcastTransport(WeightsTransport):
    """Member 0 publishes, all others fetch. Construct in all members at the same time: they connect to each other.

    Checksums are made of the staged copy on the sender's device and compared with those of the staged copy on the
    receiver's: XXH3 on CPU, sums of words on a GPU.
    """

    def __init__(
        self, store: dist.Store, members: tuple[str, ...], rank: int, device: torch.device | str, timeout_s: float
    ) -> None:
        """`members` are their names for messages; `timeout_s` bounds every wait for another member.

        Raises:
            TimeoutError: a member did not come; the message names it.
        """
        self.members = members
        self.rank = rank
        self.device = torch.device(device)
        self.timeout_s = timeout_s
        self._store = store
        self._staged = StagedBuckets(self.device)
        self._pieces = ThreadPoolExecutor(2, "weights-pieces")
        self._sender = ThreadPoolExecutor(1, "weights-sender")
        self._sent: Future[None] | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._rendezvous(-1, "join the weights group")
        self._group = self._backend()
        with self._own_stream():
            self._broadcast([torch.zeros(1, dtype=torch.uint8, device=self.device)], -1)

    def publish(self, version: int, buckets: Iterable[Bucket]) -> WeightsHandle:
        """Returns when all tensors are staged; they are sent meanwhile.

        Raises:
            TimeoutError: the version before could not be sent.
        """
        if self._sent:
            self._sent.result()
        published: list[PublishedBucket] = []
        for number, bucket in enumerate(buckets):
            parts = self._staged.parts(number, [tensor for _, tensor in bucket])
            for (_, tensor), part in zip(bucket, parts, strict=True):
                as_tensor(part, tensor).copy_(tensor.detach())
            named = zip(bucket, self._checksums(parts), strict=True)
            published.append(PublishedBucket(tuple(spec_of(*name_and_tensor, c) for name_and_tensor, c in named)))
        handle = WeightsHandle(version, tuple(published))
        self._sent = self._sender.submit(self._send, handle)
        return handle

    def fetch(self, handle: WeightsHandle) -> list[tuple[str, Tensor]]:
        fetched: list[tuple[str, Tensor]] = []
        with self._own_stream():
            self._rendezvous(handle.version, f"receive weights version {handle.version}")
            parts_of_all = [self._staged.parts(n, bucket.tensors) for n, bucket in enumerate(handle.buckets)]
            self._broadcast(self._buffers(handle), handle.version)
            for bucket, parts in zip(handle.buckets, parts_of_all, strict=True):
                verify(handle.version, bucket.tensors, self._checksums(parts))
                fetched += [(s.name, as_tensor(part, s)) for s, part in zip(bucket.tensors, parts, strict=True)]
        return fetched

    def _send(self, handle: WeightsHandle) -> None:
        with self._own_stream():  # the checksums were read, so all copies into the buffers are complete
            self._rendezvous(handle.version, f"receive weights version {handle.version}")
            self._broadcast(self._buffers(handle), handle.version)

    def _buffers(self, handle: WeightsHandle) -> list[Tensor]:
        sizes = [sum(len(p) for p in self._staged.parts(n, b.tensors)) for n, b in enumerate(handle.buckets)]
        return [self._staged.buffer(number, nbytes) for number, nbytes in enumerate(sizes)]

    def _checksums(self, parts: list[Tensor]) -> list[int]:
        if self.device.type == "cpu":
            return host_checksums([part.numpy() for part in parts], self._pieces)
        return device_checksums(parts)

    def _rendezvous(self, version: int, what: str) -> None:
        """Wait until every receiver has come for `version`; receivers then wait until the sender sets out.

        Raises:
            TimeoutError: names the members that did not come.
        """
        if self.rank == 0:
            self._wait(lambda: not self._missing(version), version, what)
            self._store.set("sending", str(version))
            return
        self._store.set(f"ready/{self.rank}", str(version))
        self._wait(lambda: self._reached("sending", version), version, what)

    def _missing(self, version: int) -> list[str]:
        """Receivers that have not come for `version`; the sender where there are none."""
        late = [m for r, m in enumerate(self.members) if r and not self._reached(f"ready/{r}", version)]
        return late or ([] if self.rank == 0 else [self.members[0]])

    def _reached(self, key: str, version: int) -> bool:
        # `get` would block until the key is there
        return self._store.check([key]) and int(self._store.get(key)) >= version

    def _broadcast(self, buffers: list[Tensor], version: int) -> None:
        """From member 0 to all; returns when this member's part is complete.

        Raises:
            TimeoutError: it did not end in time.
        """
        works = [self._group.broadcast([buffer], dist.BroadcastOptions()) for buffer in buffers]
        self._wait(lambda: all(w.is_completed() for w in works), version, f"broadcast weights version {version}")
        for work in works:
            work.wait()  # raises what went wrong; on a GPU this thread's stream goes on after it

    def _wait(self, done: Callable[[], bool], version: int, what: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not done():
            if time.monotonic() > deadline:
                names = ", ".join(self._missing(version)) or "a member that came and then stopped"
                raise TimeoutError(f"could not {what} within {self.timeout_s:.0f} s; waiting for {names}")
            time.sleep(_POLL_SECONDS)

    def _own_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _backend(self) -> Any:
        store = dist.PrefixStore("weights", self._store)
        timeout = timedelta(seconds=2 * self.timeout_s)  # our own deadline comes first, and names who is missing
        if self.device.type == "cpu":
            return dist.ProcessGroupGloo(store, self.rank, len(self.members), timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, self.rank, len(self.members), options)
