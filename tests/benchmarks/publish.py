"""New weights from a publisher to a reader, two Ray actors of one node: seconds, and how long the reader stands still.

A sampler stands still while weights are swapped in, not while they are fetched. The slow reference is what this
replaced: copy, concatenate and put tensor after tensor, hash in one thread, and fetch while the sampler waits.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor

from actors.weights_inbox import WeightsInbox
from common.weights.broadcast import BroadcastTransport, connect, open_store
from common.weights.checksums import device_checksums
from common.weights.object_store import ObjectStoreTransport
from common.weights.transport import WeightsTransport, load_weights
from learner.publish import parameter_buckets
from tests.benchmarks.models import random_model

BUCKET_BYTES = 256 * 2**20
MEMBERS = ("publisher", "reader")
TIMEOUT_S = 300.0
WARM_UP = 2  # versions: the object store holds two, and the first use of its memory costs more


def measure(size: str, device: str, repetitions: int = 5) -> Iterator[dict[str, Any]]:
    """Medians over so many versions after WARM_UP; a row for each way that this machine has. The slow reference is
    measured once.

    `seconds` is from the call of the publisher to the reader's acknowledgement. `swap` and `pause` are the same but in
    the slow reference, where the sampler stands still for the whole fetch. `pass_ms` is a small forward of the reader
    alone, `pass_ms_beside` and `longest_pass_ms` while a version is published and fetched.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "1")  # rather a slow measurement than none
    nbytes = sum(p.numel() for p in random_model(size, "meta").parameters()) * (2 if device == "cuda" else 4)
    store = int(3.2 * nbytes) + 2**28  # a version may still be mapped while the next is put
    free = shutil.disk_usage("/dev/shm").free
    print(
        f"   {nbytes / 2**30:.2f} GiB of weights, object store of {store / 2**30:.1f} GiB in",
        "/dev/shm" if free > store else f"/tmp, slower: /dev/shm has {free / 2**30:.1f} GiB",
        flush=True,
    )
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    ray.init(
        "local", num_cpus=2, num_gpus=gpus, include_dashboard=False, object_store_memory=store, log_to_driver=False
    )
    try:
        share = {"num_cpus": 1, "num_gpus": 0.5 if gpus == 1 else min(gpus, 1)}
        publisher = ray.remote(**share)(Publisher).remote(size, device)
        reader = ray.remote(**share, concurrency_groups={"weights": 1})(Reader).remote(size, device)
        slow: dict[str, Any] = {}
        for way in ("slow reference", "object_store", "broadcast"):
            if way == "broadcast" and gpus == 1:
                print("   broadcast: left out, NCCL needs a GPU for each of the two processes and here is one")
                continue
            times = 1 if way == "slow reference" else repetitions
            row = {"size": size, "way": way, **_metrics(publisher, reader, way, times)}
            row["gb_per_s"] = nbytes / row["seconds"] / 1e9
            if slow:
                row["over_slow"] = slow["seconds"] / row["seconds"]
                row["pause_over_slow"] = slow["pause"] / row["pause"]
            slow = slow or row
            yield row
    finally:
        ray.shutdown()


def _metrics(publisher: Any, reader: Any, way: str, repetitions: int) -> dict[str, float]:
    address = ray.get(publisher.open.remote(way))
    ray.get([publisher.join.remote(), reader.join.remote(way, address)], timeout=TIMEOUT_S)
    runs: list[dict[str, float]] = []
    for version in range(1, WARM_UP + repetitions + 1):
        ray.get(publisher.change.remote(version), timeout=TIMEOUT_S)
        start = time.perf_counter()
        handle, publish = ray.get(publisher.publish.remote(version), timeout=TIMEOUT_S)
        fetch = ray.get(reader.fetch.remote(handle), timeout=TIMEOUT_S)
        pause = ray.get(reader.swap.remote(version), timeout=TIMEOUT_S)
        runs.append({"seconds": time.perf_counter() - start, "publish": publish, "fetch": fetch, "pause": pause})
        del handle
    sums = ray.get([publisher.fingerprint.remote(), reader.fingerprint.remote()], timeout=TIMEOUT_S)
    assert sums[0] == sums[1], "the reader's weights are not the publisher's"
    metrics = {name: median(run[name] for run in runs[WARM_UP:]) for name in runs[0]}
    if way == "slow reference":
        return metrics
    return metrics | _beside_a_sampler(publisher, reader, WARM_UP + repetitions + 1)


def _beside_a_sampler(publisher: Any, reader: Any, version: int) -> dict[str, float]:
    passes = reader.sample.remote()
    time.sleep(3)
    ray.get(reader.stop.remote(), timeout=TIMEOUT_S)
    quiet = ray.get(passes, timeout=TIMEOUT_S)
    passes = reader.sample.remote()
    handle, _ = ray.get(publisher.publish.remote(version), timeout=TIMEOUT_S)
    ray.get([reader.fetch.remote(handle), reader.stop.remote()], timeout=TIMEOUT_S)
    beside = ray.get(passes, timeout=TIMEOUT_S)
    ray.get(reader.swap.remote(version), timeout=TIMEOUT_S)
    return {
        "pass_ms": 1e3 * median(quiet),
        "pass_ms_beside": 1e3 * median(beside),
        "longest_pass_ms": 1e3 * max(beside),
    }


