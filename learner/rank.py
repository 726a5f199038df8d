"""One rank of the learner: a Ray actor that holds one DeepSpeed ZeRO-3 process."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig

from common.busy import BusySpans, computes
from common.config.run import RunConfig
from common.conversion import load_converted, own_head, save_student, student_of, teacher_heads_of
from common.device import device_for
from common.lora import add_adapters
from common.memory_budget import MemoryBudget
from common.ray_actor import as_ray_actor, own_address
from common.student import attention_windows, default_attention, parameter_count
from common.trajectory import Trajectory, TrajectoryMeta, to_batch, write_spool
from common.weights.broadcast import BroadcastTransport, connect, open_store, stay_on
from common.weights.object_store import ObjectStoreTransport
from common.weights.transport import WeightsHandle, WeightsTransport
from learner.alignment import LayerAlignment, frozen_base
from learner.batches import BatchBuilder, TrainingBatch, of_heads, update_shares
from learner.deepspeed_config import deepspeed_config, keeps_whole
from learner.difficulty import kept, label_logprobs
from learner.faults import MODEL, FaultFolder, write_fault
from learner.objective import LossSums, empty_sums
from learner.packing import PAD_DOCUMENT, MicroBatch
from learner.phase_clock import PHASES, PhaseClock
from learner.publish import gathered_buckets
from learner.records import RecordReader
from learner.rollout_samples import rollout_sample
from learner.schedule import RunUpdates, learning_rate
from learner.shard_keeper import receive, send
from learner.shards import HostCopy, read_shard, write_shard

_WARM_UP_TOKENS = 2048
_LEAST_CHUNK = 16  # positions in a product with the LM head


class PreparedUpdate(NamedTuple):
    """An update's trajectories, this rank's micro-batches of them, the same on the device, and the trained positions of
    all ranks."""

    trajectories: list[Trajectory]
    batches: list[MicroBatch]
    tensors: list[TrainingBatch]
    positions: int


def of_part(name: str, part: int) -> str:
    """The name of a total of loss `part`; those of the main loss, 0, have no number."""
    return f"{name}/{part}" if part else name


def part_metrics(totals: Mapping[str, float], parts: int, updates: int) -> dict[str, float]:
    """The metrics of the losses of a sum; none where there is one loss only."""
    if parts == 1:
        return {}
    losses = {f"part/{i}/loss": totals[of_part("loss", i)] / updates for i in range(parts)}
    divergences = {
        f"part/{i}/kl": totals[of_part("divergence", i)] / max(totals[of_part("positions", i)], 1.0)
        for i in range(1, parts)
    }
    return losses | divergences


class MicroBatchTooLargeError(torch.OutOfMemoryError):
    """Memory ran out where other ranks wait for this one: with the config field `budget` at `value` it may suffice."""

    def __init__(self, message: str, budget: str, value: int) -> None:
        super().__init__(message, budget, value)
        self.budget, self.value = budget, value

    def __str__(self) -> str:
        return str(self.args[0])


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
        self.micro_batch = MemoryBudget(
            "learner.max_tokens_per_microbatch", config.learner.max_tokens_per_microbatch, least=8
        )
        self.chunk = MemoryBudget("learner.logits_chunk_rows", config.learner.logits_chunk_rows, least=_LEAST_CHUNK)
        self.student_copy, self.shard_copy = HostCopy(), HostCopy()
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] = self.writer.submit(lambda: None)
        self.kept_copy = HostCopy()
        self.sender = ThreadPoolExecutor(1, "keeper")
        self.sending: Future[None] = self.sender.submit(lambda: None)
        self.micro_batches = 0

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
        self.copies = torch.cuda.Stream() if on_gpu else None
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
        if base:
            self.engine.module.alignment = LayerAlignment(self.student, base, self.config.objective.terms)
        self.attention = attention
        self.teacher_heads = teacher_heads_of(self.config, self.conversion, self.device)
        self.own_head = own_head(self.config, self.conversion)
        self.transport: WeightsTransport = ObjectStoreTransport()
        if on_gpu or learner.compile:
            self._warm_up()
        if on_gpu and self.config.pipeline.checkpoints_while_training:  # beside the first rollouts
            self.writing = self.writer.submit(self.shard_copy.reserve, self.engine.shard())
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
            builders = self._within_memory(builders)
            prepared = following or self._prepared(share, builders)
            prepared, sums = self._accumulated(prepared, builders, keep_positions=wanted > 0)
            # while the GPU computes, the host packs the next update, unless that depends on the new weights
            ahead = u + 1 < updates and not any(b.objective.reads_difficulty for b in builders)
            following = self._prepared(shares[u + 1], self._within_memory(builders)) if ahead else None
            metrics, wrong = self._step(prepared, sums)
            totals.update(metrics)
            if sums[0].per_position and not wrong:
                self._sample(prepared[0], torch.cat(sums[0].per_position).cpu().numpy(), wanted, meta.block_size)
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
            "warnings": [*warned, *self.micro_batch.take_notes(), *self.chunk.take_notes()],
            **{f"{phase}_s": phases[phase] for phase in PHASES},
        }

    def progress(self) -> int:
        """Micro-batches so far."""
        return self.micro_batches

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
        state = self._copied_student()
        if self.rank:
            return ""
        facts |= {"ranks": self.config.learner.ranks, "config": self.config.model_dump(mode="json")}
        try:
            kept = write_fault(folder, self._recorded([t for part in trajectories for t in part], meta), facts)
            self._write_student(kept / MODEL, meta.block_size, state)
        except (OSError, SafetensorError) as error:
            return f"; it could not be kept in {str(folder)!r} ({error})"
        return f"; its trajectories and weights are in {str(kept)!r}, which opdlm replay repeats"

    def _recorded(self, trajectories: list[Trajectory], meta: TrajectoryMeta) -> list[pa.RecordBatch]:
        """Trajectories as record batches, one for each of their teachers."""
        by_teacher: dict[int, list[Trajectory]] = {}
        for trajectory in trajectories:
            by_teacher.setdefault(self.config.teacher_of(trajectory.domain), []).append(trajectory)
        widths = [head.weight.shape[1] for head in self.teacher_heads]
        metas = [replace(meta, target_width=width) for width in widths] or [meta] * len(self.config.teacher_paths)
        return [to_batch(rows, metas[teacher]) for teacher, rows in by_teacher.items()]

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

    def _warm_up(self) -> None:
        """Compile forward and backward, on a row that trains nothing, while the other roles load. It adds zeros to the
        gradients, as the rows do that a rank without work gets."""
        kind = self.config.target_kind
        width = self.teacher_heads[0].weight.shape[1] if self.teacher_heads else self.config.teacher.top_k
        mask_token_id = self.conversion.config.mask_token_id
        builder = self._builder(TrajectoryMeta(self.config.block_size, mask_token_id, "", kind, width))
        row = builder.untrained(min(_WARM_UP_TOKENS, builder.max_tokens))
        loss = self.engine.forward(builder.tensors(row, []), empty_sums(self.device), last=False)
        self.engine.backward(loss)

    def _prepared(self, share: list[list[Trajectory]], builders: list[BatchBuilder]) -> list[PreparedUpdate]:
        """This rank's micro-batches of an update, for each loss; on a GPU copied beside what it computes."""
        return [
            self._packed(self._kept(trajectories, b) if b.objective.reads_difficulty else trajectories, b)
            for trajectories, b in zip(share, builders, strict=True)
        ]

    def limit(self, budgets: Mapping[str, int]) -> None:
        """Go on with smaller micro-batches, or products with the LM head, than the config says: `budgets` are new
        values of its fields. Called on all ranks."""
        for budget in (self.micro_batch, self.chunk):
            budget.value = budgets.get(budget.name, budget.value)
        self.engine.module.chunk = self.chunk.value

    def _packed(self, trajectories: list[Trajectory], builder: BatchBuilder) -> PreparedUpdate:
        self.clock.mark("pack")
        batches, positions = builder.update(trajectories, self.rank, self.config.learner.ranks)
        self.clock.mark("copy")
        with torch.cuda.stream(self.copies):
            tensors = [builder.tensors(batch, trajectories) for batch in batches]
        return PreparedUpdate(trajectories, batches, tensors, positions)

    def _within_memory(self, builders: list[BatchBuilder]) -> list[BatchBuilder]:
        return [replace(builder, max_tokens=self.micro_batch.value) for builder in builders]

    def _kept(self, trajectories: list[Trajectory], builder: BatchBuilder) -> list[Trajectory]:
        """The update with what stays masked after one forward of the student as it is now."""
        self.clock.mark("forward")
        log_p = label_logprobs(trajectories, builder, self.rank, self.config.learner.ranks, self.engine.label_logprobs)
        torch.distributed.all_reduce(log_p)
        return kept(trajectories, log_p.cpu().numpy(), builder.objective, builder.meta.block_size, self.config.seed)

    def _accumulated(
        self, update: list[PreparedUpdate], builders: list[BatchBuilder], keep_positions: bool
    ) -> tuple[list[PreparedUpdate], list[LossSums]]:
        """Forward and backward of an update. Where memory runs out, they are made anew in smaller micro-batches, which
        give the same gradients up to rounding."""
        while True:
            sums = [empty_sums(self.device) for _ in builders]
            sums[0].per_position = [] if keep_positions else None
            try:
                self._accumulate(update, sums)
                return update, sums
            except torch.OutOfMemoryError as error:
                too_large, used = self._too_large(update, error)
            trajectories = [part.trajectories for part in update]
            del update
            self.engine.discard()
            too_large.halve(used)
            self.engine.module.chunk = self.chunk.value
            smaller = self._within_memory(builders)
            update = [self._packed(part, builder) for part, builder in zip(trajectories, smaller, strict=True)]

    def _too_large(self, update: list[PreparedUpdate], error: torch.OutOfMemoryError) -> tuple[MemoryBudget, int]:
        """What to halve after memory ran out, and how much of it was in use.

        Raises:
            MicroBatchTooLargeError: other ranks wait for this one in the middle of a forward, so that all must begin
                anew.
            torch.OutOfMemoryError: nothing that would help can be halved.
        """
        largest = max((batch for part in update for batch in part.batches), key=lambda batch: batch.tokens)
        several = len(np.unique(largest.doc[largest.doc != PAD_DOCUMENT])) > 1
        too_large, used = (self.micro_batch, largest.ids.size) if several else (self.chunk, self.chunk.value)
        message = (
            f"the learner's memory does not hold a micro-batch of {largest.tokens} tokens: lower "
            f"learner.max_tokens_per_microbatch ({self.micro_batch.value}) or curriculum.max_tokens, or set "
            "learner.gradient_checkpointing"
        )
        if not too_large.can_halve:
            raise torch.OutOfMemoryError(message) from error
        if not self.engine.alone:
            raise MicroBatchTooLargeError(message, too_large.name, too_large.half(used)) from error
        return too_large, used

    def _accumulate(self, update: list[PreparedUpdate], sums: list[LossSums]) -> None:
        """Forward and backward of all micro-batches."""
        if self.copies:
            torch.cuda.current_stream().wait_stream(self.copies)
        order = [(tensors, of_loss) for part, of_loss in zip(update, sums, strict=True) for tensors in part.tensors]
        for i, (tensors, of_loss) in enumerate(order):
            self.clock.mark("forward")
            loss = self.engine.forward(tensors, of_loss, last=i == len(order) - 1)
            self.clock.mark("backward")
            self.engine.backward(loss)
            # its graph holds the gradient node of a tied LM head on this stream, which the capture of a new width of
            # the next micro-batch could not join
            del loss
            self.micro_batches += 1

    def _step(self, update: list[PreparedUpdate], sums: list[LossSums]) -> tuple[dict[str, float], str]:
        """One optimizer step over all ranks.

        Returns:
            The sums of the update over all ranks, and what is not finite in it; then no step is made, and of the sums
            only the work counts. Both are the same on every rank.
        """
        self.clock.mark("sums")
        tokens = float(sum(tensors.tokens for part in update for tensors in part.tensors))
        scalars = {"packed_tokens": torch.tensor(tokens, dtype=torch.float64, device=self.device)}
        for i, of_loss in enumerate(sums):
            scalars |= {of_part(name, i): value for name, value in of_loss.scalars().items()}
        values = torch.stack(list(scalars.values()))
        torch.distributed.all_reduce(values)
        totals = dict(zip(scalars, values.tolist(), strict=True))
        work = {"packed_tokens": totals["packed_tokens"]}
        loss, bad = (sum(totals[of_part(name, i)] for i in range(len(sums))) for name in ("loss", "bad"))
        self.clock.mark("optimizer")
        if bad or not math.isfinite(loss):
            self.engine.discard()
            trained = sum(part.positions for part in update)
            return work, (
                f"the loss is {loss:.6g}, and {bad:.0f} of {trained} trained positions have logits or a divergence "
                "that are not finite"
            )
        norm = self.engine.step() if any(part.tensors for part in update) else 0.0
        if not math.isfinite(norm):
            return work, f"the loss is {loss:.6g}, and the gradient is not finite"
        positions = {of_part("positions", i): float(part.positions) for i, part in enumerate(update)}
        return totals | positions | {"grad_norm": norm}, ""

    def _sample(self, update: PreparedUpdate, kl: np.ndarray, wanted: int, block_size: int) -> None:
        """Keep the first `wanted` trajectories of an update, with the target rows and divergences of their trained
        positions; `kl` float [L] is of all positions of all micro-batches."""
        docs = np.concatenate([batch.loss_doc for batch in update.batches])
        rows = np.concatenate([batch.loss_target for batch in update.batches])
        self.samples = [
            partial(
                rollout_sample,
                update.trajectories[d],
                target_rows=rows[docs == d],
                kl=kl[docs == d],
                block_size=block_size,
            )
            for d in np.unique(docs)[:wanted]
        ]

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
        state = self._copied_student()
        states = self.shard_copy.take(self.engine.shard()) if resume else {}

        def write() -> None:
            if self.rank == 0:
                self._write_student(out, block_size, state)
            if resume:
                write_shard(resume, self.rank, self.config.learner.ranks, states)

        self.writing = self.writer.submit(write)

    def _write_student(self, out: Path, block_size: int | None, state: dict[str, Tensor]) -> None:
        base = self.config.model.path
        save_student(self.student, self.conversion, out, block_size, state, self.config.adapter, base)

    def write_student(self, out: Path, block_size: int) -> None:
        """Write the student into `out` as a complete Hugging Face folder; collective, and done on return."""
        state = self._copied_student()
        if self.rank == 0:
            save_student(self.student, self.conversion, out, block_size, state)

    def _copied_student(self) -> dict[str, Tensor]:
        """Rank 0's copy of what is trained of the student, whole, in host memory, once the one before is written;
        collective."""
        wait([self.writing])
        state: dict[str, Tensor] = {}
        for bucket in gathered_buckets(self.student, self.config.publish.bucket_mib * 2**20):
            if self.rank == 0:
                state |= self.student_copy.take(dict(bucket))
        return state

    @ray.method(concurrency_group="files")
    def written(self) -> None:
        """Returns when all that `save` has begun is written.

        Raises:
            OSError, SafetensorError: it could not be written.
        """
        self.writing.result()

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
        wait([self.sending])  # it reads the copy
        self.sending = self.sender.submit(send, keeper, version, self.kept_copy.take(self.engine.shard()))

    @ray.method(concurrency_group="keeper")
    def kept(self) -> None:
        """Returns when all that `keep` has begun to send is with the keeper.

        Raises:
            RayError: the keeper is gone.
        """
        self.sending.result()

    def take_back(self, version: int, keeper: Any) -> None:
        """Take the shard of a version from the keeper; collective."""
        self.engine.load(receive(keeper, version))


def as_remote(config: RunConfig, actor_class: type[LearnerRank] = LearnerRank) -> Any:
    resources = config.learner.resources
    environment = None if resources.gpus else {"DS_ACCELERATOR": "cpu"}
    groups = {"files": 1, "keeper": 1, "weights": 1}
    return as_ray_actor(actor_class, resources, environment=environment, concurrency_groups=groups)
