"""Weights by broadcast: NCCL between GPUs, gloo between CPUs, in a process group of its own.

Members are the learner's first rank and all rollout actors. One thread per process uses the group.

One version: the learner copies the gathered buckets into a staged copy and goes on training. Its sending thread waits
until every rollout actor is ready to receive, then broadcasts all buckets. A rollout actor also receives in a thread of
its own and into a staged copy, so neither side waits for the other's work. In the store, the key `ready/VERSION/RANK`
says that a receiver is ready, and `sending/VERSION` that all are; no member starts a broadcast before all are ready.

Left out: torch's default process group, because DeepSpeed owns it in the learner; and broadcasting each bucket as soon
as it is gathered, because the learner would then wait for the slowest rollout actor.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from common.config.dashboard import is_loopback
from common.weights.checksums import device_checksums, host_checksums
from common.weights.staged_buckets import StagedBuckets, as_tensor
from common.weights.transport import Bucket, PublishedBucket, WeightsHandle, WeightsTransport, spec_of, verify

DISSOLVED = "the weights group is dissolved"
_DISSOLVED_KEY = "dissolved"
_LOOK_SECONDS = 1.0  # how often a waiting member looks whether it is
_POLL_SECONDS = 0.002  # while a broadcast runs: NCCL's own wait with a deadline would abort the group


def open_store(host: str) -> dist.TCPStore:
    """The store of a new group, served by this process on a free port (`port`) of the address `host` and of no other:
    what others know this node as, which is loopback where the whole run is on this machine."""
    family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen(128)
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def connect(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The store that another process opened."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


class GroupDissolved(RuntimeError):  # noqa: N818 (what happened)
    """A member is gone, so nothing more is sent in this group."""


def stay_on(host: str) -> None:
    """Let gloo listen where `host` is, the address that others know this node by, and NCCL too where that is loopback.
    Gloo by itself listens where the machine's own name leads, which is often loopback, and nobody else reaches it. A
    user's own choice of interfaces wins."""
    interface = next(
        (name for name, addresses in psutil.net_if_addrs().items() if any(a.address == host for a in addresses)), None
    )
    if interface is None:  # an address that is translated on the way, or a name
        return
    for library in ("GLOO", "NCCL") if is_loopback(host) else ("GLOO",):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)


