"""One rollout batch in flight: from prompts to record batches with targets. Only references move here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from common.config.run import RolloutConfig, Unmasking
from common.prompts import Prompt
from common.trajectory import BatchInfo
from deploy.cluster import Pools
from deploy.errors import StuckError
from deploy.remote_calls import last_heard, result_of

_POLL_SECONDS = 0.2


class RolloutBatch:
    """Streams rollouts from the actors and passes each record batch to a teacher as it arrives.

    Life cycle: constructed (rollouts start at once, or queue behind what the actors still do), `advance` until
    `done`, then `refs` are the batches for the learner. The prompts are dealt out in turn, so that every actor gets
    its share whatever the order.
    """

    def __init__(
        self,
        index: int,
        prompts: list[Prompt],
        rollout: RolloutConfig,
        max_new_tokens: int,
        block_size: int,
        unmasking: Unmasking,
        pools: Pools,
        heard: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`heard` is called with the name of an actor that delivered."""
        self.index = index
        self.max_new_tokens = max_new_tokens
        self.block_size = block_size
        self.unmasking = unmasking
        self.prompts = len(prompts)
        self.expected = {(p.ordinal, s) for p in prompts for s in range(rollout.samples_per_prompt)}
        self.refs: list[ray.ObjectRef] = []
        self.infos: list[BatchInfo] = []
        self.started = time.time()
        self.rollouts_done = self.targets_done = 0.0
        self.peak_teacher_queue = 0
        self._pools = pools
        self._heard = heard
        self._stream_rows = rollout.stream_rows
        self._names = pools.names()
        self._streams: dict[Any, str] = {}
        self._generators: dict[Any, str] = {}
        self._annotating: dict[ray.ObjectRef, tuple[ray.ObjectRef, str]] = {}
        self._load = dict.fromkeys(pools.teachers, 0)
        self._of_teacher: dict[ray.ObjectRef, Any] = {}
        self.actor_stats: dict[ray.ObjectRef, str] = {}
        for i, actor in enumerate(pools.rollouts):
            share = prompts[i :: len(pools.rollouts)]
            if share:
                order = (share, max_new_tokens, block_size, unmasking)
                stream = actor.rollout.options(num_returns="streaming").remote(*order)
                self._generators[stream] = self._names[actor]
                self._streams[stream] = self._names[actor]
            self.actor_stats[actor.stats.remote()] = self._names[actor]  # answers when the rollout is through

    @property
    def done(self) -> bool:
        return not self._generators and not self._annotating

    @property
    def streamed_rows(self) -> int:
        """Trajectories that have left the rollout actors, as far as the teachers have counted them."""
        return min(len(self.expected), self.finished_rows + len(self._annotating) * self._stream_rows)

    @property
    def finished_rows(self) -> int:
        return sum(info.rows for info in self.infos)

    @property
    def oldest_version(self) -> int | None:
        """Of the weights that made the finished rollouts; offline responses have none."""
        return min((info.oldest_version for info in self.infos if info.oldest_version is not None), default=None)

    @property
    def waiting(self) -> list[Any]:
        """What `ray.wait` may wait for."""
        return [*self._generators, *self._annotating]

    @property
    def teacher_queue(self) -> int:
        """Record batches that wait for targets."""
        return len(self._annotating)

    def advance(self, ready: list[Any]) -> None:
        """Handle what is ready.

        Raises:
            WorkerError: a rollout actor or a teacher failed.
        """
        for item in ready:
            if item in self._generators:
                self._take_from(item)
            elif item in self._annotating:
                self._raise_failed_streams()  # a failed stream's last batch makes its teacher call fail too
                batch, name = self._annotating.pop(item)
                self.infos.append(result_of(item, name, "computing targets"))
                self._heard(name)
                self.refs.append(batch)
                self._load[self._of_teacher.pop(item)] -= 1
                if self.done:
                    self.targets_done = time.time()

    def _take_from(self, generator: Any) -> None:
        self._heard(self._generators[generator])
        batch = next(generator, None)
        if batch is None:
            del self._generators[generator]
            if not self._generators:
                self.rollouts_done = self.targets_done = time.time()
                self._raise_failed_streams()
            return
        last_heard[self._streams[generator]] = time.time()
        if not self._pools.teachers:
            self._take_finished(generator, batch)
            return
        teacher = min(self._pools.teachers, key=lambda t: self._load[t])
        annotated, info = teacher.annotate_with_info.options(num_returns=2).remote(batch)
        self._load[teacher] += 1
        self._of_teacher[info] = teacher
        self._annotating[info] = (annotated, self._names[teacher])
        self.peak_teacher_queue = max(self.peak_teacher_queue, len(self._annotating))

    def _take_finished(self, generator: Any, batch: ray.ObjectRef) -> None:
        """A batch that needs no targets, and its metrics, which the actor sends right behind it."""
        info = next(generator, None)
        if info is None:
            self._raise_failed_streams()
        self.infos.append(result_of(info, self._generators[generator], "generating rollouts"))
        self.refs.append(batch)

    def _raise_failed_streams(self) -> None:
        ended = {stream.completed(): name for stream, name in self._streams.items()}
        ready, _ = ray.wait(list(ended), num_returns=len(ended), timeout=0)
        for ref in ready:
            result_of(ref, ended[ref], "generating rollouts")

    def waited_for(self) -> list[str]:
        """Names of the actors that this batch waits for."""
        return [*self._generators.values(), *(name for _, name in self._annotating.values())]


def advance(batches: Sequence[RolloutBatch]) -> None:
    """Handle all that is ready now, without waiting.

    Raises:
        WorkerError: a worker failed.
    """
    waiting = [item for batch in batches for item in batch.waiting]
    if waiting:
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for batch in batches:
            batch.advance(ready)


def drive(
    batches: list[RolloutBatch],
    target: RolloutBatch,
    timeout_s: float,
    show: Callable[[RolloutBatch], None],
    stopping: Callable[[], bool],
) -> None:
    """Advance all batches until `target` is done, or `stopping()` holds; `show` is called with it meanwhile.

    Raises:
        StuckError: nothing moved for `timeout_s`; names the actors that were waited for.
        WorkerError: a worker failed.
    """
    last_progress = time.perf_counter()
    while not target.done and not stopping():
        waiting = [item for batch in batches for item in batch.waiting]
        ready, _ = ray.wait(waiting, num_returns=1, timeout=_POLL_SECONDS)
        for batch in batches:
            batch.advance(ready)
        show(target)
        if ready:
            last_progress = time.perf_counter()
        elif time.perf_counter() - last_progress > timeout_s:
            names = ", ".join(sorted({name for batch in batches for name in batch.waited_for()}))
            raise StuckError(f"rollout batch {target.index}: nothing from {names} for {timeout_s:.0f} s")