class _Party:
    def __init__(self, size: str, device: str) -> None:
        self.device = device
        self.model = random_model(size, device)  # trainable, or nothing of it would be published
        self.transport: WeightsTransport

    def fingerprint(self) -> list[int]:
        return device_checksums([p.data.flatten().view(torch.uint8) for p in self.model.parameters()])

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Publisher(_Party):
    """Has the whole model, in place of the learner's gathered shards."""

    def open(self, way: str) -> tuple[str, int]:
        self.way = way
        self.store = open_store("localhost")
        return "localhost", self.store.port

    def join(self) -> None:
        if self.way == "broadcast":
            self.transport = BroadcastTransport(self.store, MEMBERS, 0, self.device, TIMEOUT_S)
        else:
            self.transport = ObjectStoreTransport()

    @torch.no_grad()
    def change(self, version: int) -> None:
        for parameter in self.model.parameters():
            parameter.mul_(1 + 2.0**-version)
        self._synchronise()

    def publish(self, version: int) -> tuple[Any, float]:
        start = time.perf_counter()
        buckets = parameter_buckets(self.model, BUCKET_BYTES)
        if self.way == "slow reference":
            return publish_slowly(named for bucket in buckets for named in bucket), time.perf_counter() - start
        return self.transport.publish(version, buckets), time.perf_counter() - start


class Reader(_Party):
    """`fetch` and `stop` run in a thread of their own, one after the other."""

    def __init__(self, size: str, device: str) -> None:
        super().__init__(size, device)
        self.stopped = threading.Event()

    @torch.inference_mode()
    def sample(self) -> list[float]:
        """Seconds of each forward of 16 blocks of four tokens, one at least, until `stop`."""
        ids = torch.zeros(16, 4, dtype=torch.int64, device=self.device)
        seconds = []
        while not seconds or not self.stopped.is_set():
            start = time.perf_counter()
            self.model(ids, use_cache=False)
            self._synchronise()
            seconds.append(time.perf_counter() - start)
        self.stopped.clear()
        return seconds

    @ray.method(concurrency_group="weights")
    def stop(self) -> None:
        self.stopped.set()

    def join(self, way: str, address: tuple[str, int]) -> None:
        self.way = way
        if way == "broadcast":
            self.transport = BroadcastTransport(connect(*address, TIMEOUT_S), MEMBERS, 1, self.device, TIMEOUT_S)
        else:
            self.transport = ObjectStoreTransport(self.device, TIMEOUT_S)
        self.inbox = WeightsInbox(self.transport, TIMEOUT_S)

    @ray.method(concurrency_group="weights")
    def fetch(self, handle: Any) -> float:
        start = time.perf_counter()
        if self.way == "slow reference":
            load_weights(self.model, fetch_slowly(handle))
            self._synchronise()
            self.slow_pause = time.perf_counter() - start
        else:
            self.inbox.fetch(handle)
        return time.perf_counter() - start

    def swap(self, version: int) -> float:
        """Seconds for which the sampler stands still."""
        if self.way == "slow reference":
            return self.slow_pause
        before = self.inbox.pause_seconds
        self.inbox.swap(self.model, version)
        return self.inbox.pause_seconds - before


SlowHandle = list[tuple[Any, list[tuple[str, torch.dtype, torch.Size, int, int, int]]]]


def publish_slowly(tensors: Iterable[tuple[str, Tensor]]) -> SlowHandle:
    """Buckets as (reference, [(name, dtype, shape, offset, bytes, checksum)])."""
    buckets: SlowHandle = []
    parts: list[np.ndarray] = []
    specs: list[tuple[str, torch.dtype, torch.Size, int, int, int]] = []
    filled = 0
    for name, tensor in tensors:
        data = tensor.detach().to("cpu", copy=True).contiguous().flatten().view(torch.uint8).numpy()
        padded = -(-data.nbytes // 64) * 64
        if parts and filled + padded > BUCKET_BYTES:
            buckets.append((ray.put(np.concatenate(parts)), specs))
            parts, specs, filled = [], [], 0
        checksum = xxhash.xxh3_64_intdigest(data.data)
        specs.append((name, tensor.dtype, tensor.shape, filled, data.nbytes, checksum))
        parts += [data, np.zeros(padded - data.nbytes, np.uint8)]
        filled += padded
    return [*buckets, (ray.put(np.concatenate(parts)), specs)]


def fetch_slowly(handle: SlowHandle) -> Iterator[tuple[str, Tensor]]:
    for ref, specs in handle:
        buffer = ray.get(ref)
        for name, dtype, shape, offset, nbytes, checksum in specs:
            data = buffer[offset : offset + nbytes]
            assert xxhash.xxh3_64_intdigest(data.data) == checksum, name
            yield name, torch.from_numpy(data).view(dtype).view(shape)
