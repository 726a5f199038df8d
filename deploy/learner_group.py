"""The learner's ranks as one group: they are called together, and when one of them fails, restarted together.

A restarted group goes on from the newest state that all ranks' keepers have (learner/shard_keeper.py), else from the
checkpoint or the model that it began with, and trains the rollout batches since then again: the same record batches
with the same learning rates, so on a CPU the weights are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.config.run import RunConfig
from deploy.cluster import Pools, start_learner
from deploy.curriculum import extra_weights
from deploy.errors import RunError, WorkerError
from deploy.remote_calls import Background, RemoteCalls, is_failed
from learner import shard_keeper
from learner.faults import FaultFolder
from learner.schedule import RunUpdates
from learner.updater import MicroBatchTooLargeError

_ANSWER_SECONDS = 10.0
_TRIES = 3  # of a restart: what fails so often is no accident


@dataclass(frozen=True)
class TrainedBatch:
    """A rollout batch that took the learner from version `before` to the next, with the updates from `first_update`;
    its targets are those of `anchor`, where one taught."""

    before: int
    refs: list[ray.ObjectRef]
    first_update: int
    anchor: Path | None


class LearnerGroup:
    """Life cycle: constructed with the ranks; `start`; `load` where the run goes on from a checkpoint; then for every
    rollout batch one `train`, and other collective methods with `call`. `restart` may come at any time in between, from
    the wait of such a call, which is then asked again.
    """

    def __init__(
        self,
        config: RunConfig,
        pools: Pools,
        calls: RemoteCalls,
        updates: RunUpdates,
        failed: Callable[[str], None],
        copies: bool = True,
    ) -> None:
        """`copies`: every rank has a keeper. `failed` counts a fault that comes while the group is restarted; it raises
        when that was one too many."""
        self.config = config
        self.pools = pools
        self.calls = calls
        self.updates = updates
        self.version = 0
        self.busy = True  # with a call that has not come back, or never did
        self._failed = failed
        self._base: Path | None = None  # the checkpoint that the group began with
        self._base_version = 0
        self._recent: list[TrainedBatch] = []
        self._anchor: Path | None = None
        self._budgets: dict[str, int] = {}  # config fields that were lowered when memory ran out
        self._faults = config.run_dir.resolve() / "faults"
        self._keeping: list[ray.ObjectRef] = []
        self._keepers = [start_keeper(pools, i) for i in range(len(pools.ranks) if copies else 0)]

    def call(self, method: str, action: str, *arguments: Any, background: Background | None = None) -> list[Any]:
        """A collective method on all ranks; the results in their order."""

        def ask(name: str) -> ray.ObjectRef:
            return getattr(self.pools.actor(name), method).remote(*arguments)

        self.busy = True
        results = self._together(ask, action, background)
        self.busy = False
        return results

    def load(self, folder: Path, version: int) -> None:
        """Go on from a checkpoint's folder `resume`, which holds a version."""
        self._base, self._base_version, self.version = folder, version, version
        self.call("load", "loading a checkpoint", folder)

    def teach_by(self, anchor: Path) -> None:
        """From the next rollout batch on, targets are those of the student in this folder."""
        self.call("teach_by", "loading the anchor", anchor)
        self._anchor = anchor

    def train(
        self, refs: list[ray.ObjectRef], first_update: int, spool: Path | None, background: Background, keep: int
    ) -> dict[str, Any]:
        """All updates of one rollout batch; at most `keep` of those that are left out are written down. Returns what
        rank 0 measured, with the warnings of all ranks."""
        weights, faults = extra_weights(self.config.objective, self.version), FaultFolder(self._faults, keep)
        order = refs, first_update, self.updates, spool, weights, faults
        results = self.call("train", "training", *order, background=background)
        warnings = [f"learner-{i}: {warning}" for i, result in enumerate(results) for warning in result["warnings"]]
        learner: dict[str, Any] = results[0] | {"warnings": warnings}
        if self._keepers:
            newest = max(self._common(), default=self._base_version)
            self._recent = [batch for batch in self._recent if batch.before >= newest]
            self._recent.append(TrainedBatch(self.version, refs, first_update, self._anchor))
        self.version += 1
        self._keep()
        return learner

    def start(self) -> None:
        """Have the ranks load the model."""
        try:
            start_learner(self.config, self.pools, self.calls)
        except WorkerError as error:
            self._failed(str(error))
            self.restart(error)
        self.busy = False

    def restart(self, error: WorkerError) -> None:
        """New processes in the state that the old ones had after their last rollout batch. Where memory ran out in the
        old ones, these make smaller micro-batches from now on.

        Raises:
            WorkerError: they fail again and again.
        """
        for tries_left in reversed(range(_TRIES)):
            self._make_room(error)
            try:
                self._restart()
                return
            except WorkerError as next_error:
                if not tries_left:
                    raise
                error = next_error
                self._failed(str(error))

    def _make_room(self, error: WorkerError) -> None:
        too_large = getattr(error.__cause__, "cause", None)  # Ray's error has that of the actor
        if isinstance(too_large, MicroBatchTooLargeError):
            self._budgets[too_large.budget] = too_large.value
            self.calls.observers.note(
                f"GPU memory ran out: {too_large.budget} is {too_large.value} from now on, and the rollout batch is "
                f"trained again; set {too_large.budget} to {too_large.value}",
                "warning",
            )

    def _restart(self) -> None:
        for name in self._names():
            self.pools.replace(name)
        self._keeping = []  # their calls have failed, the keepers are well
        start_learner(self.config, self.pools, self.calls)
        self._once("limit", "starting the learner", self._budgets)
        version = self._take_back()
        again = [batch for batch in self._recent if batch.before >= version]
        if len(again) < self.version - version:
            raise RunError(
                f"the learner's state after {self.version} rollout batches is lost: its copies in memory are gone or "
                "off (recovery.learner_copy); go on from the newest checkpoint with --resume auto"
            )
        anchor = None  # new processes know of none
        for batch in again:
            if batch.anchor and batch.anchor != anchor:
                self._once("teach_by", "loading the anchor", batch.anchor)
            anchor = batch.anchor
            weights = extra_weights(self.config.objective, batch.before)
            faults = FaultFolder(self._faults, most=0)  # what is left out was written down the first time
            order = batch.refs, batch.first_update, self.updates, None, weights, faults
            self._once("train", "training again", *order)
        if self._anchor and self._anchor != anchor:
            self._once("teach_by", "loading the anchor", self._anchor)
        self.calls.observers.note(f"the learner goes on from version {version}; {len(again)} batches trained again")

    def _take_back(self) -> int:
        """Restore the newest state that there is; returns its version."""
        if common := self._common():
            refs = [r.take_back.remote(max(common), k) for r, k in zip(self.pools.ranks, self._keepers, strict=True)]
            self._wait(refs, "taking its state back")
            return max(common)
        if self._base:
            self._once("load", "loading a checkpoint", self._base)
        return self._base_version

    def _keep(self) -> None:
        """Have every rank send its state to its keeper, and replace keepers that are gone."""
        for i, ref in enumerate(self._keeping):
            if ray.wait([ref], timeout=0)[0] and is_failed(ref):
                self._keepers[i] = start_keeper(self.pools, i)
        for rank, keeper in zip(self.pools.ranks, self._keepers, strict=True):
            rank.keep.remote(self.version, keeper)
        self._keeping = [rank.kept.remote() for rank in self.pools.ranks]

    def _common(self) -> set[int]:
        """The versions that all keepers have."""
        versions = [_versions_of(keeper) for keeper in self._keepers]
        return set.intersection(*versions) if versions else set()

    def _once(self, method: str, action: str, *arguments: Any) -> None:
        """A call that is not asked again: when it fails, all begins anew."""
        self._wait([getattr(rank, method).remote(*arguments) for rank in self.pools.ranks], action)

    def _wait(self, refs: list[ray.ObjectRef], action: str) -> None:
        self.calls.wait(dict(zip(refs, self._names(), strict=True)), action)

    def _together(self, ask: Callable[[str], ray.ObjectRef], action: str, background: Background | None) -> list[Any]:
        calls = {ask(name): name for name in self._names()}
        return self.calls.wait(calls, action, background=background, again=ask, together=True)

    def _names(self) -> list[str]:
        return [f"learner-{i}" for i in range(len(self.pools.ranks))]


def start_keeper(pools: Pools, index: int) -> Any:
    """On a node that holds no ranks, where there is one."""
    own = set(placement_group_table(pools.groups["learner"])["bundles_to_node_id"].values())
    others = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU") and n["NodeID"] not in own]
    keeper = shard_keeper.as_remote()
    if others:
        place = NodeAffinitySchedulingStrategy(others[index % len(others)], soft=True)
        keeper = keeper.options(scheduling_strategy=place)
    return keeper.remote()


def _versions_of(keeper: Any) -> set[int]:
    try:
        return set(ray.get(keeper.versions.remote(), timeout=_ANSWER_SECONDS))
    except ray.exceptions.RayError:  # it is gone, or its node
        return set()
