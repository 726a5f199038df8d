"""Updates of one rank: micro-batches packed, their gradients accumulated, one step made over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from common.config.run import RunConfig
from common.memory_budget import MemoryBudget
from common.trajectory import Trajectory
from learner.batches import BatchBuilder, TrainingBatch
from learner.difficulty import kept, label_logprobs
from learner.loss_parts import of_part
from learner.objective import LossSums, empty_sums
from learner.packing import PAD_DOCUMENT, MicroBatch
from learner.phase_clock import PhaseClock

if TYPE_CHECKING:  # slow to import and chatty, as DeepSpeed is
    from learner.engines import Engine

_LEAST_CHUNK = 16  # positions in a product with the LM head


class PreparedUpdate(NamedTuple):
    """An update's trajectories, this rank's micro-batches of them, the same on the device, and the trained positions of
    all ranks."""

    trajectories: list[Trajectory]
    batches: list[MicroBatch]
    tensors: list[TrainingBatch]
    positions: int


class MicroBatchTooLargeError(torch.OutOfMemoryError):
    """Memory ran out where other ranks wait for this one: with the config field `budget` at `value` it may suffice."""

    def __init__(self, message: str, budget: str, value: int) -> None:
        super().__init__(message, budget, value)
        self.budget, self.value = budget, value

    def __str__(self) -> str:
        return str(self.args[0])


class Updater:
    """Makes updates: `prepared`, `accumulated`, `step`, each called on all ranks; `begin` gives it its engine first.

    Where memory runs out, an update is made anew in smaller pieces, and so are all that follow.

    Attributes:
        micro_batches: how many have been computed so far.
    """

    engine: Engine
    clock: PhaseClock

    def __init__(self, config: RunConfig, rank: int) -> None:
        learner = config.learner
        self.rank, self.ranks, self.seed = rank, learner.ranks, config.seed
        self.micro_batch = MemoryBudget("learner.max_tokens_per_microbatch", learner.max_tokens_per_microbatch, least=8)
        self.chunk = MemoryBudget("learner.logits_chunk_rows", learner.logits_chunk_rows, least=_LEAST_CHUNK)
        self.micro_batches = 0

    def begin(self, engine: Engine, clock: PhaseClock, device: torch.device) -> None:
        self.engine, self.clock, self.device = engine, clock, device
        self.copies = torch.cuda.Stream() if device.type == "cuda" else None

    def take_notes(self) -> list[str]:
        """What somebody should hear of memory that ran out, since the last call."""
        return [*self.micro_batch.take_notes(), *self.chunk.take_notes()]

    def limit(self, budgets: Mapping[str, int]) -> None:
        """Go on with smaller micro-batches, or products with the LM head, than the config says: `budgets` are new
        values of its fields."""
        for budget in (self.micro_batch, self.chunk):
            budget.value = budgets.get(budget.name, budget.value)
        self.engine.module.chunk = self.chunk.value

    def prepared(self, share: list[list[Trajectory]], builders: list[BatchBuilder]) -> list[PreparedUpdate]:
        """This rank's micro-batches of an update, for each loss; on a GPU copied beside what it computes."""
        return [
            self._packed(self._kept(trajectories, b) if b.objective.reads_difficulty else trajectories, b)
            for trajectories, b in zip(share, self._within_memory(builders), strict=True)
        ]

    def _packed(self, trajectories: list[Trajectory], builder: BatchBuilder) -> PreparedUpdate:
        self.clock.mark("pack")
        batches, positions = builder.update(trajectories, self.rank, self.ranks)
        self.clock.mark("copy")
        with torch.cuda.stream(self.copies):
            tensors = [builder.tensors(batch, trajectories) for batch in batches]
        return PreparedUpdate(trajectories, batches, tensors, positions)

    def _within_memory(self, builders: list[BatchBuilder]) -> list[BatchBuilder]:
        return [replace(builder, max_tokens=self.micro_batch.value) for builder in builders]

    def _kept(self, trajectories: list[Trajectory], builder: BatchBuilder) -> list[Trajectory]:
        """The update with what stays masked after one forward of the student as it is now."""
        self.clock.mark("forward")
        log_p = label_logprobs(trajectories, builder, self.rank, self.ranks, self.engine.label_logprobs)
        torch.distributed.all_reduce(log_p)
        return kept(trajectories, log_p.cpu().numpy(), builder.objective, builder.meta.block_size, self.seed)

    def accumulated(
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

    def step(self, update: list[PreparedUpdate], sums: list[LossSums]) -> tuple[dict[str, float], str]:
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
