"""How probable the student finds each masked token of an update, by which `state.kind` lift chooses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.config.objective import ObjectiveConfig
from common.states import kept_by_difficulty, trained_positions
from common.trajectory import Trajectory
from learner.batches import BatchBuilder, TrainingBatch


def label_logprobs(
    trajectories: list[Trajectory],
    builder: BatchBuilder,
    rank: int,
    ranks: int,
    read: Callable[[TrainingBatch], Tensor],
) -> Tensor:
    """float32 [N], on the device: log p of x0 at all trained positions of an update, one trajectory after another.

    Those that other ranks read are 0, so that a sum over ranks is whole. `read` gives those of one micro-batch [L];
    it is called equally often on every rank.
    """
    starts = np.cumsum([0, *(int(trained_positions(t).sum()) for t in trajectories)])
    found = torch.zeros(int(starts[-1]), device=builder.device)
    batches, _ = builder.update(trajectories, rank, ranks)
    for batch in batches:
        values = read(builder.tensors(batch, trajectories))
        # a document is not split, and its positions are in the trajectory's order
        first = np.flatnonzero(np.diff(batch.loss_doc, prepend=-1))
        place = np.arange(len(batch.loss_doc)) - np.repeat(first, np.diff(np.append(first, len(batch.loss_doc))))
        found[torch.from_numpy(starts[batch.loss_doc] + place).to(builder.device)] = values.float()
    return found


def kept(
    trajectories: list[Trajectory], log_p: np.ndarray, objective: ObjectiveConfig, block_size: int, run_seed: int
) -> list[Trajectory]:
    """The trajectories with what stays masked, from the log-probabilities of the whole update, float [N]; an update may
    have none of this loss."""
    ends = np.cumsum([trained_positions(t).sum() for t in trajectories], dtype=np.int64)
    parts = np.split(log_p, ends)[:-1]  # behind the last one is nothing
    return [
        kept_by_difficulty(t, part, objective, block_size, run_seed)
        for t, part in zip(trajectories, parts, strict=True)
    ]
