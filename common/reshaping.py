"""Reshaping of the teacher's distribution: temperature, then top-k, top-p and min-p."""

from __future__ import annotations

import torch
from torch import Tensor

from common.config.objective import TeacherTarget


def reshape(logits: Tensor, target: TeacherTarget) -> Tensor:
    """Log-probabilities of the reshaped distribution, [L, C] in the dtype of `logits`; -inf where tokens are cut.

    With p = softmax(logits / temperature): keep the top_k largest; renormalise and keep the smallest set whose
    probability reaches top_p; keep what has at least min_p times the largest probability; renormalise. Among equal
    tokens at an edge, the one that sorts first stays. `logits` may be log-probabilities of the C best tokens, if
    top_k <= C: then the outcome is that of the full distribution.
    """
    scaled = logits / target.temperature
    if not target.truncates:
        return scaled.log_softmax(-1)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    if target.top_k:
        ordered[..., target.top_k :] = -torch.inf
    if target.top_p < 1:
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= target.top_p, -torch.inf)
    if target.min_p:
        ordered = ordered.masked_fill((ordered - ordered[..., :1]).exp() < target.min_p, -torch.inf)
    return torch.empty_like(scaled).scatter(-1, order, ordered).log_softmax(-1)
