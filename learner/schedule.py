"""Learning rate as a function of the rollout batch."""

from __future__ import annotations

import math

from common.config.run import LearnerConfig


def learning_rate(config: LearnerConfig, update: int, updates_per_batch: int, total_updates: int) -> float:
    """Rate of optimiser update `update` (from 0): linear warm-up over `warmup_batches`, then the schedule."""
    warmup = config.warmup_batches * updates_per_batch
    if update < warmup:
        return config.lr * (update + 1) / warmup
    if config.lr_schedule == "constant":
        return config.lr
    if config.lr_schedule == "wsd":
        decay = max(config.decay_share * total_updates, 1.0)
        left = min(max(total_updates - update, 0) / decay, 1.0)
        return config.min_lr + left * (config.lr - config.min_lr)
    progress = min((update - warmup) / max(total_updates - warmup, 1), 1.0)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))
