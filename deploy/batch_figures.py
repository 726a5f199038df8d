"""The figures of a rollout batch: what actors, learner and control loop report, as one row of the run's metrics."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import ray

from common.config import DynamicUnmasking, RunConfig
from deploy.checkpoints import RunState
from deploy.cluster import Pools
from deploy.occupancy import Window
from deploy.rollout_batch import RolloutBatch
from deploy.status import RunStatus
from deploy.waiting import wait_all


class BatchFigures:
    """Rows with a value for every metric that is not optional; keeps the actors' counters from row to row."""

    def __init__(self, config: RunConfig, pools: Pools, status: RunStatus, epoch_prompts: int) -> None:
        self.config = config
        self.pools = pools
        self.status = status
        self.epoch_prompts = epoch_prompts
        self.previous_stats: dict[str, dict[str, float]] = {}

    def row(
        self,
        in_flight: list[RolloutBatch],
        learner: dict[str, float],
        published: dict[str, float],
        window: Window,
        waited: float,
        state: RunState,
    ) -> dict[str, float]:
        """The figures of the oldest batch in flight, counted into `state`; the learner `waited` so many seconds."""
        batch, seconds = in_flight[0], window.seconds
        infos = batch.infos
        tokens = sum(info.response_tokens for info in infos)
        generated = sum(info.rollout_tokens for info in infos)
        rows = max(batch.finished_rows, 1)
        state.response_tokens += tokens
        state.seconds += seconds
        paused = self._totals("weights_pause_seconds")
        rollout_busy = self._busy(batch.actor_stats)
        pauses = [total - paused.get(name, 0.0) for name, total in self._totals("weights_pause_seconds").items()]
        teacher_stats = {actor.stats.remote(): name for actor, name in self._names(self.pools.teachers)}
        teacher_busy = self._busy(teacher_stats) or [0.0]  # hard labels have no teacher
        rollout_seconds, teacher_seconds = max(rollout_busy), max(teacher_busy)
        for _, name in self._names(self.pools.ranks):
            self.status.heard(name, rate=learner["packed_tokens"] / learner["seconds"] / len(self.pools.ranks))
        rollouts = window.covered((b.started, b.rollouts_done or window.end) for b in in_flight)
        targets = window.covered((b.started, b.targets_done or window.end) for b in in_flight)
        return {
            "batch": batch.index,
            "epoch": (batch.index * self.config.rollout.prompts_per_batch + batch.prompts) / self.epoch_prompts,
            "loss": learner["loss"],
            "kl": learner["kl"],
            "teacher_agreement": learner["teacher_agreement"],
            "grad_norm": learner["grad_norm"],
            "lr": learner["lr"],
            "tokens_per_step": generated / max(sum(info.denoise_forwards for info in infos), 1),
            "stored_share": sum(info.stored_rows for info in infos) / rows,
            "share_eos": sum(info.ended for info in infos) / rows,
            "response_length": tokens / rows,
            "response_limit": batch.max_new_tokens,
            "block_size": batch.block_size,
            "confidence_threshold": batch.unmasking.threshold if isinstance(batch.unmasking, DynamicUnmasking) else 0.0,
            "response_tokens": state.response_tokens,
            "trained_positions": learner["trained_positions"],
            "updates": state.updates,
            "weights_version": batch.index + 1,
            "staleness": 0 if batch.oldest_version is None else batch.index - batch.oldest_version,
            "rollout/tokens_per_second": generated / max(rollout_seconds, 1e-9),
            "teacher/tokens_per_second": sum(info.teacher_tokens for info in infos) / teacher_seconds
            if teacher_seconds
            else 0.0,
            "learner/tokens_per_second": learner["packed_tokens"] / max(learner["seconds"], 1e-9),
            "queue/rollout": len(batch.expected),
            "queue/teacher": batch.peak_teacher_queue,
            "queue/learner": len(batch.refs),
            "seconds/rollout": rollout_seconds,
            "seconds/teacher": teacher_seconds,
            "seconds/learner": learner["seconds"],
            "seconds/publish": published["seconds"],
            "seconds/weights_pause": max(pauses),
            "seconds/batch": seconds,
            "bytes/trajectories": sum(info.nbytes for info in infos),
            "bytes/weights": published["bytes"],
            **window.shares("rollout", fmean(rollout_busy), rollouts),
            **window.shares("teacher", fmean(teacher_busy), targets),
            **window.shares("learner", learner["seconds"], learner["seconds"] + waited),
        }

    def _totals(self, counter: str) -> dict[str, float]:
        """A counter of the actors that have it, as they reported it last."""
        return {name: figures[counter] for name, figures in self.previous_stats.items() if counter in figures}

    def _busy(self, stats: dict[ray.ObjectRef, str]) -> list[float]:
        """Busy seconds of each of a role's actors since the last batch."""
        figures = wait_all(stats, "reporting statistics", self.config.pipeline.stage_timeout_s)
        busy = []
        for name, figure in zip(stats.values(), figures, strict=True):
            before = self.previous_stats.get(name, {"busy_seconds": 0.0, "tokens": 0.0})
            if figure["busy_seconds"] < before["busy_seconds"]:  # a restarted actor counts from zero
                before = dict.fromkeys(before, 0.0)
            busy.append(figure["busy_seconds"] - before["busy_seconds"])
            rate = (figure["tokens"] - before["tokens"]) / max(busy[-1], 1e-9)
            self.status.heard(name, rate=rate, pid=figure["pid"])
            self.previous_stats[name] = figure
        return busy

    def _names(self, actors: list[Any]) -> list[tuple[Any, str]]:
        names = self.pools.names()
        return [(actor, names[actor]) for actor in actors]
