"""The pipeline: the one control loop, and the only place that knows all parts.

Rollout batch k may start once the learner has published version k - S (S: the staleness bound), so at most S + 1
batches are in flight and no trajectory is ever too old: the bound holds by admission, nothing is thrown away. Calls to
an actor run in the order of submission, so weights queued behind a rollout are swapped in right after it, fetched while
it ran, and the next rollout, queued behind these, starts while the control loop still writes down the last batch.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import ray
import yaml

from common.config.run import RunConfig
from common.prompts import Prompt, PromptSet
from common.responses import offline_share, with_responses
from deploy import preflight
from deploy.batch_metrics import BatchMetrics
from deploy.checkpoints import Checkpoints, RunState, truncate_metrics
from deploy.cluster import Pools, connect, start_pools
from deploy.curriculum import block_size_at, response_limit, unmasking_at
from deploy.dashboard.process import DashboardProcess
from deploy.errors import WorkerError
from deploy.evaluator import Evaluator
from deploy.monitoring.health import Health
from deploy.monitoring.metrics import RunLog
from deploy.monitoring.occupancy import Window
from deploy.monitoring.progress import Progress
from deploy.monitoring.ray_metrics import RayMetrics
from deploy.monitoring.rollout_log import RolloutLog
from deploy.monitoring.status import RunStatus
from deploy.monitoring.wandb_log import WandbLog
from deploy.placement import object_store_mib, on_cluster, plan
from deploy.remote_calls import wait_all
from deploy.rollout_batch import RolloutBatch, advance, drive
from deploy.stop_signals import StopSignals
from deploy.versions import installed_versions
from learner.schedule import count_updates


def run(config: RunConfig, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Train, evaluate, and leave everything in the run's folder; returns the content of `summary.json`.

    An earlier run in that folder is an error, or with `overwrite` replaced, or with `resume` gone on with from its
    newest checkpoint (from the start where it has none); a finished one is left as it is.

    Raises:
        ConfigError: the run cannot start as configured.
        WorkerError, StuckError: an actor failed, died, or did not answer in time; the message names it.
        Stopped: SIGTERM or SIGINT came; a checkpoint was written.
    """
    summary = config.run_dir / "summary.json"
    if resume and summary.exists():  # so that a job that is tried again ends well
        return dict(json.loads(summary.read_text()))
    prompts, problems = preflight.check(config, overwrite, resume)
    if overwrite:
        preflight.clear_run_dir(config)
    write_resolved_config(config)
    if on_cluster(config):
        connect(config)
    else:
        connect(config, object_store_mib(config, plan(config)))
    try:
        return Pipeline(config, prompts, problems).run(resume)
    finally:
        ray.shutdown()


def write_resolved_config(config: RunConfig) -> None:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (config.run_dir / "config.yaml").write_text(resolved)


