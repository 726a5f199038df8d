"""Reshaping of a next-token distribution: temperature, then top-k, top-p and min-p.

One rule for the student's sampling and for the teacher's targets. Tokens with equal logits are ranked by their place,
the first (the lower id, where all tokens are given) before the later ones. So top-k keeps exactly k tokens and top-p
the smallest set, on every device and whatever the batch. transformers and vLLM keep all tokens that tie with the k-th
one, and leave ties at top-p's edge to their sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.config.targets import TeacherTarget


def reshape(logits: Tensor, target: TeacherTarget) -> Tensor:
    """Log-probabilities of the reshaped distribution, [L, C] in the dtype of `logits`; -inf where tokens are cut.

    The logits are divided by the temperature, truncated and normalised. `logits` may be log-probabilities of the C best
    tokens, if top_k <= C: then the outcome is that of the full distribution.
    """
    scaled = logits / target.temperature
    return truncate(scaled, target.top_k, target.top_p, target.min_p).log_softmax(-1)


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The logits [..., C] with -inf where tokens are cut; ties as said above.

    In this order, each on what the last one left: keep the `top_k` largest (0: all); renormalise and keep the smallest
    set of the largest whose probability reaches `top_p` (1: all); keep what has at least `min_p` times the largest
    probability (0: all).
    """
    if top_k:
        logits = _top_k(logits, min(top_k, logits.shape[-1]))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    if min_p:
        logits = logits.masked_fill((logits - logits.amax(-1, keepdim=True)).exp() < min_p, -torch.inf)
    return logits


def _top_k(logits: Tensor, k: int) -> Tensor:
    """Without a sort of the whole vocabulary: torch.topk finds the edge, and a cumulated sum who of the ties is in."""
    edge = logits.topk(k, dim=-1).values[..., -1:]
    above, tied = logits > edge, logits == edge
    room = k - above.sum(dim=-1, keepdim=True)
    return logits.masked_fill(~(above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= room))), -torch.inf)
