"""The teacher pool: the frozen ARLM, asked once per trajectory for its next-token distributions.

A backend answers requests; an actor collects the requests of all rollout actors into large batches for it.

Left out: a background task that serves a queue. Callers serve instead, each in its turn, so an error always reaches a
caller, and nothing can die unnoticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from actors.teacher.masked_state_backend import MaskedStateBackend
from actors.teacher.targets import HiddenTargets, TargetRequest, TeacherBackend, reshape_topk
from actors.teacher.transformers_backend import TransformersBackend
from actors.teacher.vllm_backend import VllmBackend
from common.busy import BusySpans
from common.config.run import RunConfig
from common.config.targets import AS_IT_IS, TeacherTarget
from common.config.teacher import TeacherConfig
from common.ray_actor import as_ray_actor
from common.seeds import routing_rng
from common.trajectory import BatchInfo, Trajectory, TrajectoryMeta, batch_info, from_batch, to_batch


def build_backend(config: TeacherConfig, model_path: str, tokens: int | None = None) -> TeacherBackend:
    """Load the configured engine, which computes with `config.resources.threads` threads; see TeacherBackend for
    `tokens`. It has answered once, so that what an engine does at its first request is done.
    """
    torch.set_num_threads(config.resources.threads)
    backend: type[VllmBackend | TransformersBackend] = VllmBackend
    if config.backend == "transformers":
        backend = MaskedStateBackend if config.reads == "state" else TransformersBackend
    loaded = backend(config, model_path, tokens)
    loaded.targets([TargetRequest(np.zeros(2, np.int32), np.ones(1, np.int32))])
    return loaded


def annotate(
    backend: TeacherBackend, trajectories: Sequence[Trajectory], shape: TeacherTarget = AS_IT_IS, block_size: int = 0
) -> None:
    """Fill the target fields for the `target_offsets` of each trajectory; they stay empty where there are none.

    Top-k targets are reshaped here. With hidden states the learner reshapes, after the LM head. `block_size` of the
    trajectories is needed for block-aware targets.
    """
    asked = [t for t in trajectories if len(t.target_offsets)]
    requests = [backend.request(t) for t in asked]
    for trajectory, request, targets in zip(asked, requests, backend.targets(requests), strict=True):
        if isinstance(targets, HiddenTargets):
            trajectory.hidden = targets.hidden.ravel()
        else:
            if shape.block_aware:
                rng = routing_rng(trajectory.ordinal, trajectory.sample)
                routed = rng.random(len(request.positions)) < shape.routed_share
                share = shape.block_aware / shape.routed_share
                targets = backend.block_aware(request, targets, block_size, share, routed)
            targets = reshape_topk(targets, shape) if shape.reshapes else targets
            trajectory.topk_ids = targets.ids.ravel()
            trajectory.topk_logprobs = targets.logprobs.ravel()
            trajectory.log_tail_mass = targets.log_tail_mass


@dataclass(eq=False)
class _Work:
    """A record batch that waits for its targets; in the end it has a result or an error."""

    trajectories: list[Trajectory]
    meta: TrajectoryMeta
    arrived: float = field(default_factory=time.monotonic)
    result: pa.RecordBatch | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None

    @property
    def asked(self) -> list[Trajectory]:
        return [t for t in self.trajectories if len(t.target_offsets)]

    @property
    def tokens(self) -> int:
        return sum(len(t.causal_ids) for t in self.asked)

    @property
    def ordinals(self) -> list[int]:
        return [t.ordinal for t in self.trajectories]


class TeacherActor:
    """An asyncio Ray actor around one backend.

    Life cycle: constructed with the model loaded; then `annotate`, from any number of callers at once; `close` or a
    kill at the end. The state between calls is the list of waiting requests and the counters.

        actor = as_remote(config).remote(config.teacher, config.teacher_path)
        calls = [actor.annotate.remote(batch) for batch in batches]  # served together where they fit
        annotated = ray.get(calls)                                   # the same rows, with targets
        ray.get(actor.close.remote())

    One caller at a time serves: it waits until `max_batched_tokens` are there or the oldest request is `max_wait_ms`
    old, runs one backend batch of the oldest requests, and repeats until its own is done. If that caller is cancelled,
    the next one goes on with what still waits.
    """

    def __init__(
        self,
        config: TeacherConfig,
        model_path: str,
        index: int = 0,
        shape: TeacherTarget = AS_IT_IS,
        tokens: int | None = None,
    ) -> None:
        self.config = config
        self.model_path = model_path
        self.shape = shape
        self.index = index
        start = time.perf_counter()
        # engines keep state per thread (OpenMP, CUDA), so one thread builds and runs this one
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self.backend = self.thread.submit(build_backend, config, model_path, tokens).result()
        self.load_seconds = time.perf_counter() - start
        self.waiting: list[_Work] = []
        self.turn = asyncio.Lock()
        self.enough = asyncio.Event()
        self.sequences = self.tokens = self.batches = self.failed_requests = 0
        self.busy_seconds = 0.0
        self.spans = BusySpans()

    def ready(self) -> dict[str, Any]:
        return {
            "role": "teacher",
            "index": self.index,
            "pid": os.getpid(),
            "node": ray.util.get_node_ip_address(),
            "model_path": self.model_path,
            "backend": self.config.backend,
            "target_kind": self.backend.kind,
            "target_width": self.backend.width,
            "vocab_size": self.backend.vocab_size,
            "max_length": self.backend.max_length,
            "load_seconds": self.load_seconds,
        }

    def progress(self) -> int:
        """Sequences read so far."""
        return self.sequences

    def stats(self) -> dict[str, Any]:
        """Counters since the actor started; `queue_depth` is the number of record batches in it now. `spans` says when
        it computed targets since the last call (common/busy.py), and `warnings` what somebody should hear."""
        return {
            "pid": os.getpid(),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "busy_seconds": self.busy_seconds,
            "spans": self.spans.take(),
            "batches": self.batches,
            "failed_requests": self.failed_requests,
            "queue_depth": len(self.waiting),
            "warnings": self.backend.take_notes(),
        }

    async def annotate(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The same trajectories with targets; the schema's metadata says which.

        Raises:
            ValueError: the batch does not fit the schema, or already has targets.
            RuntimeError: the backend failed on it; the message names the ordinals, and the cause is chained.
        """
        trajectories, meta = from_batch(batch)
        meta.require(target_kind="none")
        work = _Work(trajectories, meta)
        self.waiting.append(work)
        if self._waiting_tokens() >= self.config.max_batched_tokens:
            self.enough.set()
        async with self.turn:
            while not work.done:
                await self._serve()
        if work.error is not None:
            raise RuntimeError(f"the teacher failed on ordinals {work.ordinals}: {work.error}") from work.error
        assert work.result is not None
        return work.result

    async def annotate_with_info(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, BatchInfo]:
        """As `annotate`, and the few numbers that the pipeline reads instead of the batch."""
        annotated = await self.annotate(batch)
        return annotated, batch_info(annotated)

    async def close(self) -> None:
        """Wait for the batch in progress and release the engine; the actor cannot be used afterwards."""
        async with self.turn:
            await asyncio.wrap_future(self.thread.submit(self.backend.close))
            self.thread.shutdown()

    async def _serve(self) -> None:
        """Annotate the oldest waiting requests, as one backend batch."""
        deadline = self.waiting[0].arrived + self.config.max_wait_ms / 1000
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.enough.wait(), max(0.0, deadline - time.monotonic()))
        works = self._oldest()
        start = time.perf_counter()
        await self._attempt(works)
        self.busy_seconds += time.perf_counter() - start
        self.batches += 1
        self.failed_requests += sum(w.error is not None for w in works)
        served = [w for w in works if w.error is None]
        self.sequences += sum(len(w.asked) for w in served)
        self.tokens += sum(w.tokens for w in served)
        # not earlier: if this task is cancelled, the next one must serve them
        self.waiting = [w for w in self.waiting if not w.done]
        if self._waiting_tokens() < self.config.max_batched_tokens:
            self.enough.clear()

    def _oldest(self) -> list[_Work]:
        """The oldest request, and the next ones while all fit into max_batched_tokens."""
        works = self.waiting[:1]
        tokens = works[0].tokens
        for work in self.waiting[1:]:
            tokens += work.tokens
            if tokens > self.config.max_batched_tokens:
                break
            works.append(work)
        return works

    def _waiting_tokens(self) -> int:
        return sum(w.tokens for w in self.waiting)

    async def _attempt(self, works: list[_Work]) -> None:
        """Give every request a result or an error."""
        run = asyncio.wrap_future(self.thread.submit(self._annotate, works))
        await asyncio.wait([run])
        error = run.exception()
        if error is not None and len(works) == 1:
            works[0].error = error
        elif error is not None:
            # one by one, so that only the faulty request fails
            for work in works:
                await self._attempt([work])

    def _annotate(self, works: list[_Work]) -> None:
        with self.spans.measure():
            for size in {w.meta.block_size for w in works}:
                rows = [t for w in works if w.meta.block_size == size for t in w.trajectories]
                annotate(self.backend, rows, self.shape, size)
        kind, width, dtype = self.backend.kind, self.backend.width, self.backend.hidden_dtype
        for work in works:
            meta = replace(work.meta, target_kind=kind, target_width=width, hidden_dtype=dtype)
            work.result = to_batch(work.trajectories, meta)


def as_remote(config: RunConfig) -> Any:
    return as_ray_actor(TeacherActor, config.teacher.resources)
