"""The learning rate: a function of the optimizer update alone, counted over the whole run.

The last rollout batch may be short and have fewer updates than the others. So warm-up and total are counted in updates
once, before the run starts, and neither the rollout batch that an update is in nor a resume changes its rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.config.learner import LearnerConfig
from common.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class RunUpdates:
    """Optimizer updates of a whole run: the `warmup` ones, which come first, and the `total`."""

    warmup: int
    total: int


def count_updates(config: RunConfig, prompts: int) -> RunUpdates:
    """The updates of a run on so many prompts, all epochs counted; `pipeline.max_batches` may leave some out.

    A rollout batch has ceil(trajectories / learner.batch_rows) updates. A batch of the warm-up counts as a full one.
    """
    size = config.rollout.prompts_per_batch
    limit = config.pipeline.max_batches
    full, left = divmod(prompts if limit is None else min(prompts, limit * size), size)

    def updates(prompts_of_batch: int) -> int:
        return -(-prompts_of_batch * config.rollout.samples_per_prompt // config.learner.batch_rows)

    return RunUpdates(warmup=config.learner.warmup_batches * updates(size), total=full * updates(size) + updates(left))


def learning_rate(config: LearnerConfig, update: int, updates: RunUpdates) -> float:
    """Rate of update `update` (from 0) of the run: linear warm-up, then `learner.lr_schedule`."""
    warmup, total = updates.warmup, updates.total
    if update < warmup:
        return config.lr * (update + 1) / warmup
    if config.lr_schedule == "constant":
        return config.lr
    if config.lr_schedule == "wsd":
        decay = max(config.decay_share * total, 1.0)
        left = min(max(total - update, 0) / decay, 1.0)
        return config.min_lr + left * (config.lr - config.min_lr)
    progress = min((update - warmup) / max(total - warmup, 1), 1.0)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))
