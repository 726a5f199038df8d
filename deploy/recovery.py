"""Repair while the run goes on: an actor that died, failed, hangs or is silent is replaced by a new one.

The supervisor is part of the control loop: every wait asks it to `look` at the heartbeats, and tells it of every call
that failed. There is one way of repair: whatever is wrong with an actor, it is killed, so its calls fail, and whoever
waits for them asks the replacement again.

Deadlines follow from what was seen. An actor may stand still for ten times the longest pause that its role made between
two steps (passes, sequences, micro-batches) so far; before the first step of a role only `pipeline.stage_timeout_s`
ends the wait, since the first step may compile for minutes.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from common.config.run import RunConfig
from common.heartbeat import forget, last_beats
from common.weights.broadcast import DISSOLVED
from deploy.checkpoints import RunState
from deploy.cluster import Pools, actor_id, asked
from deploy.errors import RunError, WorkerError
from deploy.monitoring.observer import Observers
from deploy.remote_calls import CREATION, Repair, is_failed
from deploy.roles import ROLES, Role, role_of
from deploy.stop_signals import StopSignals

LOOK_SECONDS = 1.0
SILENT_SECONDS, LOADING_SILENT_SECONDS = 15.0, 60.0  # imports and model loading may hold all threads for a while
AWAY_SECONDS = 5.0
PROBE_SECONDS = 1.0
LEAST_STILL_SECONDS = 30.0
STILL_FACTOR = 10
HOUR = 3600.0
_WEIGHTS_LOST = (DISSOLVED, "rollouts need weights version")
_LEARNER_TRIES = 3  # of a rollout batch after a fault

# what an actor's progress counts; other work has no steps, and is watched by the deadline of its wait alone
COUNTED = frozenset({"generating", "computing targets", "training", "evaluating the student"})


@dataclass
class Pulse:
    """What was heard of one actor; times are this process's monotonic seconds."""

    created: float
    heard: float | None = None
    moved: float = 0.0
    beat: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        return bool(self.beat.get("loaded"))


