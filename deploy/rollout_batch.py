"""Rollout batches in flight: from prompts to record batches with targets. Only references move here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import ray

from common.config.run import RunConfig, Unmasking
from common.prompts import Prompt, longest_response
from common.trajectory import BatchInfo
from deploy.cluster import Pools
from deploy.dealing import Deck, ResponseLengths
from deploy.errors import StuckError
from deploy.remote_calls import RemoteCalls

_POLL_SECONDS = 0.2
ROLLOUTS, TARGETS = "generating", "computing targets"  # what actors do for a batch


class RolloutBatch:
    """Streams rollouts from the actors and passes each record batch to a teacher as it arrives.

    Every (ordinal, sample) of `expected` ends up in `infos` exactly once. Life cycle: constructed (rollouts start at
    once, or queue behind what the actors still do), `advance` with what is ready until `done`, then `refs` are the
    record batches for the learner:

        batch = RolloutBatch(0, prompts, config, limit, block_size, unmasking, pools, calls, lengths)
        while not batch.done:
            batch.advance(ray.wait(batch.waiting)[0])
        ranks[0].train.remote(batch.refs, ...)

    Every actor gets a first share, and more prompts as it sends trajectories on (`deploy/dealing.py`).
    """

    def __init__(
        self,
        index: int,
        prompts: list[Prompt],
        config: RunConfig,
        max_new_tokens: int,
        block_size: int,
        unmasking: Unmasking,
        pools: Pools,
        calls: RemoteCalls,
        lengths: ResponseLengths,
    ) -> None:
        rollout, caps = config.rollout, config.data.domain_max_tokens
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
        self._calls = calls
        self._stream_rows = rollout.stream_rows
        self._names = pools.names()
        self._streams: dict[Any, str] = {}
        self._generators: dict[Any, str] = {}
        self._annotating: dict[ray.ObjectRef, tuple[ray.ObjectRef, str]] = {}
        self._load = dict.fromkeys(pools.teachers, 0)
        self._of_teacher: dict[ray.ObjectRef, Any] = {}
        self.actor_stats: dict[ray.ObjectRef, str] = {}
        self._lengths = lengths
        self._prompt_of = {prompt.ordinal: prompt for prompt in prompts}
        limits = {p.ordinal: longest_response(p, max_new_tokens, caps, block_size) for p in prompts}
        room = rollout.slots + 2 * rollout.stream_rows  # a record batch not yet full, and one that is under way
        self._deck = Deck(
            prompts,
            rollout.samples_per_prompt,
            len(pools.rollouts),
            room,
            lambda prompt: lengths.expected(prompt, limits[prompt.ordinal]),
        )
        shares = self._deck.first()
        more = () if self._deck.empty else (index, max(len(p.ids) + limits[p.ordinal] for p in prompts))
        self._awaiting: dict[Any, int] = {}  # actors that may get more prompts, by their streams
        for i, (actor, share) in enumerate(zip(pools.rollouts, shares, strict=True)):
            if share:
                order = (share, max_new_tokens, block_size, unmasking, *more)
                stream = actor.rollout.options(num_returns="streaming").remote(*order)
                self._generators[stream] = self._names[actor]
                self._streams[stream] = self._names[actor]
                if more:
                    self._awaiting[stream] = i
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
                self._note(self._calls.result(item, name, TARGETS))
                self.refs.append(batch)
                self._load[self._of_teacher.pop(item)] -= 1
                if self.done:
                    self.targets_done = time.time()

    def _take_from(self, generator: Any) -> None:
        batch = next(generator, None)
        if batch is None:
            del self._generators[generator]
            if not self._generators:
                self.rollouts_done = self.targets_done = time.time()
                self._raise_failed_streams()
            return
        self._calls.observers.heard(self._streams[generator])
        self._deal_after(generator)
        if not self._pools.teachers:
            self._take_finished(generator, batch)
            return
        teacher = min(self._pools.teachers, key=lambda t: self._load[t])
        annotated, info = teacher.annotate_with_info.options(num_returns=2).remote(batch)
        self._load[teacher] += 1
        self._of_teacher[info] = teacher
        self._annotating[info] = (annotated, self._names[teacher])
        self.peak_teacher_queue = max(self.peak_teacher_queue, len(self._annotating))

    def _deal_after(self, generator: Any) -> None:
        """More prompts for an actor that has sent a record batch on; with the last ones all are told that they have
        all."""
        if generator not in self._awaiting:
            return
        i, actors = self._awaiting[generator], self._pools.rollouts
        if share := self._deck.after(i, self._stream_rows):
            actors[i].deal.remote(self.index, share)
        if self._deck.empty:
            for waiting in self._awaiting.values():
                actors[waiting].deal.remote(self.index, None)
            self._awaiting.clear()

    def _note(self, info: BatchInfo) -> None:
        self.infos.append(info)
        for (ordinal, _), length in zip(info.keys, info.lengths, strict=True):
            self._lengths.note(self._prompt_of[ordinal], length)

    def _take_finished(self, generator: Any, batch: ray.ObjectRef) -> None:
        """A batch that needs no targets, and its metrics, which the actor sends right behind it."""
        info = next(generator, None)
        if info is None:
            self._raise_failed_streams()
        self._note(self._calls.result(info, self._generators[generator], ROLLOUTS))
        self.refs.append(batch)

    def _raise_failed_streams(self) -> None:
        ended = {stream.completed(): name for stream, name in self._streams.items()}
        ready, _ = ray.wait(list(ended), num_returns=len(ended), timeout=0)
        for ref in ready:
            self._calls.result(ref, ended[ref], ROLLOUTS)

    @property
    def working(self) -> dict[str, str]:
        """The actors that this batch waits for, and what they do."""
        teachers = {name for _, name in self._annotating.values()}
        return dict.fromkeys(self._generators.values(), ROLLOUTS) | dict.fromkeys(teachers, TARGETS)


class RolloutsInFlight:
    """The rollout batches that are under way, oldest first: the `Background` of all other waits."""

    def __init__(self) -> None:
        self._batches: deque[RolloutBatch] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[RolloutBatch]:
        return iter(self._batches)

    def append(self, batch: RolloutBatch) -> None:
        self._batches.append(batch)

    def popleft(self) -> RolloutBatch:
        return self._batches.popleft()

    def clear(self) -> None:
        self._batches.clear()

    @property
    def waiting(self) -> list[Any]:
        return [item for batch in self._batches for item in batch.waiting]

    @property
    def working(self) -> dict[str, str]:
        return {name: work for batch in self._batches for name, work in batch.working.items()}

    def advance(self) -> None:
        """Handle all that is ready now, without waiting.

        Raises:
            WorkerError: a worker failed.
        """
        if waiting := self.waiting:
            self._handle(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])

    def finish_oldest(self, calls: RemoteCalls) -> RolloutBatch:
        """Advance all batches until the oldest is done; it stays in flight until it is trained on.

        Raises:
            StuckError: nothing moved within the deadline; names the actors that were waited for.
            WorkerError: a worker failed.
            StopRequested: the run was asked to stop.
        """
        oldest = self._batches[0]
        moved = time.perf_counter()
        while not oldest.done:
            calls.stop.check()
            ready, _ = ray.wait(self.waiting, num_returns=1, timeout=_POLL_SECONDS)
            self._handle(ready)
            rows = len(oldest.expected)
            calls.observers.active(
                self.working, {"rollout": (oldest.streamed_rows, rows), "teacher": (oldest.finished_rows, rows)}
            )
            if ready:
                moved = time.perf_counter()
            elif time.perf_counter() - moved > calls.timeout_s:
                names = ", ".join(sorted(self.working))
                raise StuckError(f"rollout batch {oldest.index}: nothing from {names} for {calls.timeout_s:.0f} s")
        return oldest

    def _handle(self, ready: list[Any]) -> None:
        for batch in self._batches:
            batch.advance(ready)
