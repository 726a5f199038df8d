"""One rank of the learner: a Ray actor that holds one DeepSpeed ZeRO-3 process."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from safetensors import SafetensorError
from transformers.integrations import HfDeepSpeedConfig

from common.busy import BusySpans, computes
from common.config.run import RunConfig
from common.conversion import load_converted, own_head, student_of, teacher_heads_of
from common.device import device_for
from common.lora import add_adapters
from common.ray_actor import as_ray_actor, own_address
from common.student import attention_windows, default_attention, parameter_count
from common.trajectory import Trajectory, TrajectoryMeta, write_spool
from common.weights.broadcast import BroadcastTransport, connect, open_store, stay_on
from common.weights.object_store import ObjectStoreTransport
from common.weights.transport import WeightsHandle, WeightsTransport
from learner.alignment import LayerAlignment, frozen_base
from learner.batches import BatchBuilder, of_heads, update_shares
from learner.checkpoint_writer import CheckpointWriter
from learner.deepspeed_config import deepspeed_config, keeps_whole
from learner.faults import MODEL, FaultFolder, write_fault
from learner.loss_parts import of_part, part_metrics
from learner.phase_clock import PHASES, PhaseClock
from learner.publish import gathered_buckets
from learner.records import RecordReader, recorded
from learner.rollout_samples import first_samples
from learner.schedule import RunUpdates, learning_rate
from learner.shard_keeper import ShardSender, receive
from learner.shards import read_shard
from learner.updater import PreparedUpdate, Updater
from learner.warm_up import warm_up


class LearnerRank:
    """One process of the learner; together the ranks are one DeepSpeed ZeRO-3 world.

    Invariant: between two calls all ranks have made the same updates, and each holds its shard of the weights and the
    optimizer's state. `start`, `train`, `publish`, `save` and `load` are collective: they are called on all ranks, in
    the same order and with the same arguments, and a rank that is not called keeps the others waiting. What `save` has
    copied is written by a thread while training goes on; `written` waits for it, beside all other calls.

    Life cycle: construct all ranks, ask rank 0 for its `address`, `start` all. With broadcast, rank 0 opens and joins
    the weights group. A resumed run calls `load` once. Then each rollout batch is one `train` and one `publish`, and
    `save` where a checkpoint is due:

        ranks = [as_remote(config).remote(config, i) for i in range(config.learner.ranks)]
        address = ray.get(ranks[0].address.remote())
        ray.get([r.start.remote(*address) for r in ranks])
        updates = count_updates(config, prompts)
        metrics = ray.get([r.train.remote(refs, 0, updates) for r in ranks])[0]
        handle = ray.get([r.publish.remote(1) for r in ranks])[0]
    """

    def __init__(self, config: RunConfig, rank: int) -> None:
        torch.set_num_threads(config.learner.resources.threads)
        warnings.filterwarnings("ignore", message=".*not writable")  # targets are views of Arrow buffers
        self.config = config
        self.rank = rank
        self.spans = BusySpans()
        self.samples: list[Callable[..., dict[str, Any]]] = []
        self.updater = Updater(config, rank)
        self.checkpoints = CheckpointWriter(config, rank)
        self.sender = ShardSender()

    def address(self) -> tuple[str, int]:
        """Host and port of the store in which the process group meets; rank 0 only, which serves it."""
        host = own_address()
        self._group_store = open_store(host)
        return host, self._group_store.port

    def start(self, host: str, port: int) -> dict[str, Any]:
        """Join the process group of rank 0, load the ARLM and partition it; returns who this is, for the run's page."""
        import deepspeed

        from learner.engines import GatheredEngine, WholeEngine  # slow to import and chatty, as DeepSpeed is

        learner = self.config.learner
        on_gpu = device_for("learner", learner.resources) == "cuda"
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        self.clock = PhaseClock(self.device)
        os.environ.update(RANK=str(self.rank), LOCAL_RANK="0", WORLD_SIZE=str(learner.ranks))
        stay_on(own_address())
        timeout = timedelta(seconds=self.config.pipeline.stage_timeout_s)
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=self._group_store if self.rank == 0 else connect(host, port, timeout.total_seconds()),
            rank=self.rank,
            world_size=learner.ranks,
            timeout=timeout,
        )
        # the optional shared-memory op takes minutes to compile at the first start, and gloo works without it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout)
        attention = default_attention() if on_gpu else "sdpa"
        path = self.config.model.path
        self.conversion = student_of(self.config)
        whole = keeps_whole(learner, parameter_count(self.conversion.config))
        settings = deepspeed_config(learner, on_gpu, whole)
        base = frozen_base(self.config, self.device)  # before models are loaded in parts
        adapter = self.config.adapter
        if not (whole and adapter.rank):  # of a whole model with an adapter DeepSpeed has only the adapter
            self._partitioned_loading = HfDeepSpeedConfig(settings)  # must stay alive while the model loads
        self.tokenizer = self.conversion.tokenizer
        self.reader = RecordReader(self.config, self.conversion)
        student = load_converted(
            path,
            self.conversion,
            getattr(torch, learner.dtype),
            attention,
            lambda parameter: deepspeed.zero.GatheredParameters([parameter]),
        )
        if adapter.rank:
            add_adapters(student, adapter, self.config.seed)
        student.train()
        self.engine = (WholeEngine if whole else GatheredEngine)(self.config, student, settings, on_gpu)
        self.student = self.engine.student
        self.updater.begin(self.engine, self.clock, self.device)
        self.checkpoints.begin(self.engine, self.conversion)
        if base:
            self.engine.module.alignment = LayerAlignment(self.student, base, self.config.objective.terms)
        self.attention = attention
        self.teacher_heads = teacher_heads_of(self.config, self.conversion, self.device)
        self.own_head = own_head(self.config, self.conversion)
        self.transport: WeightsTransport = ObjectStoreTransport()
        if on_gpu or learner.compile:
            warm_up(self.engine, self._builder(self._untrained_meta()))
        if on_gpu and self.config.pipeline.checkpoints_while_training:  # beside the first rollouts
            self.checkpoints.reserve()
        return {
            "role": "learner",
            "index": self.rank,
            "pid": os.getpid(),
            "node": ray.util.get_node_ip_address(),
        }

    def open_weights_group(self) -> tuple[str, int]:
        """Host and port where the members of the weights group meet; rank 0 only."""
        host = own_address()
        self._weights_store = open_store(host)
        return host, self._weights_store.port

    def join_weights_group(self, members: tuple[str, ...]) -> None:
        """From now on publish by broadcast. Rank 0 only, at the same time as the rollout actors join."""
        timeout = self.config.weights_timeout_s
        self.transport = BroadcastTransport(self._weights_store, members, 0, self.device, timeout)

    @ray.method(concurrency_group="weights")
    def dissolve_weights_group(self) -> None:
        """A member is lost: nobody waits for it any longer."""
        assert isinstance(self.transport, BroadcastTransport)
        self.transport.dissolve()

    @ray.method(concurrency_group="weights")
    def share_weights(self) -> WeightsHandle:
        """The version published last once more, through Ray's object store: for rollout actors outside the group."""
        assert isinstance(self.transport, BroadcastTransport)
        return ObjectStoreTransport().publish(*self.transport.staged())

    def train(
        self,
        refs: list[ray.ObjectRef],
        first_update: int,
        run_updates: RunUpdates,
        spool: Path | None = None,
        extra_weights: tuple[float, ...] = (),
        faults: FaultFolder | None = None,
    ) -> dict[str, Any]:
        """All updates of one rollout batch; returns its metrics, the same on every rank.

        Trajectories are ordered by (ordinal, sample), so updates do not depend on the order of arrival. An update whose
        loss or gradient is not finite is left out and kept in `faults`: `left_out` says so of each; `updates` counts
        all, as the learning rate does. `warnings`, of this rank alone, are what else somebody should hear.

        Args:
            refs: of the record batches with targets.
            first_update: updates that the run has made before.
            run_updates: of the whole run, for the learning rate.
            spool: an Arrow IPC file that rank 0 writes the record batches to.
            extra_weights: of the losses in objective.extra.
            faults: where, and how many, updates are kept that are left out; none: the first raises.

        Raises:
            ValueError: a record batch does not fit this run.
            FloatingPointError: a loss or gradient was not finite, and there are no `faults`; no update is made with it.
        """
        start = time.perf_counter()
        self.clock.mark("read")
        record_batches = ray.get(list(refs))
        trajectories, meta = self.reader.read(record_batches)
        warned = self._spool(spool, record_batches)
        read = time.perf_counter()
        builders = self._builders(meta, extra_weights)
        shares = update_shares(
            trajectories, len(builders), self.config.rollout.samples_per_prompt, self.config.learner.batch_rows
        )
        updates = len(shares)
        left_out: list[str] = []
        totals: Counter[str] = Counter()
        following: list[PreparedUpdate] | None = None
        for u, share in enumerate(shares):
            lr = learning_rate(self.config.learner, first_update + u, run_updates)
            self.engine.set_lr(lr)
            wanted = self.config.dashboard.rollouts if u == 0 and self.rank == 0 else 0
            prepared = following or self.updater.prepared(share, builders)
            prepared, sums = self.updater.accumulated(prepared, builders, keep_positions=wanted > 0)
            # while the GPU computes, the host packs the next update, unless that depends on the new weights
            ahead = u + 1 < updates and not any(b.objective.reads_difficulty for b in builders)
            following = self.updater.prepared(shares[u + 1], builders) if ahead else None
            metrics, wrong = self.updater.step(prepared, sums)
            totals.update(metrics)
            if sums[0].per_position and not wrong:
                kl = torch.cat(sums[0].per_position).cpu().numpy()
                self.samples = first_samples(prepared[0], kl, wanted, meta.block_size)
            if wrong:
                said = f"update {first_update + u} is left out: {wrong}"
                if faults is None:
                    raise FloatingPointError(said)
                if len(left_out) < faults.most:
                    facts = {"update": first_update + u, "lr": lr, "wrong": wrong, "extra_weights": extra_weights}
                    said += self._keep(faults.folder, [part.trajectories for part in prepared], meta, facts)
                left_out.append(said)
        phases = self.clock.take()
        seconds = time.perf_counter() - start
        self.spans.add(time.perf_counter() - read)
        positions, made = max(totals["positions"], 1.0), updates - len(left_out)
        return {
            "loss": sum(totals[of_part("loss", i)] for i in range(len(builders))) / made if made else math.nan,
            **part_metrics(totals, len(builders), max(made, 1)),
            "kl": totals["divergence"] / positions,
            "entropy": totals["entropy"] / positions,
            "teacher_agreement": totals["agree"] / positions,
            **({"trusted_share": totals["trusted"] / positions} if self.config.objective.routes else {}),
            "grad_norm": totals["grad_norm"] / made if made else math.nan,
            "lr": lr,
            "updates": updates,
            "left_out": left_out,
            "trained_positions": sum(totals[of_part("positions", i)] for i in range(len(builders))),
            "packed_tokens": totals["packed_tokens"],
            "seconds": seconds,
            "warnings": [*warned, *self.updater.take_notes()],
            **{f"{phase}_s": phases[phase] for phase in PHASES},
        }

    def progress(self) -> int:
        """Micro-batches so far."""
        return self.updater.micro_batches

    def _spool(self, spool: Path | None, record_batches: list[pa.RecordBatch]) -> list[str]:
        """Write the record batches where that is asked for; returns what somebody should hear."""
        if not spool or self.rank:
            return []
        try:
            write_spool(spool, record_batches)
        except OSError as error:  # a full disk: the spool is a record, and nothing that training needs
            spool.unlink(missing_ok=True)
            return [f"{str(spool)!r} could not be written ({error}); the run goes on without it: free space there"]
        return []

    def _keep(
        self, folder: Path, trajectories: list[list[Trajectory]], meta: TrajectoryMeta, facts: dict[str, Any]
    ) -> str:
        """Write down an update that is left out, the trajectories of each loss; collective. Returns the end of the
        sentence that says so."""
        state = self.checkpoints.copied_student()
        if self.rank:
            return ""
        facts |= {"ranks": self.config.learner.ranks, "config": self.config.model_dump(mode="json")}
        rows = [t for part in trajectories for t in part]
        try:
            kept = write_fault(folder, recorded(self.config, rows, meta, self._teacher_widths), facts)
            self.checkpoints.write_copy(kept / MODEL, meta.block_size, state)
        except (OSError, SafetensorError) as error:
            return f"; it could not be kept in {str(folder)!r} ({error})"
        return f"; its trajectories and weights are in {str(kept)!r}, which opdlm replay repeats"

    def stats(self) -> dict[str, Any]:
        """`spans` is when this rank trained or published since the last call (common/busy.py)."""
        return {"pid": os.getpid(), "spans": self.spans.take()}

    def rollout_samples(self) -> list[dict[str, Any]]:
        """The first `dashboard.rollouts` trajectories of the last rollout batch (learner/rollout_samples.py).

        Only rank 0 keeps them. They are decoded here, since few batches are asked for.
        """
        return [sample(tokenizer=self.tokenizer) for sample in self.samples]

    def _builders(self, meta: TrajectoryMeta, extra_weights: tuple[float, ...]) -> list[BatchBuilder]:
        """One for each loss, the main one first."""
        return self._builder(meta).with_extra(self.config.objective, extra_weights)

    def _builder(self, meta: TrajectoryMeta) -> BatchBuilder:
        return BatchBuilder.of(
            self.config,
            meta,
            attention=self.attention,
            device=self.device,
            **of_heads(self.teacher_heads),
            **self.own_head,
            windows=attention_windows(self.conversion.config),
            graphs=self.engine.graphs,
        )

    def limit(self, budgets: Mapping[str, int]) -> None:
        """Go on with smaller micro-batches, or products with the LM head, than the config says: `budgets` are new
        values of its fields. Called on all ranks."""
        self.updater.limit(budgets)

    def _untrained_meta(self) -> TrajectoryMeta:
        """Of the row that the warm-up is made on."""
        width = self._teacher_widths[0] if self.teacher_heads else self.config.teacher.top_k
        mask_token_id = self.conversion.config.mask_token_id
        return TrajectoryMeta(self.config.block_size, mask_token_id, "", self.config.target_kind, width)

    @property
    def _teacher_widths(self) -> list[int]:
        return [head.weight.shape[1] for head in self.teacher_heads]

    @computes
    def publish(self, version: int) -> WeightsHandle | None:
        """Gather the weights and publish them as `version`; rank 0 returns the handle, the others None."""
        buckets = gathered_buckets(self.student, self.config.publish.bucket_mib * 2**20)
        if self.rank == 0:
            return self.transport.publish(version, buckets)
        for _ in buckets:
            pass
        return None

    def save(self, out: Path, resume: Path | None = None, block_size: int | None = None) -> None:
        """Copy the student, and begin to write it into `out` as a complete Hugging Face folder, which records the block
        size and how the student was asked; `written` says when it is there.

        Every rank also writes its shard of weights and optimizer into `resume`, where that is given. Both folders must
        be on storage that all ranks share.
        """
        self.checkpoints.save(out, resume, block_size)

    def write_student(self, out: Path, block_size: int) -> None:
        """Write the student into `out` as a complete Hugging Face folder; collective, and done on return."""
        self.checkpoints.write_student(out, block_size)

    @ray.method(concurrency_group="files")
    def written(self) -> None:
        """Returns when all that `save` has begun is written.

        Raises:
            OSError, SafetensorError: it could not be written.
        """
        self.checkpoints.written()

    def teach_by(self, anchor: Path) -> None:
        """From the next rollout batch on, targets are those of the student in this folder."""
        self.config = self.config.anchored(anchor)
        self.teacher_heads = teacher_heads_of(self.config, self.conversion, self.device)

    def load(self, resume: Path) -> None:
        """Take weights and optimizer from the shards in `resume`, which the same number of ranks wrote with `save`.

        Raises:
            ValueError: the folder does not hold a shard of this rank.
        """
        self.engine.load(read_shard(resume, self.rank, self.config.learner.ranks))

    def keep(self, version: int, keeper: Any) -> None:
        """Copy this rank's shard, and begin to send the copy to its keeper; `kept` says when it is there."""
        self.sender.begin(keeper, version, self.engine.shard())

    @ray.method(concurrency_group="keeper")
    def kept(self) -> None:
        """Returns when all that `keep` has begun to send is with the keeper.

        Raises:
            RayError: the keeper is gone.
        """
        self.sender.sent()

    def take_back(self, version: int, keeper: Any) -> None:
        """Take the shard of a version from the keeper; collective."""
        self.engine.load(receive(keeper, version))


def as_remote(config: RunConfig, actor_class: type[LearnerRank] = LearnerRank) -> Any:
    resources = config.learner.resources
    environment = None if resources.gpus else {"DS_ACCELERATOR": "cpu"}
    groups = {"files": 1, "keeper": 1, "weights": 1}
    return as_ray_actor(actor_class, resources, environment=environment, concurrency_groups=groups)