class Supervisor(Repair):
    """Watches the actors of `pools` and replaces them, within the budget of each role.

    Life cycle: constructed with the run; `watch` when actors are started; then `look` and `failed` from every wait.
    When a budget is spent the run is asked to stop, as by a signal: it ends with a checkpoint where that is possible.

    Faults are counted in the run's `state`. `prepare` is called with the name of each new rollout actor, before
    anything else is asked of it.
    """

    def __init__(
        self,
        config: RunConfig,
        state: RunState,
        observers: Observers,
        stop: StopSignals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.state = state
        self.observers = observers
        self.stop = stop
        self.pools = Pools([], [], [])
        self.prepare: Callable[[str], None] = lambda name: None
        self.restart_learner: Callable[[WorkerError], None] | None = None
        self._clock = clock
        self._pulses: dict[str, Pulse] = {}
        self._pauses: dict[Role, float] = {}
        self._recent: dict[Role, deque[float]] = {role: deque() for role in ROLES}
        self._first: str | None = None
        self._learner_faults: Counter[int] = Counter()  # by rollout batch
        self._loaded: set[Role] = set()  # roles of which a process has loaded its model
        self._reloaded: set[str] = set()  # ids of rollout actors that lost their next weights with another process
        self._killed: dict[str, str] = {}  # what was wrong with a rank that was killed, by its id
        self._broken: dict[str, float] = {}  # since when, of actors that have not answered since they were replaced
        self._looked = clock()

    def watch(self, pools: Pools) -> None:
        self.pools = pools
        self._pulses = {}

    def look(self, working: Mapping[str, str]) -> None:
        """Read the heartbeats, at most once a second, and replace whoever is silent or stands still.

        Where the cluster has no place for a replacement, the run is asked to stop.
        """
        now = self._clock()
        if (away := now - self._looked) < LOOK_SECONDS:
            return
        self._looked = now
        if away > AWAY_SECONDS:  # this process stood still itself: nobody else is to blame
            for pulse in self._pulses.values():
                pulse.heard = pulse.heard and pulse.heard + away
                pulse.moved += away
        names = self.pools.names()
        beats = last_beats([actor_id(actor) for actor in names])
        for actor, name in names.items():
            if actor_id(actor) in self._killed:
                continue
            pulse = self._pulses.setdefault(actor_id(actor), Pulse(now, moved=now))
            self._feel(name, pulse, beats.get(actor_id(actor), {}), working.get(name), now)
            if not (wrong := self._wrong(name, pulse, now)):
                continue
            if role_of(name) == "learner":  # whoever calls it next restarts the group
                self._killed[actor_id(actor)] = f"{name} {wrong}"
                ray.kill(actor)
            else:
                self._replace(name, f"{name} {wrong}", since=pulse.heard or now)

    def failed(self, name: str, ref: Any, error: WorkerError) -> None:
        """A call failed. If nobody has replaced its actor yet, do it now; of a rank, the whole group.

        Raises:
            WorkerError: it cannot even load its model, or a rank failed before the group was complete.
        """
        role, actor = role_of(name), actor_id(self.pools.actor(name))
        if asked(ref) != actor:
            return
        if any(words in str(error) for words in _WEIGHTS_LOST):
            if self.restart_learner and (rank := self._dead_rank()):  # what it had published is gone with it
                self._restart_learner(f"{rank} died", error)
                self._reloaded.discard(actor)
            if actor not in self._reloaded:
                self._reloaded.add(actor)
                self.prepare(name)
                return
        if role not in self._loaded and CREATION in str(error):
            raise error
        if role != "learner":
            self._replace(name, str(error), since=self._clock())
            return
        if not self.restart_learner:
            raise error
        self._restart_learner(self._killed.get(actor, str(error)), error)

    def _restart_learner(self, cause: str, error: WorkerError) -> None:
        assert self.restart_learner
        since = self._clock()
        self.learner_failed(cause)
        self.restart_learner(error)
        self._repaired("the learner", since)

    def _dead_rank(self) -> str | None:
        """The first rank whose process is gone; one that is busy does not answer at once."""
        for actor, name in self.pools.names().items():
            if role_of(name) == "learner":
                ref = actor.__ray_ready__.remote()
                if ray.wait([ref], timeout=PROBE_SECONDS)[0] and is_failed(ref):
                    return name
        return None

    def learner_failed(self, cause: str) -> None:
        """Count a fault of the learner.

        Raises:
            RunError: the budget is spent, or it fails on the same rollout batch each time: it is not restarted.
        """
        self._count("learner", cause)
        self._learner_faults[self.state.batches] += 1
        if self._learner_faults[self.state.batches] > _LEARNER_TRIES:
            self.stop.fail(RunError(f"the learner failed on rollout batch {self.state.batches} each time: {cause}"))
        if self.stop.failure:
            raise self.stop.failure
        budget = self.config.recovery.restarts
        self.observers.note(
            f"{cause.splitlines()[0]}; the learner is restarted ({len(self._recent['learner'])} of {budget} this hour)",
            "warning",
        )

    def answered(self, name: str) -> None:
        """An actor gave a result: if it is a replacement, the fault is repaired."""
        self._loaded.add(role_of(name))
        if since := self._broken.pop(name, None):
            self._repaired(name, since)

    def _repaired(self, name: str, since: float) -> None:
        self.state.repair_seconds = self._clock() - since
        self.observers.note(f"{name} works again, {self.state.repair_seconds:.1f} s after the fault")

    def _feel(self, name: str, pulse: Pulse, beat: Mapping[str, Any], work: str | None, now: float) -> None:
        if beat and beat.get("beat") != pulse.beat.get("beat"):
            if pulse.heard is None:
                self.observers.heard(name, pid=beat["pid"])
            pulse.heard = now
        moved = beat.get("progress") != pulse.beat.get("progress")
        pulse.beat = beat
        if work not in COUNTED or not pulse.loaded:
            pulse.moved = now
        elif moved:
            role = role_of(name)
            self._pauses[role] = max(self._pauses.get(role, 0.0), now - pulse.moved)
            pulse.moved = now

    def _wrong(self, name: str, pulse: Pulse, now: float) -> str | None:
        if pulse.heard is None:
            timeout = self.config.ray.placement_timeout_s
            if now - pulse.created > timeout:
                self.stop.fail(
                    RunError(
                        f"{name} found no place in the cluster within ray.placement_timeout_s ({timeout:g} s), after: "
                        f"{self._first or 'its first start'}; add a node with {_asked_for(self.config, name)}"
                    )
                )
            return None
        silent = now - pulse.heard
        if silent > (SILENT_SECONDS if pulse.loaded else LOADING_SILENT_SECONDS):
            return f"gave no sign of life for {silent:.0f} s"
        pause = self._pauses.get(role_of(name))
        still = now - pulse.moved
        if pause is not None and still > max(LEAST_STILL_SECONDS, STILL_FACTOR * pause):
            return f"made no progress for {still:.0f} s; its longest pause before was {pause:.1f} s"
        return None

    def _replace(self, name: str, cause: str, since: float) -> None:
        role, budget = role_of(name), self.config.recovery.restarts
        self._count(role, cause)
        self._broken[name] = since
        forget(actor_id(self.pools.actor(name)))
        self._pulses.pop(actor_id(self.pools.actor(name)), None)
        self.pools.replace(name)
        self.observers.note(
            f"{cause.splitlines()[0]}; {name} is replaced ({len(self._recent[role])} of {budget} this hour)",
            "warning",
        )
        if role == "rollout":
            self.prepare(name)

    def _count(self, role: Role, cause: str) -> None:
        """Count a fault of a role; past the budget, ask the run to stop."""
        now, budget = self._clock(), self.config.recovery.restarts
        first_line = cause.splitlines()[0]
        self._first = self._first or first_line
        self.state.restarts[role] += 1
        recent = self._recent[role]
        recent.append(now)
        while now - recent[0] > HOUR:
            recent.popleft()
        if len(recent) > budget:
            self.stop.fail(
                RunError(
                    f"{first_line}; the budget of {budget} replaced {role} processes an hour (recovery.restarts) is "
                    f"spent. The first fault of the run was: {self._first}"
                )
            )


def _asked_for(config: RunConfig, name: str) -> str:
    resources = getattr(config, role_of(name)).resources
    gpus = f" and {resources.gpus:g} GPUs" if resources.gpus else ""
    return f"{resources.cpus:g} CPUs{gpus} free"
