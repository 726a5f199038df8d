"""A keeper: a process that has copies of one rank's shard in its memory, so that the rank may die.

After each rollout batch a rank copies its shard (learner/shards.py) in its own memory and sends the copy on, in pieces,
while it trains. The copy before stays until the next one is complete, so there is always one to go on from.

Left out: the shards as objects in Ray's store, which are lost with the process that put them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from learner.shards import HostCopy

PIECE_BYTES = 64 * 2**20
_UNDER_WAY = 2  # pieces in Ray's object store at the same time


class ShardKeeper:
    """The Ray actor. Life cycle of a copy: `put` all of its pieces, then `complete`; `versions` that are complete can
    be read back with `sizes` and `piece`."""

    def __init__(self) -> None:
        self._copies: dict[int, dict[str, np.ndarray]] = {}
        self._complete: list[int] = []

    def put(self, version: int, name: str, size: int, start: int, piece: np.ndarray) -> None:
        """Elements [start, start + n) of the flat tensor of `size` elements."""
        if version in self._complete:  # it is sent once more, by a rank that was restarted from the one before
            self._complete.remove(version)
            del self._copies[version]
        tensors = self._copies.setdefault(version, {})
        if name not in tensors:
            tensors[name] = np.empty(size, piece.dtype)
        tensors[name][start : start + len(piece)] = piece

    def complete(self, version: int) -> None:
        """All pieces of a version are here; older ones are dropped."""
        self._complete = [*self._complete, version][-2:]
        self._copies = {kept: self._copies[kept] for kept in self._complete}

    def versions(self) -> list[int]:
        return self._complete

    def sizes(self, version: int) -> dict[str, int]:
        """The elements of each tensor."""
        return {name: len(tensor) for name, tensor in self._copies[version].items()}

    def piece(self, version: int, name: str, start: int, stop: int) -> np.ndarray:
        return self._copies[version][name][start:stop]


def send(keeper: Any, version: int, tensors: Mapping[str, Tensor]) -> None:
    """Copy a shard to its keeper; returns when it is complete there."""
    under_way: list[ray.ObjectRef] = []
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1).numpy()
        for start, stop in _pieces(flat):
            if len(under_way) >= _UNDER_WAY:
                ray.get(under_way.pop(0))
            under_way.append(keeper.put.remote(version, name, len(flat), start, flat[start:stop]))
    ray.get(under_way)
    ray.get(keeper.complete.remote(version))


class ShardSender:
    """Sends one copy after the other, in a thread, while the rank trains."""

    def __init__(self) -> None:
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, "keeper")
        self._sending: Future[None] = self._thread.submit(lambda: None)

    def begin(self, keeper: Any, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy a shard, once the copy before is sent, and begin to send the copy."""
        wait([self._sending])  # it reads the copy
        self._sending = self._thread.submit(send, keeper, version, self._copy.take(tensors))

    def sent(self) -> None:
        """Returns when what has begun is complete at its keeper.

        Raises:
            RayError: the keeper is gone.
        """
        self._sending.result()


def receive(keeper: Any, version: int) -> dict[str, Tensor]:
    """A shard from its keeper."""
    tensors = {}
    for name, size in ray.get(keeper.sizes.remote(version)).items():
        step = PIECE_BYTES // 4
        parts = [ray.get(keeper.piece.remote(version, name, start, start + step)) for start in range(0, size, step)]
        flat = torch.from_numpy(np.concatenate(parts))
        tensors[name] = flat.reshape(()) if name.endswith(".step") else flat
    return tensors


def _pieces(flat: np.ndarray) -> Iterator[tuple[int, int]]:
    step = PIECE_BYTES // flat.itemsize
    for start in range(0, len(flat), step):
        yield start, min(start + step, len(flat))


def as_remote() -> Any:
    return ray.remote(num_cpus=0)(ShardKeeper)
