"""From the trajectories of one optimiser update to the tensors of this rank's forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.masks import packed_mask
from common.objective_config import AS_IT_IS, TeacherTarget
from common.trajectory import Trajectory, TrajectoryMeta
from learner.objective import HiddenTarget, LabelTarget, Target, TopKTarget
from learner.packing import (
    Document,
    MicroBatch,
    assign_ranks,
    coefficients,
    document,
    microbatch,
    plan_microbatches,
)


@dataclass(frozen=True)
class TrainingBatch:
    """Tensors of one forward: `ids`, `positions` int64 [R, W]; `mask` in the attention's form; `loss_index` int64
    [L] into the R*W tokens; `coefficient` float32 [L]; the teacher's targets at these L positions."""

    ids: Tensor
    positions: Tensor
    mask: Any
    loss_index: Tensor
    coefficient: Tensor
    target: Target
    tokens: int


@dataclass(frozen=True)
class BatchBuilder:
    """Packs updates for one rank. `teacher_head` [V, d] is needed for the target kind `hidden`, which `shape` reshapes;
    the kind `none` takes the tokens of x0 as hard labels."""

    meta: TrajectoryMeta
    normalization: str
    topk_tail: str
    max_tokens: int
    attention: str
    device: torch.device
    teacher_head: Tensor | None = None
    shape: TeacherTarget = AS_IT_IS

    def update(self, trajectories: list[Trajectory], rank: int, ranks: int) -> tuple[list[MicroBatch], int]:
        """This rank's micro-batches of an update, and the number of trained positions over all ranks.

        Every rank gets the same number of micro-batches (ZeRO-3 forwards are collective): short ones get a dummy
        document that trains nothing.
        """
        documents = {i: document(t, self.meta.block_size, self.meta.mask_token_id) for i, t in enumerate(trajectories)}
        coefficient = dict(enumerate(coefficients(list(documents.values()), self.normalization)))
        trained = [i for i, d in documents.items() if len(d.loss_index)]
        shares = assign_ranks([len(documents[i]) for i in trained], ranks)
        plans = [
            plan_microbatches(
                {trained[i]: len(documents[trained[i]]) for i in share},
                self.max_tokens,
                self.attention == "flex_attention",
            )
            for share in shares
        ]
        count = max(len(plan) for plan in plans)
        batches = [microbatch(rows, documents, coefficient) for rows in plans[rank]]
        dummy = _dummy(self.meta.block_size)
        batches += [microbatch([[0]], {0: dummy}, {0: dummy.loss_weight})] * (count - len(batches))
        return batches, sum(len(d.loss_index) for d in documents.values())

    def tensors(self, batch: MicroBatch, trajectories: list[Trajectory]) -> TrainingBatch:
        """Move one micro-batch to the device, with its mask and targets."""

        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

        return TrainingBatch(
            ids=move(batch.ids),
            positions=move(batch.positions),
            mask=packed_mask(move(batch.doc), move(batch.copy), move(batch.block), self.attention),
            loss_index=move(batch.loss_index),
            coefficient=move(batch.loss_coefficient),
            target=self._target(batch, trajectories),
            tokens=batch.tokens,
        )

    def _target(self, batch: MicroBatch, trajectories: list[Trajectory]) -> Target:
        width = self.meta.target_width
        order = list(dict.fromkeys(batch.loss_doc.tolist()))

        def rows(name: str, columns: int, dtype: type) -> np.ndarray:
            parts = [
                getattr(trajectories[i], name).reshape(-1, columns)[batch.loss_target[batch.loss_doc == i]]
                for i in order
            ]
            return np.concatenate([np.empty((0, columns), dtype), *parts])

        if self.meta.target_kind == "none":
            labels = [
                trajectories[i].response_ids[trajectories[i].target_offsets][batch.loss_target[batch.loss_doc == i]]
                for i in order
            ]
            return LabelTarget(torch.from_numpy(np.concatenate([np.empty(0, np.int64), *labels])).to(self.device))
        if self.meta.target_kind == "topk":
            return TopKTarget(
                ids=torch.from_numpy(rows("topk_ids", width, np.int32)).to(self.device).long(),
                logprobs=torch.from_numpy(rows("topk_logprobs", width, np.float32)).to(self.device),
                log_rest=torch.from_numpy(rows("log_rest", 1, np.float32)[:, 0]).to(self.device),
                tail=self.topk_tail,
            )
        if self.teacher_head is None:
            raise ValueError("target kind 'hidden' needs the teacher's LM head")
        if self.meta.hidden_dtype == "bfloat16":
            bits = torch.from_numpy(rows("hidden", width, np.uint16).view(np.int16))
            hidden = bits.view(torch.bfloat16)
        else:
            hidden = torch.from_numpy(rows("hidden", width, np.float32))
        return HiddenTarget(hidden.to(self.device), self.teacher_head, self.shape)


def _dummy(block_size: int) -> Document:
    """One clean block that trains nothing."""
    zeros, none = np.zeros(block_size, np.int64), np.empty(0, np.int64)
    return Document(zeros, np.arange(block_size), zeros, zeros, none, none, np.empty(0, np.float32))
