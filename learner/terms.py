"""What changes the divergence of a position, and what is added to the divergences; all of it is off by default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.objective import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of trained positions of one block and state, of which the rollout revealed the first earlier.

    `earlier`, `later` int64 [P] are indices of positions, pairs of one block together; `coefficient` float32 [P].
    `group_ends` and `pair_ends` say, block by block, where its positions and its pairs end; they stay on the host.
    """

    earlier: Tensor
    later: Tensor
    coefficient: Tensor
    group_ends: list[int]
    pair_ends: list[int]


@dataclass(frozen=True)
class LogitTerms:
    """Clip, importance weight, routing, sharpening and rank terms of one forward.

    `labels` int64 [L] are the tokens of x0; `noise` float32 [L] in (0, 1) routes the positions.
    """

    objective: ObjectiveConfig
    labels: Tensor
    pairs: Pairs | None = None
    want_entropy: bool = False
    noise: Tensor | None = None

    @property
    def needs_entropy(self) -> bool:
        return self.want_entropy or self.objective.terms.needs_entropy

    def spans(self, length: int, chunk: int) -> Iterator[tuple[slice, slice]]:
        """(positions, pairs) of each chunk of `chunk` positions; with pairs, a chunk goes on to the end of a block."""
        if self.pairs is None:
            for start in range(0, length, chunk):
                yield slice(start, start + chunk), slice(0, 0)
            return
        start = first_pair = 0
        for end, pair_end in zip(self.pairs.group_ends, self.pairs.pair_ends, strict=True):
            if end - start >= chunk or end == length:
                yield slice(start, end), slice(first_pair, pair_end)
                start, first_pair = end, pair_end

    def counted(self, divergence: Tensor, log_t: Tensor, log_s: Tensor, rows: slice) -> Tensor:
        """D_i as the loss takes it, float [rows]: min(D_i, clip_nats) times min(p_t / p_s, 1) of the token in x0."""
        if self.objective.clip_nats is not None:
            divergence = divergence.clamp_max(self.objective.clip_nats)
        if self.objective.importance_weight:
            divergence = divergence * self._trust(log_t, log_s, rows)
        return divergence

    def trusted(self, log_t: Tensor, log_s: Tensor, rows: slice) -> Tensor | None:
        """bool [rows]: a draw with probability min(p_t / p_s, 1) of the token in x0; None: all are."""
        return None if self.noise is None else self.noise[rows] < self._trust(log_t, log_s, rows)

    def _trust(self, log_t: Tensor, log_s: Tensor, rows: slice) -> Tensor:
        """min(p_t / p_s, 1) of the token in x0, float [rows], without gradient."""
        label = self.labels[rows, None]
        ratio = (log_t.gather(-1, label) - log_s.detach().gather(-1, label))[:, 0]
        return ratio.clamp_max(0.0).exp()

    def added(self, entropy: Tensor, agree: Tensor, coefficient: Tensor, rows: slice, pairs: slice) -> Tensor:
        """Sum of the sharpening and rank terms of a chunk.

        sharpening * sum_i c_i [argmax p_s = argmax p_t] H_i
        rank * sum_pairs c_pair max(0, H_earlier - H_later + rank_margin)
        """
        terms = self.objective.terms
        loss = terms.sharpening * (coefficient * agree * entropy).sum()
        if self.pairs is not None:
            earlier = entropy[self.pairs.earlier[pairs] - rows.start]
            later = entropy[self.pairs.later[pairs] - rows.start]
            gap = (earlier - later + terms.rank_margin).clamp_min(0.0)
            loss = loss + terms.rank * (self.pairs.coefficient[pairs] * gap).sum()
        return loss


def entropy_of(logits: Tensor) -> Tensor:
    """Nats, float [L], of softmax(logits [L, V])."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def misalignment(student: Tensor, teacher: Tensor, coefficient: Tensor) -> Tensor:
    """sum_i c_i (1 - cos(student_i, teacher_i)) of hidden states [L, d]."""
    wide = torch.promote_types(student.dtype, torch.float32)
    cosine = torch.nn.functional.cosine_similarity(student.to(wide), teacher.to(wide), dim=-1)
    return (coefficient * (1 - cosine)).sum()