class Pipeline:
    """State of one run: `version` is the learner's, and equals the number of rollout batches trained on."""

    def __init__(self, config: RunConfig, prompts: PromptSet, problems: list[Prompt]) -> None:
        self.config = config
        self.problems = problems
        self.responses = prompts.responses
        self.dropped = prompts.dropped
        self.prompts = len(prompts.prompts)
        size = config.rollout.prompts_per_batch
        self.epoch_prompts = len(prompts.prompts) // config.data.epochs
        self.batches = [prompts.prompts[i : i + size] for i in range(0, len(prompts.prompts), size)]
        self.batches = self.batches[: config.pipeline.max_batches]
        self.run_updates = count_updates(config, len(prompts.prompts))
        self.version = 0
        self.state = RunState()
        self.checkpoints = Checkpoints(
            config.run_dir, config.pipeline.keep_checkpoints, config.pipeline.copy_checkpoints_to
        )
        self.pools = Pools([], [], [])
        self.acknowledgements: dict[ray.ObjectRef, str] = {}
        self.queued_version = 0
        self.in_flight: deque[RolloutBatch] = deque()
        self.admitted = 0
        self.health = Health()

    def run(self, resume: bool) -> dict[str, Any]:
        config = self.config
        checkpoint = self.checkpoints.latest() if resume else None
        if checkpoint:
            self.state = checkpoint[1]
        truncate_metrics(config.run_dir, self.state.batches)
        self.rollout_log = RolloutLog(config.run_dir, self.state.batches)
        with (
            DashboardProcess(config.run_dir, config.dashboard) as page,
            RunStatus(config.run_dir, config.name, len(self.batches), self.state.batches) as self.status,
            StopSignals() as self.stop,
            RunLog(config.run_dir, self.state.batches) as log,
            RayMetrics(config.name, len(self.batches), self.prompts, self.dropped) as ray_metrics,
            WandbLog(config) as wandb_log,
            Progress(len(self.batches), config.name) as self.progress,
        ):
            if page.url:
                self.progress.note(f"the run's page is at {page.url}")
            for reason, count in self.dropped.items():
                self._note(f"{count} prompts dropped: {reason}", "starting", "warning")
            self._note("loading models", "starting")
            self.pools = start_pools(config)
            self.status.actors(self.pools.ready)
            self.evaluator = Evaluator(config, self.problems, self.pools)
            self.batch_metrics = BatchMetrics(config, self.pools, self.status, self.epoch_prompts)
            if checkpoint:
                self._restore(checkpoint[0])
            elif self.problems:
                self._note("evaluating the teacher and the untrained student", "evaluating")
                self.state.summary = self.evaluator.before()
            self._note("training", "training")
            self.progress.training()
            self._train([log, ray_metrics, wandb_log])
            self.state.summary["train"] = {
                "response_tokens": self.state.response_tokens,
                "updates": self.state.updates,
                "seconds": self.state.seconds,
            }
            self.state.summary["versions"] = installed_versions()
            self._save("final")
            if self.problems:
                self._note("evaluating the trained student", "evaluating")
                self.state.summary |= self.evaluator.after(self.state.block_size or self.config.block_size)
        (config.run_dir / "summary.json").write_text(json.dumps(self.state.summary, indent=2) + "\n")
        return self.state.summary

    def _note(self, text: str, state: str, level: str = "info") -> None:
        """What happens now, for the terminal and for the run's page."""
        self.progress.note(text)
        self.status.state(state, text)
        self.status.event(text, level)

    def _restore(self, folder: Path) -> None:
        """Weights and optimiser of the learner, then its version into every rollout actor."""
        self._note(
            f"going on from {folder.name}: {self.state.batches} of {len(self.batches)} batches are done", "starting"
        )
        self._on_ranks("load", "loading a checkpoint", folder / "resume")
        for actor in self.pools.rollouts:
            actor.set_block_size.remote(self.state.block_size)
        self.admitted = self.state.batches
        self._publish(self.state.batches)
        self._collect_acknowledgements()

    def _train(self, logs: list[RunLog | RayMetrics | WandbLog]) -> None:
        begin = time.time()
        for index in range(self.state.batches, len(self.batches)):
            self.status.state("training")
            self._admit()
            current = self.in_flight[0]
            timeout = self.config.pipeline.stage_timeout_s
            drive(list(self.in_flight), current, timeout, self._show, lambda: self.stop.requested)
            if self.stop.requested:
                self._stop()
            complete = time.time()
            self._check(current)
            learner = self._learn(current)
            # the next batch is admitted once weights are queued, and its size may depend on these
            self.state.feedback.after_batch(self.config, learner["kl"], learner["entropy"])
            published = self._publish(index + 1)
            window = Window(begin, time.time())
            metrics = self.batch_metrics.row(list(self.in_flight), learner, published, window, complete, self.state)
            self.in_flight.popleft()
            self.state.batches = index + 1
            self.state.block_size = current.block_size
            evaluated = self._evaluate(index + 1)
            # what follows is part of the next batch's time, evaluations and checkpoints are of none
            begin = time.time() if evaluated else window.end
            for log in logs:
                log.batch(metrics | evaluated)
            self._keep_samples(index)
            self.progress.batch(metrics | evaluated)
            self.status.batches_done(index + 1)
            for warning in self.health.warnings(metrics):
                self.status.event(warning, "warning")
            begin = time.time() if self._after_batch(index + 1) else begin
        self._collect_acknowledgements()  # of the last version, before it is evaluated

    def _admit(self) -> None:
        """Start every rollout batch that the staleness bound allows."""
        while self.admitted < len(self.batches) and self.admitted - self.version <= self.config.pipeline.staleness:
            self.in_flight.append(self._start(self.admitted))
            self.admitted += 1

    def _start(self, index: int) -> RolloutBatch:
        config = self.config
        block_size = block_size_at(config, index, self.state.feedback)
        limit = response_limit(config.curriculum, index, block_size, self.state.feedback.gates)
        share = offline_share(config.objective.source, index)
        samples = config.rollout.samples_per_prompt
        prompts = with_responses(self.batches[index], share, self.responses, samples, config.seed)
        unmasking = unmasking_at(config.rollout, index)
        return RolloutBatch(index, prompts, config.rollout, limit, block_size, unmasking, self.pools, self.status.heard)

    def _show(self, batch: RolloutBatch) -> None:
        self.progress.stage("rollout", batch.streamed_rows, len(batch.expected))
        self.progress.stage("teacher", batch.finished_rows, len(batch.expected))
        self.status.working(set(batch.waited_for()))

    def _check(self, batch: RolloutBatch) -> None:
        """Every (ordinal, sample) exactly once, and none older than the staleness bound."""
        keys = [key for info in batch.infos for key in info.keys]
        if len(keys) != len(set(keys)) or set(keys) != batch.expected:
            missing = sorted(batch.expected - set(keys))[:5]
            raise RuntimeError(f"rollout batch {batch.index}: {len(keys)} trajectories, missing {missing}")
        oldest = batch.oldest_version
        if oldest is not None and self.version - oldest > self.config.pipeline.staleness:
            raise RuntimeError(
                f"rollout batch {batch.index} was made with weights {oldest} and the learner is at {self.version}"
            )

    def _learn(self, batch: RolloutBatch) -> dict[str, float]:
        spool = self.config.run_dir / "spool" / f"batch-{batch.index:06d}.arrow" if self.config.pipeline.spool else None
        results = self._on_ranks("train", "training", batch.refs, self.state.updates, self.run_updates, spool)
        self.state.updates += int(results[0]["updates"])
        return results[0]

    def _keep_samples(self, index: int) -> None:
        """A few rollouts of the batch for the trajectory viewer, at times."""
        if self.config.dashboard.rollouts and self.rollout_log.due:
            rank = self.pools.ranks[0]
            timeout = self.config.pipeline.stage_timeout_s
            samples = wait_all({rank.rollout_samples.remote(): "learner-0"}, "giving samples", timeout)
            self.rollout_log.add(index, samples[0])

    def _publish(self, version: int) -> dict[str, float]:
        """Publish `version`, queue it on every rollout actor, and behind it the next batch, where nothing else comes
        first; at staleness 0 all have loaded it on return."""
        start = time.perf_counter()
        self._collect_acknowledgements()  # of the version before, queued behind rollouts that are trained on by now
        self.version = version
        handle = self._on_ranks("publish", "publishing weights", self.version)[0]
        for actor, name in self._named(self.pools.rollouts):
            self.acknowledgements[actor.fetch_weights.remote(handle)] = name
            self.acknowledgements[actor.swap_weights.remote(version)] = name
        self.queued_version = version
        self.batch_metrics.ask(self.pools.rollouts)
        if not self._evaluation_due(version) and not self.stop.requested:
            self._admit()
        if self.config.pipeline.staleness == 0:
            self._collect_acknowledgements()
        return {"seconds": time.perf_counter() - start, "bytes": handle.nbytes}

    def _collect_acknowledgements(self) -> None:
        """Every rollout actor confirms that it has fetched, and runs, the version that was last queued on it."""
        timeout = self.config.pipeline.stage_timeout_s
        versions = wait_all(self.acknowledgements, "loading weights", timeout)
        for name, version in zip(self.acknowledgements.values(), versions, strict=True):
            if version != self.queued_version:
                raise WorkerError(f"{name} runs weights version {version}, expected {self.queued_version}")
            self.status.heard(name, weights_version=version)
        self.acknowledgements = {}

    def _on_ranks(self, method: str, action: str, *arguments: Any) -> list[Any]:
        """Call all ranks together; batches in flight go on meanwhile."""

        calls = {getattr(actor, method).remote(*arguments): name for actor, name in self._named(self.pools.ranks)}
        others = {name for batch in self.in_flight for name in batch.waited_for()}
        self.status.working({*calls.values(), *others}, learner=action)
        results = wait_all(calls, action, self.config.pipeline.stage_timeout_s, self._advance, self._arriving)
        for name in calls.values():
            self.status.heard(name, weights_version=self.version)
        return results

    def _advance(self) -> None:
        advance(self.in_flight)

    def _arriving(self) -> list[Any]:
        return [item for batch in self.in_flight for item in batch.waiting]

    def _named(self, actors: list[Any]) -> list[tuple[Any, str]]:
        names = self.pools.names()
        return [(actor, names[actor]) for actor in actors]

    def _evaluation_due(self, done: int) -> bool:
        return self.evaluator.due(done, last=done == len(self.batches))

    def _evaluate(self, done: int) -> dict[str, float]:
        """The held-out metrics where it is time for them."""
        if self.stop.requested or not self._evaluation_due(done):
            return {}
        self.status.state("evaluating", f"evaluating after {done} batches")
        metrics = self.evaluator.metrics(self.state.block_size, self._advance)
        self.progress.note(
            f"after {done} batches: exact match {metrics['eval/exact_match']:.1%}, "
            f"{metrics['eval/tokens_per_step']:.2f} tokens per step"
        )
        return metrics

    def _after_batch(self, done: int) -> bool:
        """Checkpoint where it is time, and tell whether; end here if a stop was asked for."""
        if self.stop.requested:
            self._stop()
        every = self.config.pipeline.checkpoint_every_batches
        last = done == len(self.batches)
        due = bool(every and done % every == 0 and not last)
        if due:
            self._save(self._batch_name())
        return due

    def _stop(self) -> NoReturn:
        """The learner stands between two batches: save, and end with the signal's status."""
        done = self.state.batches
        self.in_flight.clear()  # their rollouts are made again
        self._note(f"asked to stop: saving a checkpoint after {done} batches", "saving")
        if not (self.checkpoints.folder / self._batch_name()).exists():
            self._save(self._batch_name())
        raise self.stop.error(f"stopped after {done} of {len(self.batches)} batches; go on with --resume auto")

    def _batch_name(self) -> str:
        return f"batch-{self.state.batches:06d}"

    def _save(self, name: str) -> None:
        """A checkpoint; the final one holds the model only."""
        self.status.state("saving", f"saving checkpoint {name}")
        partial = self.checkpoints.begin(name)
        block_size = self.state.block_size or self.config.block_size
        self._on_ranks(
            "save", "saving a checkpoint", partial, None if name == "final" else partial / "resume", block_size
        )
        self.checkpoints.finish(name, self.state)
