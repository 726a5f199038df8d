"""The engine: a thread that runs the sampler's passes for all clients.

Jobs join and leave between passes. Requests of one block size share passes, whatever their other settings; but those of
the speculative rule, whose passes verify, share them among themselves. Each such lane has a sampler of its own on the
same weights; they take turns, pass by pass. The lane of the server's own settings has all slots, others have a few, and
are forgotten when nobody uses them. Each keeps prefixes that its requests share.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.evaluation.generation import sampler_of
from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from actors.sampler.unmasking import without_threshold
from common.config.unmasking import SpeculativeUnmasking
from common.trajectory import Trajectory
from common.weights.transport import load_weights
from deploy.serving.errors import ApiError
from deploy.serving.jobs import Job
from deploy.serving.metrics import ServingMetrics

OTHER_SLOTS = 4  # of a lane that is not that of the server's own settings
MOST_LANES = 4  # at the same time
PREFIX_SHARE = 0.25  # tokens of kept prefixes, as a share of those that the slots have memory for
_LONGEST_RETRY = 60  # seconds

_USUAL = Decoding()

_log = logging.getLogger(__name__)


class _Passes(NamedTuple):
    """What requests that share passes have in common."""

    block_size: int
    speculative: SpeculativeUnmasking | None  # without its threshold; None: all other rules


class _Lane:
    """A sampler, its running jobs by ordinal, and those that join before its next pass."""

    def __init__(self, sampler: Sampler, longest: int, decoding: Decoding) -> None:
        self.sampler = sampler
        self._decoding = decoding
        self.jobs: dict[int, Job] = {}
        self._longest = longest
        self._joining: list[Request] = []
        self._passes = self._run()
        self._known_before = 0

    @property
    def free(self) -> int:
        return self.sampler.slots - len(self.jobs)

    def join(self, job: Job) -> None:
        self.jobs[job.ordinal] = job
        self._joining.append(job.request)

    def leave(self, ordinals: set[int]) -> None:
        gone = ordinals & self.jobs.keys()
        if gone:
            self.sampler.cancel(gone)
            self._joining = [request for request in self._joining if request.ordinal not in gone]
            for ordinal in gone:
                del self.jobs[ordinal]

    def next_pass(self) -> list[Trajectory]:
        return next(self._passes)

    def newly_known(self) -> int:
        """Prompt tokens that were found among kept prefixes since the last call."""
        before, self._known_before = self._known_before, self.sampler.known_tokens
        return self._known_before - before

    def fail(self) -> list[Job]:
        """Forget all jobs, and return them; the next pass begins anew."""
        jobs = list(self.jobs.values())
        self.jobs.clear()
        self._joining.clear()
        self._passes = self._run()
        return jobs

    def _run(self) -> Iterator[list[Trajectory]]:
        return self.sampler.passes([], self._decoding, self._more, self._longest)

    def _more(self, idle: bool) -> list[Request]:
        came, self._joining = self._joining, []
        return came


class Engine:
    """Life cycle: constructed on a loaded student, `start`ed in an event loop, fed with `submit` and `cancel` from that
    loop, and `close`d; `swap` at any time in between, from any thread. `failure` is the error that ended its thread, if
    one did; `on_failure` is called then.

    `prefix_tokens` are kept of prompts and responses for later prompts that begin with them. `decoding` is that of most
    requests. `verifier` is the original for speculative requests with verify 'base'; of these no prefixes are kept.

    A job whose sequence has a non-finite logit, or finds no memory, fails with its neighbours of the same lane;
    the engine goes on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int,
        longest: int,
        queue_limit: int,
        metrics: ServingMetrics,
        prefix_tokens: int | None = None,
        decoding: Decoding = _USUAL,
        verifier: PreTrainedModel | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.verifier = verifier
        self.slots = slots
        self.longest = longest
        self.prefix_tokens = int(PREFIX_SHARE * slots * longest) if prefix_tokens is None else prefix_tokens
        self.queue_limit = queue_limit
        self.metrics = metrics
        self._main = _passes_of(int(model.config.block_size), decoding)
        self.end_tokens = model.generation_config.eos_token_id
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.weights_version = 0
        self._new: tuple[list[tuple[str, Tensor]], Future[int]] | None = None  # weights that are to be swapped in
        self._condition = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._gone: set[int] = set()
        self._closed = False
        self._unfinished = 0
        self._seconds = 1.0  # that a job takes, a moving average
        self._lanes = {self._main: self._lane(self._main, slots)}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch(
            lambda: self._unfinished - self.waiting,
            lambda: self.waiting,
            lambda: self.slots,
            lambda: self.weights_version,
        )

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs, all or none.

        Raises:
            ApiError: 429, the queue is full; 503, the engine has failed.
        """
        with self._condition:
            self._check_runs()
            if self._unfinished + len(jobs) > self.slots + self.queue_limit:
                turns = (len(self._waiting) + len(jobs)) / self.slots
                raise ApiError(
                    429,
                    f"{len(self._waiting)} sequences wait, and the queue takes {self.queue_limit}: try again later",
                    code="queue_full",
                    retry_after=min(max(math.ceil(turns * self._seconds), 1), _LONGEST_RETRY),
                )
            self._unfinished += len(jobs)
            self._waiting.extend(jobs)
            self._condition.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Forget those that have not ended; their slots are free before the next pass."""
        with self._condition:
            self._gone |= {job.ordinal for job in jobs if not job.ended}
            self._condition.notify()

    def swap(self, weights: list[tuple[str, Tensor]]) -> int:
        """Copy all parameters into the model before its next pass, and wait for that; one call at a time. Running
        requests keep what is written of them, and go on with the new weights. Returns the version of these.

        Raises:
            ApiError: 503, the engine has ended.
        """
        done = Future[int]()
        with self._condition:
            self._check_runs()
            self._new = weights, done
            self._condition.notify()
        return done.result()

    def _check_runs(self) -> None:
        if self.failure or self._closed:
            raise ApiError(503, f"the engine has ended ({self.failure}); restart the server", code="engine_ended")

    def _lane(self, passes: _Passes, slots: int) -> _Lane:
        verifier = self.verifier if passes.speculative else None
        size = passes.block_size
        sampler = sampler_of(self.model, self.tokenizer, block_size=size, slots=slots, verifier=verifier)
        sampler.longest = self.longest
        sampler.weights_version = self.weights_version
        sampler.prefix_tokens = 0 if verifier else self.prefix_tokens * slots // self.slots
        return _Lane(sampler, self.longest, Decoding(passes.speculative) if passes.speculative else _USUAL)

    def _run(self) -> None:
        try:
            while self._wait():
                self._take_weights()
                self._let_in()
                for passes, lane in list(self._lanes.items()):
                    if lane.jobs:
                        self._pass(lane)
                    elif passes != self._main:
                        del self._lanes[passes]
        except Exception as error:  # whatever it is, clients must not wait for ever
            _log.exception("the engine has ended")
            self.failure = error
            with self._condition:
                left = [*self._waiting, *(job for lane in self._lanes.values() for job in lane.jobs.values())]
                self._waiting.clear()
            self._fail(left, f"the engine has ended ({error}); restart the server")
            self._loop.call_soon_threadsafe(self.on_failure)
        with self._condition:
            self._closed = True
            if self._new:
                self._new[1].set_exception(ApiError(503, "the engine has ended; restart the server"))

    def _wait(self) -> bool:
        """Until there is something to do; False when closed."""
        with self._condition:
            while not (self._closed or self._new or self._waiting or any(lane.jobs for lane in self._lanes.values())):
                self._gone.clear()
                self._condition.wait()
            return not self._closed

    def _take_weights(self) -> None:
        """Swap in new weights, where there are some; passes that were launched before end with the old ones."""
        with self._condition:
            new = self._new
        if new is None:
            return
        weights, done = new
        load_weights(self.model, weights)
        self.weights_version += 1
        for lane in self._lanes.values():
            lane.sampler.weights_version = self.weights_version
            try:
                lane.sampler.renew()
            except torch.OutOfMemoryError as error:
                self._fail(lane.fail(), str(error))
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # the copies are done, and their source may go
        with self._condition:
            self._new = None
        done.set_result(self.weights_version)

    def _let_in(self) -> None:
        """Take out what was cancelled, and give free slots to those that wait, the first first."""
        with self._condition:
            gone, self._gone = self._gone, set()
            before = self._unfinished
            if gone:
                kept = deque(job for job in self._waiting if job.ordinal not in gone)
                self._unfinished -= len(self._waiting) - len(kept)
                self._waiting = kept
                for running in self._lanes.values():
                    self._unfinished -= len(gone & running.jobs.keys())
                    running.leave(gone)
                self.metrics.cancelled.inc(before - self._unfinished)
            late: deque[Job] = deque()
            while self._waiting:
                job = self._waiting.popleft()
                passes = _passes_of(job.block_size, job.request.decoding or _USUAL)
                lane: _Lane | None = self._lanes.get(passes)
                if lane is None and len(self._lanes) < MOST_LANES:
                    lane = self._lanes[passes] = self._lane(passes, min(self.slots, OTHER_SLOTS))
                if lane is not None and lane.free > 0:
                    lane.join(job)
                else:
                    late.append(job)
            self._waiting = late

    def _pass(self, lane: _Lane) -> None:
        """One pass, and news of it to those who wait for some."""
        if len(self._lanes) > 1:
            lane.sampler.attach()
        try:
            trajectories = lane.next_pass()
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            self._fail(lane.fail(), str(error))
            return
        self.metrics.passes.inc()
        self.metrics.known_tokens.inc(lane.newly_known())
        now = time.monotonic()
        news: list[Job] = []
        wanted = {o for o, job in lane.jobs.items() if job.streams or job.first_block is None}
        for block in lane.sampler.finished_blocks(wanted):
            job = lane.jobs[block.ordinal]
            self._first_block(job, now)
            if job.streams:
                job.blocks[block.start] = block
                news.append(job)
        rounds = {o for o, job in lane.jobs.items() if job.rounds}
        for block in lane.sampler.current_blocks(rounds) if rounds else ():
            lane.jobs[block.ordinal].blocks[block.start] = block
            news.append(lane.jobs[block.ordinal])
        for trajectory in trajectories:
            job = lane.jobs.pop(trajectory.ordinal)
            self._first_block(job, now)
            job.trajectory = trajectory
            news.append(job)
            self._seconds += 0.1 * (now - job.came - self._seconds)
            self.metrics.ended(trajectory, now - job.came)
        with self._condition:
            self._unfinished -= len(trajectories)
        self._tell(news)

    def _first_block(self, job: Job, now: float) -> None:
        if job.first_block is None:
            job.first_block = now - job.came
            self.metrics.first_block.observe(job.first_block)

    def _fail(self, jobs: list[Job], message: str) -> None:
        for job in jobs:
            job.error = ApiError(500, message, code="generation_failed")
        with self._condition:
            self._unfinished -= len(jobs)
        self._tell(jobs)

    def _tell(self, jobs: list[Job]) -> None:
        """One call into the event loop for all."""
        if jobs:
            self._loop.call_soon_threadsafe(_set, {job.changed for job in jobs})


def _passes_of(block_size: int, decoding: Decoding) -> _Passes:
    rule, _ = without_threshold(decoding.unmasking)
    return _Passes(block_size, rule if isinstance(rule, SpeculativeUnmasking) else None)


def _set(events: set[asyncio.Event]) -> None:
    for event in events:
        event.set()
