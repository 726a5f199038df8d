"""The pipeline: the one control loop, and the only place that knows all parts.

Rollout batch k may start once the learner has published version k - S (S: the staleness bound), so at most S + 1
batches are in flight and no trajectory is ever too old: the bound holds by admission, nothing is thrown away. Calls to
an actor run in the order of submission, so weights queued behind a rollout are swapped in right after it, fetched while
it ran, and the next rollout, queued behind these, starts while the control loop still writes down the last batch.

What was left out: an event loop with a task per stage. One loop that waits for whatever is ready is enough, since no
bulk data passes through here, and it can be read from top to bottom.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import ray

from common.config.fingerprint import evaluation_fingerprint
from common.config.run import RunConfig
from common.config.yaml_loader import written
from common.weights.transport import WeightsHandle
from deploy.batch_metrics import BatchMetrics
from deploy.batch_prompts import prompts_of_batch
from deploy.checkpoints import FINAL, RunState
from deploy.cluster import Pools, connect, create_pools, form_weights_group, load_models
from deploy.curriculum import block_size_at, response_limit, unmasking_at
from deploy.dashboard.process import DashboardProcess
from deploy.dealing import ResponseLengths
from deploy.errors import RunError, WorkerError
from deploy.evaluator import Evaluator
from deploy.files import replace_text
from deploy.learner_group import LearnerGroup
from deploy.monitoring.observer import Observers
from deploy.monitoring.occupancy import Window
from deploy.monitoring.progress import Progress
from deploy.monitoring.ray_metrics import RayMetrics
from deploy.monitoring.rollout_log import RolloutLog
from deploy.monitoring.run_log import RunLog
from deploy.monitoring.status import RunStatus
from deploy.monitoring.wandb_log import WandbLog
from deploy.preflight import PreparedRun, finished_summary, identity, prepare
from deploy.recovery import Supervisor
from deploy.remote_calls import RemoteCalls
from deploy.rollout_batch import RolloutBatch, RolloutsInFlight
from deploy.run_cost import RunCost
from deploy.run_folder import anchor_folder, anchor_of, clear_run_dir
from deploy.run_lock import RunLock
from deploy.saving import Saving
from deploy.stop_signals import StopRequested, StopSignals
from deploy.versions import installed_versions
from learner.schedule import count_updates

_DATA_LOST = ("ObjectLost", "ObjectReconstructionFailed", "ObjectFetchTimedOut", "OwnerDied")  # Ray's errors
_RETRY_SECONDS = 5.0  # for a final model that cannot be written
_LAST_SAVING_SECONDS = 60.0  # for a checkpoint that is being written when a run fails


def run(
    config: RunConfig, overwrite: bool = False, resume: bool = False, accept_changed_data: bool = False
) -> dict[str, Any]:
    """Train, evaluate, and leave everything in the run's folder; returns the content of `summary.json`.

    An earlier run in that folder is an error, or with `overwrite` replaced, or with `resume` gone on with from its
    newest checkpoint (from the start where it has none). Of a training that is finished only the evaluation is made,
    where it is missing or was another one; a run that is finished is left as it is. Prompts, responses or models whose
    content has changed since the checkpoint are refused, or with `accept_changed_data` gone on with.

    Raises:
        ConfigError: the run cannot start as configured.
        WorkerError, StuckError: an actor failed, died, or did not answer in time; the message names it.
        Stopped: SIGTERM or SIGINT came; what was trained is in a checkpoint.
    """
    if resume and (summary := finished_summary(config)):  # so that a job that is tried again ends well
        return summary
    prepared = prepare(config, overwrite, resume, accept_changed_data)
    if overwrite:
        clear_run_dir(config)
    with RunLock(config.run_dir) as lock:
        write_resolved_config(config)
        connect(config.ray, prepared.object_store_mib, config.cache_dir)
        try:
            return Pipeline(prepared, lock).run()
        finally:
            ray.shutdown()


def write_resolved_config(config: RunConfig) -> None:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    resolved = written(config.model_dump(mode="json"))
    replace_text(config.run_dir / "config.yaml", resolved)


class Pipeline:
    """The state of one run between two steps of its loop.

    Life cycle: constructed in a process that is connected to Ray; `run` once, which starts the actors, trains batch
    after batch and finishes. After `n` batches the learner's weights version is `n`, which is why a resumed run needs
    its counters (`RunState`) and nothing else:

        with RunLock(config.run_dir) as lock:
            summary = Pipeline(prepare(config), lock).run()
    """

    def __init__(self, prepared: PreparedRun, lock: RunLock) -> None:
        config = prepared.config
        self.config = config
        self.lock = lock
        self.prepared = prepared
        self.state = prepared.checkpoint[1] if prepared.checkpoint else RunState()
        self.checkpoints = prepared.checkpoints
        self.in_flight = RolloutsInFlight()
        self.response_lengths = ResponseLengths()
        self.pools = Pools([], [], [])
        self.acknowledgements: dict[ray.ObjectRef, str] = {}  # of the newest version, by the calls that load it
        self.learner: LearnerGroup
        self.published = 0  # the version published last
        self.dissolved = False  # the weights group, since a member was lost: the next version needs a new one
        self.newest: WeightsHandle | ray.ObjectRef | None = None  # its handle, or None: it is gone
        self.late: list[str] = []  # rollout actors that wait for it
        self.block_size = self.state.block_size or config.block_size  # of the rollout batch that was started last
        prompts, size = prepared.prompts.prompts, config.rollout.prompts_per_batch
        self.batches = [prompts[i : i + size] for i in range(0, len(prompts), size)][: config.pipeline.max_batches]
        self.run_updates = count_updates(config, len(prompts))
        self.cost = RunCost.of(config, prepared.placement)

    @property
    def version(self) -> int:
        """The weights version that the learner published last: the number of rollout batches trained on."""
        return self.state.batches

    def run(self) -> dict[str, Any]:
        config = self.config
        with ExitStack() as stack:
            page = stack.enter_context(DashboardProcess(config.run_dir, config.dashboard))
            self.stop = stack.enter_context(StopSignals())
            self.observers = stack.enter_context(self._observers())
            self.saving = Saving(config.pipeline, self.checkpoints, self.observers, self.state.batches)
            stack.callback(self.saving.wait, _LAST_SAVING_SECONDS)
            self.supervisor = Supervisor(config, self.state, self.observers, self.stop)
            self.supervisor.prepare = self._catch_up
            self.calls = RemoteCalls(config.pipeline.stage_timeout_s, self.observers, self.stop, self.supervisor)
            if page.url:
                self.observers.note(f"the run's page is at {page.url}")
            try:
                if not self.prepared.trained:
                    self._start()
                    self._train()
                return self._finish()
            except StopRequested:
                self._stop()
            except RunError as error:
                if not self.pools.ranks or self.learner.busy:  # its state is not known
                    raise
                self.stop.fail(error)
                self._stop()

    def _observers(self) -> Observers:
        config, done = self.config, self.state.batches
        prompts = self.prepared.prompts
        return Observers(
            [
                RunStatus(config.run_dir, config.name, len(self.batches), done),
                RunLog(config.run_dir, done),
                RayMetrics(config.name, len(self.batches), prompts.read, prompts.dropped, config.recovery.restarts),
                WandbLog(config, done),
                Progress(len(self.batches), config.name, done),
            ],
            batches=len(self.batches),
            done=done,
        )

    def _start(self) -> None:
        """All actors with their models, and the state of the checkpoint or the evaluation of the untrained student."""
        config = self.config
        for warning in self.prepared.warnings:
            self.observers.note(warning, "warning")
        for reason, count in self.prepared.prompts.dropped.items():
            self.observers.note(f"{count} prompts dropped: {reason}", "warning")
        for note in self.prepared.prompts.notes:
            self.observers.note(note)
        self.observers.note("loading models", state="starting")
        self.pools = create_pools(config, self.prepared.placement, self.calls)
        self.learner = LearnerGroup(
            config,
            self.pools,
            self.calls,
            self.run_updates,
            self.supervisor.learner_failed,
            self.prepared.learner_copy,
        )
        self.supervisor.restart_learner = self._restart_learner
        self.learner.start()
        load_models(config, self.pools, self.calls)
        if config.weights_transport == "broadcast":
            form_weights_group(self.pools, self.calls, config.pipeline.start_timeout_s)
        self._start_evaluator()
        epoch_prompts = len(self.prepared.prompts.prompts) // config.data.epochs
        self.batch_metrics = BatchMetrics(config, self.pools, self.calls, epoch_prompts, self.cost)
        if config.dashboard.rollouts:
            self.observers.add(RolloutLog(config.run_dir, self.state.batches, self._rollout_samples))
        if self.prepared.checkpoint:
            self._restore(self.prepared.checkpoint[0])
        elif self.prepared.evaluates:
            self._evaluate_untrained()

    def _restore(self, folder: Path) -> None:
        """Weights and optimizer of the learner, then its version into every rollout actor."""
        self.observers.note(
            f"going on from {folder.name}: {self.state.batches} of {len(self.batches)} batches are done",
            state="starting",
        )
        self.learner.load(folder / "resume", self.state.batches)
        if anchor := anchor_of(self.config, self.block_size):
            self._teach_by(anchor)
        for actor in self.pools.rollouts:
            actor.set_block_size.remote(self.state.block_size)
        self._publish()
        self._collect_acknowledgements()

    def _train(self) -> None:
        self.observers.note("training", state="training")
        self.observers.training()
        begin = time.time()
        while self.state.batches < len(self.batches):
            self._admit()
            current = self.in_flight.finish_oldest(self.calls)
            complete = time.time()
            self._check(current)
            learner = self._learn(current)
            published = self._publish()
            window = Window(begin, time.time())
            under_way = [current, *self.in_flight]
            metrics = self.batch_metrics.row(under_way, learner, published, window, complete, self.state)
            evaluated = self._evaluate()
            # what follows is part of the next batch's time, evaluations and checkpoints are of none
            begin = time.time() if evaluated else window.end
            self.observers.batch(metrics | evaluated)
            self._check_finite(learner)
            self.stop.check()
            self.lock.check()
            if self.state.batches < len(self.batches) and self.saving.due(self.state.batches):
                self._save(self._batch_name())
                begin = time.time()
        self._collect_acknowledgements()  # of the last version, before it is evaluated

    def _finish(self) -> dict[str, Any]:
        """The final model, then its evaluation; the summary is written last and says that the run is finished."""
        summary = self.state.summary
        if self.prepared.trained:
            self._start_evaluation()
        else:
            summary["train"] = {
                "response_tokens": self.state.response_tokens,
                "updates": self.state.updates,
                "seconds": self.state.seconds,
                **self.cost.metrics(self.state),
            }
            self._save_final()
        if self.prepared.evaluates:
            self.observers.note("evaluating the trained student", state="evaluating")
            summary |= self.evaluator.after(self.state.block_size or self.config.block_size)
        self.checkpoints.copy_missing(self.observers)
        summary |= {"versions": installed_versions(), **identity(self.config)}
        replace_text(self.config.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _evaluate_untrained(self) -> None:
        self.observers.note("evaluating the teacher and the untrained student", state="evaluating")
        self.state.summary |= self.evaluator.before()
        self.state.summary["evaluation_fingerprint"] = evaluation_fingerprint(self.config)

    def _start_evaluation(self) -> None:
        """The training is finished, its evaluation is missing or was another one: the rollout actors alone, with the
        final model; before that with the untrained one, where that was not evaluated in the same way."""
        self.observers.note("the training is finished, what is missing is its evaluation", state="starting")
        if self.prepared.evaluates and self.state.summary.get("evaluation_fingerprint") != evaluation_fingerprint(
            self.config
        ):
            self._load_rollouts(self.config)
            self._evaluate_untrained()
            self.pools.stop()
        final = self.config.model.model_copy(update={"path": str(self.checkpoints.final)})
        self._load_rollouts(self.config.model_copy(update={"model": final}))

    def _load_rollouts(self, config: RunConfig) -> None:
        self.pools = create_pools(config, self.prepared.placement, self.calls, roles=("rollout",))
        load_models(config, self.pools, self.calls)
        self._start_evaluator()

    def _start_evaluator(self) -> None:
        prepared = self.prepared
        self.evaluator = Evaluator(self.config, prepared.problems, self.pools, self.calls, prepared.held_out)
        self.evaluator.hold_out()

    def _admit(self) -> None:
        """Start every rollout batch that the staleness bound allows."""
        while len(self.in_flight) <= self.config.pipeline.staleness:
            index = self.state.batches + len(self.in_flight)
            if index == len(self.batches):
                return
            block_size = block_size_at(self.config, index, self.state.feedback)
            if self.config.block_growth.anchor and block_size != self.block_size:
                if self.in_flight:  # another teacher's
                    return
                self._anchor()
            self.block_size = block_size
            self.in_flight.append(self._start_batch(index, block_size))

    def _anchor(self) -> None:
        """The student as it is, with the block size that it has, is written down and teaches from now on."""
        folder = anchor_folder(self.config, self.block_size)
        self.observers.note(f"the student of block size {self.block_size} teaches from now on: {folder}")
        partial = folder.with_name(f"{folder.name}.partial")
        for left in (partial, folder):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        self._on_ranks("write_student", "saving the anchor", partial, self.block_size)
        partial.rename(folder)
        self._teach_by(folder)

    def _teach_by(self, anchor: Path) -> None:
        """Other teachers in the place of those that there are."""
        self.pools.anchor = anchor
        for name in [name for actor, name in self._named(self.pools.teachers)]:
            self.pools.replace(name)
        load_models(self.config, self.pools, self.calls)
        self.learner.teach_by(anchor)

    def _start_batch(self, index: int, block_size: int) -> RolloutBatch:
        config = self.config
        limit = response_limit(config.curriculum, index, block_size, self.state.feedback.gates)
        prompts = prompts_of_batch(config, self.prepared.prompts, self.batches[index], index, limit, block_size)
        unmasking = unmasking_at(config.rollout, index)
        return RolloutBatch(
            index, prompts, config, limit, block_size, unmasking, self.pools, self.calls, self.response_lengths
        )

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

    def _learn(self, batch: RolloutBatch) -> dict[str, Any]:
        """All updates on the oldest batch, which is then no longer in flight; returns what the learner measured."""
        spool = self.config.run_dir / "spool" / f"batch-{batch.index:06d}.arrow" if self.config.pipeline.spool else None
        left = self.config.learner.nonfinite_updates - self.state.nonfinite_updates
        learner = self.learner.train(batch.refs, self.state.updates, spool, self.in_flight, keep=max(left, 0) + 1)
        for warning in (*learner["left_out"], *learner["warnings"]):
            self.observers.note(warning, "warning")
        self.state.updates += int(learner["updates"])
        self.state.nonfinite_updates += len(learner["left_out"])
        self.state.block_size = batch.block_size
        self.state.feedback.after_batch(self.config, learner["kl"], learner["entropy"])
        self.state.set_aside += len(batch.set_aside)
        self.in_flight.popleft()
        self.state.batches += 1
        return learner

    def _check_finite(self, learner: dict[str, Any]) -> None:
        """Raises:
        RunError: more updates were left out than learner.nonfinite_updates allows; a checkpoint is made first.
        """
        allowed, left_out = self.config.learner.nonfinite_updates, self.state.nonfinite_updates
        if learner["left_out"] and left_out > allowed:
            self._save(self._batch_name())
            self.saving.wait()
            raise RunError(
                f"{learner['left_out'][0]}; {left_out} updates were left out, learner.nonfinite_updates allows "
                f"{allowed}. Lower learner.lr or correct the data, or allow more, and go on with --resume auto"
            )

    def _publish(self) -> dict[str, float]:
        """Publish the newest version, queue it on every rollout actor, and behind it the next batch, where nothing else
        comes first; at staleness 0 all have loaded it on return."""
        start = time.perf_counter()
        self._collect_acknowledgements()  # of the version before, queued behind rollouts that are trained on by now
        if self.dissolved:
            form_weights_group(self.pools, self.calls, self.config.weights_timeout_s)
            self.dissolved = False
        handle = self._on_ranks("publish", "publishing weights", self.version)[0]
        self.newest, self.published = handle, self.version
        if self.dissolved:  # meanwhile
            self.newest = self.pools.ranks[0].share_weights.remote()
        for actor, name in self._named(self.pools.rollouts):
            self.acknowledgements |= self._load_newest(actor, name)
        self.batch_metrics.ask(self.pools.rollouts)
        if not self._evaluation_due() and not self.stop.requested:
            self._admit()
        if self.config.pipeline.staleness == 0:
            self._collect_acknowledgements()
        return {"seconds": time.perf_counter() - start, "bytes": handle.nbytes}

    def _collect_acknowledgements(self) -> None:
        """Every rollout actor confirms that it has fetched, and runs, the version that was last queued on it."""
        names = list(self.acknowledgements.values())
        versions = self.calls.wait(
            self.acknowledgements,
            "loading weights",
            background=self.in_flight,
            again=lambda name: self.pools.actor(name).weights_version.remote(),  # a new actor has loaded them
        )
        for name, version in zip(names, versions, strict=True):
            if version != max(versions):
                raise RuntimeError(f"{name} runs weights version {version}, expected {max(versions)}")
            self.observers.heard(name, weights_version=version)
        self.acknowledgements = {}

    def _load_newest(self, actor: Any, name: str) -> dict[ray.ObjectRef, str]:
        return {
            actor.fetch_weights.remote(self.newest): name,
            actor.swap_weights.remote(self.published): name,
        }

    def _catch_up(self, name: str) -> None:
        """Queue the version published last on a rollout actor that is new. While the learner is restarted it cannot be
        fetched, but may already be waited for."""
        actor = self.pools.actor(name)
        if self.config.weights_transport == "broadcast" and not self.dissolved and self.pools.ranks:
            self.dissolved = True
            self.pools.ranks[0].dissolve_weights_group.remote()
            self.newest = self.pools.ranks[0].share_weights.remote() if self.newest else None
        if self.newest:
            self._load_newest(actor, name)
        elif self.published:
            actor.swap_weights.remote(self.published)
            self.late.append(name)

    def _restart_learner(self, error: WorkerError) -> None:
        """The ranks anew, and once more what they had published: it is gone with them."""
        self.newest, self.late = None, []
        self.learner.restart(error)
        if any(words in str(error) for words in _DATA_LOST) and self.in_flight.ask_lost():
            self.in_flight.finish_oldest(self.calls)
        if self.config.weights_transport == "broadcast":
            form_weights_group(self.pools, self.calls, self.config.weights_timeout_s)
            self.dissolved = False
        if self.published and self.published == self.learner.version:
            self.newest = self.learner.call("publish", "publishing weights", self.published)[0]
            late = set(self.late)
            if self.config.weights_transport == "broadcast":  # all must receive what is sent
                for actor, name in self._named(self.pools.rollouts):
                    actor.fetch_weights.remote(self.newest)
                    if name not in late:
                        actor.swap_weights.remote(self.published)
            else:
                for name in late:
                    self.pools.actor(name).fetch_weights.remote(self.newest)

    def _on_ranks(self, method: str, action: str, *arguments: Any) -> list[Any]:
        """Call all ranks together; batches in flight go on meanwhile."""
        results = self.learner.call(method, action, *arguments, background=self.in_flight)
        for _, name in self._named(self.pools.ranks):
            self.observers.heard(name, weights_version=self.version)
        return results

    def _named(self, actors: list[Any]) -> list[tuple[Any, str]]:
        names = self.pools.names()
        return [(actor, names[actor]) for actor in actors]

    def _rollout_samples(self) -> list[dict[str, Any]]:
        calls = {self.pools.ranks[0].rollout_samples.remote(): "learner-0"}
        samples: list[dict[str, Any]] = self.calls.wait(
            calls, "giving samples", shown=False, again=lambda name: self.pools.actor(name).rollout_samples.remote()
        )[0]
        return samples

    def _evaluation_due(self) -> bool:
        return self.evaluator.due(self.state.batches, last=self.state.batches == len(self.batches))

    def _evaluate(self) -> dict[str, float]:
        """The metrics of the evaluation where it is time for it and nobody asks the run to stop."""
        if not self._evaluation_due():
            return {}
        done = self.state.batches
        self.observers.note(f"evaluating after {done} batches", "detail", "evaluating")
        try:
            metrics = self.evaluator.metrics(self.state.block_size, self.in_flight)
        except StopRequested:  # the batch is trained on all the same, and its row must be logged
            return {}
        found = []
        if self.prepared.problems:
            found.append(f"exact match {metrics['eval/exact_match']:.1%}")
            found.append(f"{metrics['eval/tokens_per_step']:.2f} tokens per step")
        if self.prepared.held_out:
            found.append(f"held-out KL {metrics['eval/held_out_kl']:.4f}")
            self.state.feedback.after_evaluation(
                self.config,
                self.state.block_size,
                metrics["eval/held_out_kl"],
                metrics["eval/held_out_entropy"],
                metrics.get("eval/held_out_accepted"),
            )
        self.observers.note(f"after {done} batches: {', '.join(found)}", state="training")
        return metrics

    def _batch_name(self) -> str:
        return f"batch-{self.state.batches:06d}"

    def _save(self, name: str) -> None:
        """Begin a checkpoint; the final one holds the model only. Training stands still while the ranks copy, and goes
        on while they write."""
        partial = self.saving.begin(name, self.state.batches)
        if partial is None:
            return
        self.observers.note(f"saving checkpoint {name}", "detail", "saving")
        resume = None if name == FINAL else partial / "resume"
        block_size = self.state.block_size or self.config.block_size
        self._on_ranks("save", "saving a checkpoint", partial, resume, block_size)
        self.saving.finish(name, self.state, [rank.written.remote() for rank in self.pools.ranks])
        self.observers.note("training", "detail", "training")

    def _save_final(self) -> None:
        """The trained student is what the run was for: it is tried again until the deadline."""
        deadline = time.monotonic() + self.config.pipeline.stage_timeout_s
        self._save(FINAL)
        self.saving.wait()
        while not self.checkpoints.has(FINAL):
            if time.monotonic() > deadline:
                raise RunError(
                    f"the trained student could not be written to {str(self.checkpoints.folder)!r} within "
                    f"pipeline.stage_timeout_s ({self.config.pipeline.stage_timeout_s:g} s); free space there and go "
                    "on with --resume auto"
                )
            time.sleep(_RETRY_SECONDS)
            self.stop.check()
            self._save(FINAL)
            self.saving.wait()

    def _stop(self) -> NoReturn:
        """End with the signal's status or with the error; what was trained is in a checkpoint first."""
        done, of = self.state.batches, len(self.batches)
        if self.checkpoints.has(FINAL):
            raise self.stop.error("stopped after training; --resume auto evaluates the trained student") from None
        self.saving.wait()
        if self.pools.ranks and done and not self.checkpoints.has(self._batch_name()):
            self.in_flight.clear()  # their rollouts are made again
            self.observers.note(f"asked to stop: saving a checkpoint after {done} batches", state="saving")
            self._save(self._batch_name())
            self.saving.wait()
        raise self.stop.error(f"stopped after {done} of {of} batches; go on with --resume auto") from None
