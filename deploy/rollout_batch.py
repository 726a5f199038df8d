"""Rollout batches in flight: from prompts to record batches with targets. Only references move here."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import ray

from common.config.run import RunConfig
from common.config.shown import shown
from common.config.unmasking import Unmasking
from common.prompts import Prompt, longest_response
from common.trajectory import BatchInfo
from deploy.cluster import Pools, asked
from deploy.dealing import Deck, ResponseLengths
from deploy.errors import RunError, StuckError, WorkerError
from deploy.remote_calls import CREATION, RemoteCalls

_POLL_SECONDS = 0.2
_FETCH_SECONDS = 60.0
_FAILURES = 2  # of the same work, before it is split or set aside
ROLLOUTS, TARGETS = "generating", "computing targets"  # what actors do for a batch


Key = tuple[int, int]  # (ordinal, sample)


@dataclass(eq=False)
class Share:
    """What one call asked of one rollout actor; it is settled when all of it has its targets."""

    name: str
    prompts: list[Prompt]
    keys: set[Key]  # that have not come back with targets
    stream: Any
    fresh: ray.ObjectRef | None = None  # a record batch whose BatchInfo has not come yet
    ended: bool = False
    at_teachers: int = 0

    def ordinals(self) -> set[int]:
        return {ordinal for ordinal, _ in self.keys}


@dataclass(frozen=True)
class Annotation:
    """A record batch at a teacher; `number` tells the order in which they were sent."""

    number: int
    share: Share
    plain: ray.ObjectRef
    annotated: ray.ObjectRef
    name: str
    info: BatchInfo

    def ordinals(self) -> set[int]:
        return {ordinal for ordinal, _ in self.info.keys}


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

    When an actor fails, record batches that it had handed over stay. What is missing of a share is asked again once all
    that it handed over has come back from the teachers, so nothing can come twice. Work that failed twice in company is
    then asked one prompt at a time; a prompt that fails twice alone is set aside: it leaves `expected`.
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
        self.oldest_allowed = max(index - config.pipeline.staleness, 0)
        self.index = index
        self.max_new_tokens = max_new_tokens
        self.block_size = block_size
        self.unmasking = unmasking
        self.prompts = len({p.ordinal for p in prompts})
        self.expected = {(p.ordinal, s) for p in prompts for s in p.samples(rollout.samples_per_prompt)}
        self.refs: list[ray.ObjectRef] = []
        self.infos: list[BatchInfo] = []
        self.set_aside: list[Prompt] = []
        self.started = time.time()
        self.rollouts_done = self.targets_done = 0.0
        self.peak_teacher_queue = 0
        self._pools = pools
        self._calls = calls
        self._stream_rows = rollout.stream_rows
        self._teacher_of = config.teacher_of
        self._streams: dict[Any, Share] = {}
        self._annotating: dict[ray.ObjectRef, Annotation] = {}
        self._sent = count()
        self._failures: Counter[int] = Counter()  # of calls in which a prompt was with others, by ordinal
        self._failures_alone: Counter[int] = Counter()
        self._blamed: set[str] = set()  # ids of actors whose failure is counted
        self.actor_stats: dict[ray.ObjectRef, str] = {}
        self._samples = rollout.samples_per_prompt
        self._lengths = lengths
        self._prompt_of = {key: prompt for prompt in prompts for key in self._keys([prompt])}
        limits = {(p.ordinal, p.first_sample): longest_response(p, max_new_tokens, caps, block_size) for p in prompts}
        # for each teacher a record batch that is not yet full, and one that is under way
        room = rollout.slots + (len(config.teacher_paths) + 1) * rollout.stream_rows
        self._deck = Deck(
            prompts,
            rollout.samples_per_prompt,
            len(pools.rollouts),
            room,
            lambda prompt: lengths.expected(prompt, limits[prompt.ordinal, prompt.first_sample]),
        )
        shares = self._deck.first()
        more = () if self._deck.empty else (index, max(len(p.ids) + limits[p.ordinal, p.first_sample] for p in prompts))
        self._awaiting: dict[Any, int] = {}  # actors that may get more prompts, by their streams
        names = pools.names()
        for i, (actor, dealt) in enumerate(zip(pools.rollouts, shares, strict=True)):
            if dealt:
                stream = self._ask(names[actor], dealt, self._keys(dealt), *more)
                if more:
                    self._awaiting[stream] = i
            self.actor_stats[actor.stats.remote()] = names[actor]  # answers when the rollout is through

    @property
    def done(self) -> bool:
        return not self._streams and not self._annotating

    @property
    def streamed_rows(self) -> int:
        """Trajectories that have left the rollout actors, as far as the teachers have counted them."""
        return min(len(self.expected), self.finished_rows + len(self._annotating) * self._stream_rows)

    @property
    def finished_rows(self) -> int:
        return sum(info.rows for info in self.infos)

    @property
    def tokens_by_teacher(self) -> Counter[int]:
        """Response tokens of the finished trajectories, by the number of the teacher that they have."""
        tokens = Counter[int]()
        for info in self.infos:
            tokens[self._teacher_for(info)] += info.response_tokens
        return tokens

    @property
    def oldest_version(self) -> int | None:
        """Of the weights that made the finished rollouts; offline responses have none."""
        return min((info.oldest_version for info in self.infos if info.oldest_version is not None), default=None)

    @property
    def waiting(self) -> list[Any]:
        """What `ray.wait` may wait for."""
        return [*self._streams, *self._annotating]

    @property
    def working(self) -> dict[str, str]:
        """The actors that this batch waits for, and what they do."""
        teachers = {annotation.name for annotation in self._annotating.values()}
        rollouts = {share.name for share in self._streams.values()}
        return dict.fromkeys(rollouts, ROLLOUTS) | dict.fromkeys(teachers, TARGETS)

    def advance(self, ready: list[Any]) -> None:
        """Handle what is ready.

        Raises:
            WorkerError: a rollout actor or a teacher failed, and is not replaced.
        """
        for item in ready:
            if item in self._streams:
                self._take_from(item, self._streams[item])
            elif item in self._annotating:
                self._take_targets(item, self._annotating.pop(item))

    def ask_lost(self) -> bool:
        """Ask again for all that was lost with a node after it had its targets; whether there was any."""
        for ref, info in list(zip(self.refs, self.infos, strict=True)):
            if is_lost(ref):
                self.refs.remove(ref)  # in place: whoever trains on them has the same list
                self.infos.remove(info)
                prompts = list({id(p): p for p in (self._prompt_of[key] for key in sorted(info.keys))}.values())
                self._ask(self._pools.names()[self._pools.rollouts[0]], prompts, set(info.keys))
        return not self.done

    def _ask(self, name: str, prompts: list[Prompt], keys: set[Key], *more: int) -> Any:
        """Begin a share; `more`, the batch and the longest length, where further prompts may be dealt to it."""
        order = (prompts, self.max_new_tokens, self.block_size, self.unmasking, *more)
        actor = self._pools.actor(name)
        stream = actor.rollout.options(num_returns="streaming").remote(*order, keys=keys, oldest=self.oldest_allowed)
        self._streams[stream] = Share(name, prompts, keys, stream)
        return stream

    def _keys(self, prompts: list[Prompt]) -> set[Key]:
        return {(prompt.ordinal, sample) for prompt in prompts for sample in prompt.samples(self._samples)}

    def _deal_after(self, stream: Any, share: Share) -> None:
        """More prompts for an actor that has sent a record batch on; with the last ones all are told that they have
        all."""
        if stream not in self._awaiting:
            return
        if dealt := self._deck.after(self._awaiting[stream], self._stream_rows):
            share.prompts = [*share.prompts, *dealt]
            share.keys |= self._keys(dealt)
            self._pools.actor(share.name).deal.remote(self.index, dealt)
        if self._deck.empty:
            for waiting in self._awaiting:
                self._pools.actor(self._streams[waiting].name).deal.remote(self.index, None)
            self._awaiting.clear()

    def _deal_no_more(self, stream: Any, share: Share) -> None:
        """An actor has failed: what is still in the deck is for the others; where there are none, for its
        replacement."""
        if self._awaiting.pop(stream, None) is not None and not self._awaiting:
            rest = self._deck.rest()
            self._ask(share.name, rest, self._keys(rest))

    def _take_from(self, stream: Any, share: Share) -> None:
        """The next item of a stream: a record batch, behind it its BatchInfo; an error comes in the place of either."""
        item = next(stream, None)
        try:
            if item is None:
                if share.fresh:  # an error in the place of a record batch has nothing behind it
                    self._calls.result(share.fresh, share.name, ROLLOUTS)
                self._end(share)
            elif share.fresh is None and item != stream.completed():
                share.fresh = item
            else:
                info = self._calls.result(item, share.name, ROLLOUTS)
                plain, share.fresh = share.fresh, None
                self._deal_after(stream, share)
                self._pass_on(share, plain, info)
        except WorkerError as error:
            self._calls.repair.failed(share.name, stream.completed(), error)
            self._blame_rollouts(asked(stream.completed()), error)
            self._deal_no_more(stream, share)
            self._end(share)

    def _pass_on(self, share: Share, plain: Any, info: BatchInfo) -> None:
        if not self._pools.teachers:
            self._finish(share, plain, info)
            return
        names = self._pools.names()
        load = Counter(annotation.name for annotation in self._annotating.values())
        pool = self._pools.teachers_of(self._teacher_for(info))
        teacher = min(pool, key=lambda t: load[names[t]])
        annotated, annotated_info = teacher.annotate_with_info.options(num_returns=2).remote(plain)
        share.at_teachers += 1
        self._annotating[annotated_info] = Annotation(next(self._sent), share, plain, annotated, names[teacher], info)
        self.peak_teacher_queue = max(self.peak_teacher_queue, len(self._annotating))

    def _teacher_for(self, info: BatchInfo) -> int:
        """Of a record batch: all its trajectories have the same one."""
        return self._teacher_of(self._prompt_of[info.keys[0]].domain)

    def _take_targets(self, ref: ray.ObjectRef, annotation: Annotation) -> None:
        share, name = annotation.share, annotation.name
        share.at_teachers -= 1
        try:
            self._finish(share, annotation.annotated, self._calls.result(ref, name, TARGETS))
        except WorkerError as error:
            if is_lost(annotation.plain):  # with the node that made it
                self._settle(share)
                return
            self._calls.repair.failed(name, ref, error)
            self._blame_targets(ref, annotation, error)
            if self._failed_often(annotation.ordinals()):
                self._settle(share)  # asked again in smaller parts
            else:
                self._pass_on(share, annotation.plain, annotation.info)

    def _finish(self, share: Share, batch: ray.ObjectRef, info: BatchInfo) -> None:
        self.infos.append(info)
        for key, length in zip(info.keys, info.lengths, strict=True):
            self._lengths.note(self._prompt_of[key], length)
        self.refs.append(batch)
        share.keys -= set(info.keys)
        self._settle(share)

    def _end(self, share: Share) -> None:
        del self._streams[share.stream]
        share.ended = True
        self._settle(share)

    def _settle(self, share: Share) -> None:
        """Ask again for what is missing of a share that has ended."""
        now = time.time()
        if share.ended and not share.at_teachers and share.keys:
            self._ask_again(share)
        if not self._streams:
            self.rollouts_done = self.rollouts_done or now
            self.targets_done = now
        else:
            self.rollouts_done = 0.0

    def _ask_again(self, share: Share) -> None:
        together = []
        for prompt in share.prompts:
            keys = share.keys & self._keys([prompt])
            if self._failures_alone[prompt.ordinal] >= _FAILURES:
                self._set_aside(prompt, keys)
            elif keys and self._failures[prompt.ordinal] >= _FAILURES:
                self._ask(share.name, [prompt], keys)
            elif keys:
                together.append(prompt)
        if together:
            ordinals = {prompt.ordinal for prompt in together}
            self._ask(share.name, together, {key for key in share.keys if key[0] in ordinals})

    def _set_aside(self, prompt: Prompt, keys: set[Key]) -> None:
        self.expected -= keys
        self.set_aside.append(prompt)
        self._calls.observers.note(
            f"prompt {prompt.ordinal} is set aside, because a process failed on it twice: {shown(prompt.question)}",
            "warning",
        )
        if not self.expected:  # it is not the prompts
            self._calls.stop.fail(
                RunError(
                    f"every prompt of rollout batch {self.index} is set aside: processes fail on whatever they get"
                )
            )
            self._calls.stop.check()

    def _blame_rollouts(self, actor: str, error: WorkerError) -> None:
        """Count a failure of the oldest call of an actor: those behind it had not begun."""
        if self._is_first_failure(actor, error):
            running = next(share for stream, share in self._streams.items() if asked(stream.completed()) == actor)
            self._count_failure(running.ordinals() - self._at_teachers(running))

    def _blame_targets(self, ref: ray.ObjectRef, annotation: Annotation, error: WorkerError) -> None:
        """The same for a teacher, of which the call `ref` failed."""
        if self._is_first_failure(asked(ref), error):
            others = [a for waiting, a in self._annotating.items() if asked(waiting) == asked(ref)]
            self._count_failure(min([annotation, *others], key=lambda a: a.number).ordinals())

    def _is_first_failure(self, actor: str, error: WorkerError) -> bool:
        """Whether an actor failed at its work; all of its calls fail, also when it could not even load its model."""
        first = actor not in self._blamed and CREATION not in str(error)
        self._blamed.add(actor)
        return first

    def _count_failure(self, ordinals: set[int]) -> None:
        self._failures_of(ordinals).update(ordinals)

    def _failed_often(self, ordinals: set[int]) -> bool:
        """Whether work on these prompts has failed often enough for it to be split, or set aside."""
        return any(self._failures_of(ordinals)[ordinal] >= _FAILURES for ordinal in ordinals)

    def _failures_of(self, ordinals: set[int]) -> Counter[int]:
        return self._failures_alone if len(ordinals) == 1 else self._failures

    def _at_teachers(self, share: Share) -> set[int]:
        return {key[0] for a in self._annotating.values() if a.share is share for key in a.info.keys}


def is_lost(ref: ray.ObjectRef) -> bool:
    """Whether an object that was there is gone, with its node or with the process that made it."""
    try:
        ray.get(ref, timeout=_FETCH_SECONDS)
    except ray.exceptions.RayError:
        return True
    return False


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

    def ask_lost(self) -> bool:
        """Ask again for what was lost of the oldest; whether there was any."""
        return bool(self._batches) and self._batches[0].ask_lost()

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
            calls.repair.look(self.working)
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