class BroadcastTransport(WeightsTransport):
    """Member 0 publishes, all others fetch. Construct it in all members at the same time: they connect to each other.

    When a member is lost, member 0 calls `dissolve` from another thread, and all waits end with GroupDissolved.
    What was published last is `staged` still, for whoever needs it before there is a new group.

    Checksums of the staged copy on the sender's device are compared with those of the staged copy on the receiver's:
    XXH3 on CPU, sums of words on a GPU.
    """

    def __init__(
        self, store: dist.Store, members: tuple[str, ...], rank: int, device: torch.device | str, timeout_s: float
    ) -> None:
        """`members` are their names for messages; `timeout_s` bounds every wait for another member.

        Raises:
            TimeoutError: a member did not join; the message names it.
        """
        self.members = members
        self.rank = rank
        self.device = torch.device(device)
        self.timeout_s = timeout_s
        self._store = store
        self._met: int | None = None  # the version of the last rendezvous
        self._staged = StagedBuckets(self.device)
        self._pieces = ThreadPoolExecutor(2, "weights-pieces")
        self._sender = ThreadPoolExecutor(1, "weights-sender")
        self._sent: Future[None] | None = None
        self._newest: WeightsHandle | None = None
        self._staging = threading.Lock()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._rendezvous(-1, "join the weights group")
        self._group = self._backend()
        with self._own_stream():
            self._broadcast([torch.zeros(1, dtype=torch.uint8, device=self.device)], -1)

    def publish(self, version: int, buckets: Iterable[Bucket]) -> WeightsHandle:
        """Returns when all tensors are staged; they are sent in the background."""
        if self._sent and not isinstance(self._sent.exception(), GroupDissolved):
            self._sent.result()
        published: list[PublishedBucket] = []
        with self._staging:
            for number, bucket in enumerate(buckets):
                parts = self._staged.parts(number, [tensor for _, tensor in bucket])
                for (_, tensor), part in zip(bucket, parts, strict=True):
                    as_tensor(part, tensor).copy_(tensor.detach())
                named = zip(bucket, self._checksums(parts), strict=True)
                published.append(PublishedBucket(tuple(spec_of(*name_and_tensor, c) for name_and_tensor, c in named)))
            self._newest = handle = WeightsHandle(version, tuple(published))
        self._sent = self._sender.submit(self._send, handle)
        return handle

    def staged(self) -> tuple[int, Iterator[Bucket]]:
        """The version published last, and its buckets; the next one is not staged before all are taken.

        Raises:
            ValueError: none was published.
        """
        if self._newest is None:
            raise ValueError("nothing was published in this weights group")
        return self._newest.version, self._staged_buckets(self._newest)

    def _staged_buckets(self, handle: WeightsHandle) -> Iterator[Bucket]:
        with self._staging:
            for number, bucket in enumerate(handle.buckets):
                parts = self._staged.parts(number, bucket.tensors)
                yield [(s.name, as_tensor(part, s)) for s, part in zip(bucket.tensors, parts, strict=True)]

    def dissolve(self) -> None:
        """End all waits of all members; called by member 0, in any thread."""
        self._store.set(_DISSOLVED_KEY, "")

    def _check(self) -> None:
        if self._store.check([_DISSOLVED_KEY]):
            raise GroupDissolved(DISSOLVED)

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
        """Wait until all members are ready for `version`.

        Raises:
            TimeoutError: names the members that are not.
        """
        if self.rank:
            self._store.set(f"ready/{version}/{self.rank}", "")
            self._wait_for([f"sending/{version}"], version, what)
            return
        self._wait_for(self._ready_keys(version), version, what)
        self._store.set(f"sending/{version}", "")
        if self._met is not None and self._met != version:  # nobody waits for these keys any more
            for key in (*self._ready_keys(self._met), f"sending/{self._met}"):
                self._store.delete_key(key)
        self._met = version

    def _ready_keys(self, version: int) -> list[str]:
        return [f"ready/{version}/{rank}" for rank in range(1, len(self.members))]

    def _wait_for(self, keys: list[str], version: int, what: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        while True:
            self._check()
            try:
                left = max(deadline - time.monotonic(), 0.01)
                self._store.wait(keys, timedelta(seconds=min(left, _LOOK_SECONDS)))
                return
            except dist.DistStoreError:
                if time.monotonic() < deadline:
                    continue
            ready = zip(self.members[1:], self._ready_keys(version), strict=True)
            late = [member for member, key in ready if not self._store.check([key])]
            raise self._too_late(what, ", ".join(late or [self.members[0]]))

    def _broadcast(self, buffers: list[Tensor], version: int) -> None:
        """From member 0 to all; returns when this member's part is complete.

        Raises:
            TimeoutError: it was not complete in time.
        """
        works = [self._group.broadcast([buffer], dist.BroadcastOptions()) for buffer in buffers]
        deadline = time.monotonic() + self.timeout_s
        looked = time.monotonic()
        while not all(work.is_completed() for work in works):
            if time.monotonic() > deadline:
                raise self._too_late(f"broadcast weights version {version}", "a member that was ready and then stopped")
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                self._check()
            time.sleep(_POLL_SECONDS)
        for work in works:
            work.wait()  # raises what went wrong; on a GPU this thread's stream goes on after it

    def _too_late(self, what: str, waiting_for: str) -> TimeoutError:
        return TimeoutError(f"could not {what} within {self.timeout_s:.0f} s; waiting for {waiting_for}")

    def _own_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _backend(self) -> Any:
        # a connection of its own: `wait` blocks all other calls on its connection
        store = dist.PrefixStore("weights", self._store.clone())  # type: ignore[attr-defined]
        timeout = timedelta(seconds=2 * self.timeout_s)  # our own deadline is earlier, and names who is missing
        if self.device.type == "cpu":
            return dist.ProcessGroupGloo(store, self.rank, len(self.members), timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, self.rank, len(self.members), options)
