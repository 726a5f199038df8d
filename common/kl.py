"""The Kullback-Leibler divergence, and the distribution that a model's final hidden state stands for."""

from __future__ import annotations

import math

from torch import Tensor

from common.student import full_precision_logits

_LOG_FLOOR = -60.0  # log-probabilities of classes are clamped here, so that 0 * log 0 is 0


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q) in nats, float [...], of log-probabilities over the same classes [..., C]."""
    log_p, log_q = log_p.clamp_min(_LOG_FLOOR), log_q.clamp_min(_LOG_FLOOR)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def head_logits(hidden: Tensor, head: Tensor, tokens: int | None = None) -> Tensor:
    """hidden [L, d] times the LM head [V, d], in at least float32 [L, V]; -inf behind the first `tokens` classes."""
    logits = full_precision_logits(hidden.to(head.dtype), head)
    if tokens is not None:
        logits[:, tokens:] = -math.inf
    return logits
