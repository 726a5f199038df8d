"""The processes of `opdlm eval`: one model in this process, or one in each of several processes of a Ray cluster."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ray

from actors.evaluation.worker import Answered, Chunk, EvaluationWorker, ModelSpec, as_remote
from common.config.cluster import RayConfig
from common.config.resources import Resources
from common.config.unmasking import Unmasking
from deploy.cluster import connect
from deploy.errors import StuckError
from deploy.remote_calls import RemoteCalls

_START_S, _CHUNK_S = 900.0, 3600.0  # longest waits: for a model to load, for the next chunk
_ACTION = "evaluating"


class Workers(AbstractContextManager["Workers"], ABC):
    """The processes that hold one model at a time.

    `load` puts a model into all of them, in place of the one before; `respond` hands out chunks; leaving the context
    ends the processes.
    """

    device: str = "cpu"
    count: int = 1

    @abstractmethod
    def load(self, spec: ModelSpec) -> None: ...

    @abstractmethod
    def respond(self, chunks: Sequence[Chunk], *settings: Any) -> Iterator[Answered]:
        """Each chunk as it is done, in any order; `settings` are those of EvaluationWorker.respond."""


class ThisProcess(Workers):
    """No other process: on the first GPU, or on the CPU with torch's own number of threads."""

    def load(self, spec: ModelSpec) -> None:
        self._worker = EvaluationWorker(spec, None)
        self.device = self._worker.ready()["device"]

    def respond(
        self,
        chunks: Sequence[Chunk],
        unmasking: Unmasking | None,
        block_size: int | None,
        temperature: float,
        seed: int,
    ) -> Iterator[Answered]:
        yield from self._worker.respond(chunks, unmasking, block_size, temperature, seed)

    def __exit__(self, *_: object) -> None:
        return None


class RayWorkers(Workers):
    """`count` processes of a Ray cluster, or of a Ray started here, each with a share of the GPUs or of the CPUs.

    Chunks are dealt out in turn, so each process has its share whatever the order of the problems.
    """

    def __init__(self, count: int, *, on_gpus: bool, address: str | None) -> None:
        self.count = count
        threads = 1 if on_gpus else max((os.cpu_count() or 1) // count, 1)
        self.resources = Resources(cpus=1, gpus=float(on_gpus), threads=threads)
        self._ray = RayConfig(address=address, num_cpus=None if address or on_gpus else max(count, os.cpu_count() or 1))
        self._names: dict[Any, str] = {}
        self._calls = RemoteCalls(_CHUNK_S)

    def __enter__(self) -> RayWorkers:
        connect(self._ray)
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def load(self, spec: ModelSpec) -> None:
        for actor in self._names:
            ray.kill(actor)
        actor_class = as_remote(self.resources)
        self._names = {actor_class.remote(spec, self.resources): f"evaluation-{i}" for i in range(self.count)}
        ready = {actor.ready.remote(): name for actor, name in self._names.items()}
        self.device = self._calls.wait(ready, "loading the model", timeout_s=_START_S)[0]["device"]

    def respond(self, chunks: Sequence[Chunk], *settings: Any) -> Iterator[Answered]:
        """Raises StuckError or WorkerError, which names the process, where one does not answer or fails."""
        streams: dict[Any, str] = {}
        for i, (actor, name) in enumerate(self._names.items()):
            if share := chunks[i :: self.count]:
                streams[actor.respond.options(num_returns="streaming").remote(share, *settings)] = name
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=_CHUNK_S)
            if not ready:
                stuck = ", ".join(sorted(streams.values()))
                raise StuckError(f"{_ACTION}: no answer from {stuck} within {_CHUNK_S:.0f} s")
            (stream,) = ready
            answered = next(stream, None)
            if answered is None:
                self._calls.result(stream.completed(), streams.pop(stream), _ACTION)
            else:
                yield self._calls.result(answered, streams[stream], _ACTION)
