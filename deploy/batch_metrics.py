"""The metrics of a rollout batch: what actors, learner and control loop report, as one row of the run's metrics."""

from __future__ import annotations

from typing import Any

import ray

from common.busy import Span
from common.config.run import RunConfig
from common.config.unmasking import DynamicUnmasking
from deploy.checkpoints import RunState
from deploy.cluster import Pools
from deploy.monitoring.metrics import PARTS
from deploy.monitoring.occupancy import Window
from deploy.remote_calls import RemoteCalls
from deploy.rollout_batch import RolloutBatch
from deploy.run_cost import RunCost
from learner.phase_clock import PHASES


class BatchMetrics:
    """Rows with a value for every metric that is not optional; keeps the actors' counters from row to row."""

    def __init__(self, config: RunConfig, pools: Pools, calls: RemoteCalls, epoch_prompts: int, cost: RunCost) -> None:
        self.config = config
        self.cost = cost
        self.pools = pools
        self.calls = calls
        self.epoch_prompts = epoch_prompts
        self.previous_stats: dict[str, dict[str, Any]] = {}
        self._rollouts_done = 0.0  # Unix time, of the batch before
        self._asked: dict[ray.ObjectRef, str] = {}
        self._spans: list[Span] = []

    def ask(self, actors: list[Any]) -> None:
        """Ask actors when they computed. The answer comes when they have done what is queued on them before, and goes
        into the next row that can have it."""
        self._asked |= self._stats(actors)

    def row(
        self,
        in_flight: list[RolloutBatch],
        learner: dict[str, float],
        published: dict[str, float],
        window: Window,
        complete: float,
        state: RunState,
    ) -> dict[str, float]:
        """The metrics of the oldest batch in flight, counted into `state`; `complete` is the Unix time at which the
        learner had it."""
        batch, seconds, waited = in_flight[0], window.seconds, complete - window.begin
        infos = batch.infos
        tokens = sum(info.response_tokens for info in infos)
        generated = sum(info.rollout_tokens for info in infos)
        rows = max(batch.finished_rows, 1)
        state.response_tokens += tokens
        for teacher, read in batch.tokens_by_teacher.items():
            if teacher:
                state.other_teachers_tokens[str(teacher)] = state.other_teachers_tokens.get(str(teacher), 0) + read
        state.seconds += seconds
        rank_stats, teacher_stats = self._stats(self.pools.ranks), self._stats(self.pools.teachers)
        paused, computed = self._totals("weights_pause_seconds"), self._totals("token_rows")
        in_use = self._totals("slot_seconds")
        rollout_busy = self._busy(batch.actor_stats)
        pauses = [_grown(paused.get(name, 0.0), total) for name, total in self._totals("weights_pause_seconds").items()]
        state.rollout_token_rows += sum(
            _grown(computed.get(name, 0), rows) for name, rows in self._totals("token_rows").items()
        )
        teacher_busy = self._busy(teacher_stats)
        self._reported(rank_stats)
        rollout_seconds, teacher_seconds = max(rollout_busy), max(teacher_busy, default=0.0)
        for name in rank_stats.values():
            self.calls.observers.heard(name, rate=learner["packed_tokens"] / learner["seconds"] / len(self.pools.ranks))
        rollouts = window.covered((b.started, b.rollouts_done or window.end) for b in in_flight)
        targets = window.covered((b.started, b.targets_done or window.end) for b in in_flight)
        return {
            "batch": batch.index,
            "epoch": (batch.index * self.config.rollout.prompts_per_batch + batch.prompts) / self.epoch_prompts,
            "loss": learner["loss"],
            "kl": learner["kl"],
            "teacher_agreement": learner["teacher_agreement"],
            **{name: learner[name] for name in ("trusted_share", *PARTS) if name in learner},
            "grad_norm": learner["grad_norm"],
            "lr": learner["lr"],
            "tokens_per_step": generated / max(sum(info.denoise_forwards for info in infos), 1),
            "offline_share": sum(info.offline_rows for info in infos) / rows,
            "share_eos": sum(info.ended for info in infos) / rows,
            "response_length": tokens / rows,
            "response_limit": batch.max_new_tokens,
            "block_size": batch.block_size,
            "confidence_threshold": batch.unmasking.threshold if isinstance(batch.unmasking, DynamicUnmasking) else 0.0,
            "response_tokens": state.response_tokens,
            "trained_positions": learner["trained_positions"],
            "updates": state.updates,
            "nonfinite_updates": state.nonfinite_updates,
            "weights_version": batch.index + 1,
            "staleness": 0 if batch.oldest_version is None else batch.index - batch.oldest_version,
            "rollout/tokens_per_second": generated / max(rollout_seconds, 1e-9),
            "teacher/tokens_per_second": sum(info.teacher_tokens for info in infos) / teacher_seconds
            if teacher_seconds
            else 0.0,
            "learner/tokens_per_second": learner["packed_tokens"] / max(learner["seconds"], 1e-9),
            "rollout/slots_in_use": self._slots_in_use(batch, in_use),
            "queue/rollout": len(batch.expected),
            "queue/teacher": batch.peak_teacher_queue,
            "queue/learner": len(batch.refs),
            "overhead": self._overhead(in_flight, window),
            "seconds/rollout": rollout_seconds,
            "seconds/teacher": teacher_seconds,
            "seconds/learner": learner["seconds"],
            **{f"learner/{phase}_s": learner[f"{phase}_s"] for phase in PHASES},
            "seconds/publish": published["seconds"],
            "seconds/weights_pause": max(pauses),
            "seconds/batch": seconds,
            "bytes/trajectories": sum(info.nbytes for info in infos),
            "bytes/weights": published["bytes"],
            **{f"restarts/{role}": count for role, count in state.restarts.items()},
            "set_aside": state.set_aside,
            "seconds/repair": state.repair_seconds,
            **self.cost.metrics(state),
            **window.shares("rollout", rollout_busy, rollouts),
            **window.shares("teacher", teacher_busy, targets),
            **window.shares("learner", [learner["seconds"]], learner["seconds"] + waited),
        }

    def _slots_in_use(self, batch: RolloutBatch, before: dict[str, float]) -> float:
        """Mean share of all actors' slots with a running sequence, from the end of the rollouts before to that of the
        batch's own; `before` are the counters of then."""
        after = self._totals("slot_seconds")
        used = sum(_grown(before.get(name, 0.0), seconds) for name, seconds in after.items())
        seconds = batch.rollouts_done - max(batch.started, self._rollouts_done)
        self._rollouts_done = batch.rollouts_done
        return min(used / max(len(after) * self.config.rollout.slots * seconds, 1e-9), 1.0)

    def _totals(self, counter: str) -> dict[str, float]:
        """A counter of the actors that have it, as they reported it last."""
        return {name: stats[counter] for name, stats in self.previous_stats.items() if counter in stats}

    def _busy(self, stats: dict[ray.ObjectRef, str]) -> list[float]:
        """Busy seconds of each of a role's actors since the last batch."""
        busy = []
        for name, reported in zip(stats.values(), self._reported(stats), strict=True):
            before = self.previous_stats.get(name, {"busy_seconds": 0.0, "tokens": 0.0})
            if reported["busy_seconds"] < before["busy_seconds"]:  # a restarted actor counts from zero
                before = dict.fromkeys(before, 0.0)
            busy.append(reported["busy_seconds"] - before["busy_seconds"])
            rate = (reported["tokens"] - before["tokens"]) / max(busy[-1], 1e-9)
            self.calls.observers.heard(name, rate=rate, pid=reported["pid"])
            self.previous_stats[name] = reported
        return busy

    def _reported(self, stats: dict[ray.ObjectRef, str]) -> list[dict[str, Any]]:
        reported = self.calls.wait(
            stats, "reporting statistics", shown=False, again=lambda name: self.pools.actor(name).stats.remote()
        )
        for name, stats_of_one in zip(stats.values(), reported, strict=True):
            for warning in stats_of_one.get("warnings", []):
                self.calls.observers.note(f"{name}: {warning}", "warning")
        self._spans += [span for stats_of_one in reported for span in stats_of_one["spans"]]
        return reported

    def _overhead(self, in_flight: list[RolloutBatch], window: Window) -> float:
        """Share of the window in which no actor computes.

        Where rollouts of a later batch are under way, their actors count as computing since it was admitted: they
        report at its end, and before it have nothing to wait for.
        """
        later = in_flight[1:]
        for batch in later:
            self._asked |= batch.actor_stats if batch.rollouts_done else {}
        answered = list(self._asked)
        if self.config.pipeline.staleness:  # some are queued behind rollouts
            answered, _ = ray.wait(answered, num_returns=len(answered), timeout=0)
        self._reported({ref: self._asked.pop(ref) for ref in answered})
        under_way = [(batch.started, window.end) for batch in later if not batch.rollouts_done]
        share = window.overhead([*self._spans, *under_way])
        self._spans = [span for span in self._spans if span[1] > window.end]
        return share

    def _stats(self, actors: list[Any]) -> dict[ray.ObjectRef, str]:
        names = self.pools.names()
        return {actor.stats.remote(): names[actor] for actor in actors}


def _grown(before: float, now: float) -> float:
    """What a counter has grown by; one of a restarted actor counts from zero."""
    return now if now < before else now - before
