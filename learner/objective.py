"""The objective: divergence of the student from the teacher at masked positions.

Both distributions are first written as log-probabilities over the same classes: the whole vocabulary (target
`hidden`), the teacher's top-k with or without a class for all other tokens (target `topk`), or the label and all other
tokens (hard labels). One function then computes every divergence over classes.

The LM head is applied at masked positions only, in chunks, and each chunk's gradient is computed before the next one.
Logits of all positions were left out: 16,384 of them with 151,936 tokens take 10 GB in float32, and the teacher's as
much again. Fused kernels, such as Liger's, were left out too: each computes one fixed loss, while here every target,
divergence and term is a few lines of plain PyTorch, which a test compares with its formula.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config.divergences import Divergence, ForwardKL, ForwardKLOutliers, JensenShannon, MixedKL, ReverseKL
from common.config.objective import ObjectiveConfig
from common.config.targets import AS_IT_IS, TeacherTarget
from common.kl import head_logits, kl_divergence
from common.reshaping import reshape
from common.student import full_precision_logits
from learner.terms import LogitTerms, entropy_of


class Target(ABC):
    """What the student is compared with at L positions; `target[rows]` is that of some of them."""

    @abstractmethod
    def __getitem__(self, rows: slice) -> Target: ...

    @abstractmethod
    def classes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probabilities over the same C classes, float [L, C], from the student's [L, V]."""

    def agree(self, log_t: Tensor, log_s: Tensor, logits: Tensor) -> Tensor:
        """bool [L]: teacher and student have the same most likely class."""
        return log_t.argmax(-1) == log_s.argmax(-1)


@dataclass(frozen=True, kw_only=True)
class TopKTarget(Target):
    """The teacher's K most likely tokens: ids int64 [L, K], log-probabilities float32 [L, K].

    `log_tail_mass` float32 [L] is the log of the mass of all other tokens; `tail` (objective.topk_tail) says what
    becomes of them.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail_mass: Tensor
    tail: str

    def __getitem__(self, rows: slice) -> TopKTarget:
        return replace(self, ids=self.ids[rows], logprobs=self.logprobs[rows], log_tail_mass=self.log_tail_mass[rows])

    def classes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """C is K, or K + 1 with a class for all other tokens."""
        student = logits.gather(-1, self.ids)
        if self.tail == "renorm":
            return self.logprobs.log_softmax(-1), student.log_softmax(-1)
        log_z = logits.logsumexp(-1, keepdim=True)
        if self.tail == "drop":
            return self.logprobs, student - log_z
        tail_mass = logits.scatter(-1, self.ids, -math.inf).logsumexp(-1, keepdim=True)
        teacher = torch.cat([self.logprobs, self.log_tail_mass[:, None]], dim=-1).log_softmax(-1)
        return teacher, torch.cat([student, tail_mass], dim=-1) - log_z


@dataclass(frozen=True)
class HiddenTarget(Target):
    """The teacher's final hidden states [L, d] and its LM head [V, d]: its exact distribution, reshaped by `shape`.

    Where `tokens` is given, only the head's first rows count; all further classes have no probability.
    """

    hidden: Tensor
    head: Tensor
    shape: TeacherTarget = AS_IT_IS
    tokens: int | None = None

    def __getitem__(self, rows: slice) -> HiddenTarget:
        return replace(self, hidden=self.hidden[rows])

    def logprobs(self) -> Tensor:
        """Of the teacher, float [L, V]."""
        teacher = head_logits(self.hidden, self.head, self.tokens)
        return reshape(teacher, self.shape) if self.shape.reshapes else teacher.log_softmax(-1)

    def classes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """C is V."""
        return self.logprobs(), logits.log_softmax(-1)


@dataclass(frozen=True)
class CleanStream:
    """Targets of the forward under way, whose clean tokens the original reads: gated adapters leave these alone, and
    context-causal attention shows them what stands before them.

    `index` int64 [L] points at the clean token before each position, among the R*W tokens; `shape` and `tokens` as in
    HiddenTarget.
    """

    index: Tensor
    shape: TeacherTarget = AS_IT_IS
    tokens: int | None = None

    def of(self, hidden: Tensor, head: Tensor) -> HiddenTarget:
        """The targets, without gradient, from the student's final hidden states [R, W, d] and its LM head [V, d]."""
        states = hidden.detach().reshape(-1, hidden.shape[-1])[self.index]
        return HiddenTarget(states, head.detach(), self.shape, self.tokens)


@dataclass(frozen=True)
class SeveralTeachers(Target):
    """Positions of which each has one of several teachers, whose hidden states may differ in width.

    `parts`: for each teacher its positions, int64 [n] ascending, in host memory, and its targets there; together they
    are all positions.
    """

    parts: tuple[tuple[np.ndarray, HiddenTarget], ...]

    def __getitem__(self, rows: slice) -> SeveralTeachers:
        bounds = [(i, target, np.searchsorted(i, (rows.start, rows.stop))) for i, target in self.parts]
        return SeveralTeachers(tuple((i[a:b] - rows.start, target[a:b]) for i, target, (a, b) in bounds))

    @property
    def hidden(self) -> Tensor:
        """[L, d], of teachers of one width."""
        return self._in_order([target.hidden for _, target in self.parts])

    def classes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """C is V."""
        return self._in_order([target.logprobs() for _, target in self.parts]), logits.log_softmax(-1)

    def _in_order(self, values: list[Tensor]) -> Tensor:
        """The values [n, ...] of each part, position after position."""
        order = np.argsort(np.concatenate([index for index, _ in self.parts]))
        together = torch.cat(values)
        return together[torch.from_numpy(order).to(together.device)]


@dataclass(frozen=True)
class LabelTarget(Target):
    """Hard labels, int64 [L]: all probability on one token, so that two classes, it and all others, lose nothing."""

    ids: Tensor

    def __getitem__(self, rows: slice) -> LabelTarget:
        return replace(self, ids=self.ids[rows])

    def classes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """C is 2, the label and all other tokens; the forward KL of these is the cross-entropy."""
        ids = self.ids[:, None]
        others = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        student = torch.cat([logits.gather(-1, ids), others], dim=-1) - logits.logsumexp(-1, keepdim=True)
        return torch.tensor([0.0, -math.inf], dtype=logits.dtype, device=logits.device).expand_as(student), student

    def agree(self, log_t: Tensor, log_s: Tensor, logits: Tensor) -> Tensor:
        """bool [L]: the label is the student's most likely token."""
        return logits.argmax(-1) == self.ids


def divergence(kind: Divergence, log_t: Tensor, log_s: Tensor) -> Tensor:
    """D between teacher and student per position, nats, float [L].

    Args:
        log_t, log_s: log-probabilities over the same classes [L, C]. For the `drop` form of top-k they do not sum
            to one, and the forward KL can then be negative.

    Formulas: forward KL(t||s); reverse KL(s||t); mixed (1-a) KL(t||s) + a KL(s||t); Jensen-Shannon
    a KL(t||m) + (1-a) KL(s||m), m = a t + (1-a) s.
    """
    if isinstance(kind, ForwardKL):
        return kl_divergence(log_t, log_s)
    if isinstance(kind, ReverseKL):
        return kl_divergence(log_s, log_t)
    if isinstance(kind, MixedKL):
        return (1 - kind.alpha) * kl_divergence(log_t, log_s) + kind.alpha * kl_divergence(log_s, log_t)
    if isinstance(kind, JensenShannon):
        log_m = torch.logaddexp(log_t + math.log(kind.alpha), log_s + math.log1p(-kind.alpha))
        return kind.alpha * kl_divergence(log_t, log_m) + (1 - kind.alpha) * kl_divergence(log_s, log_m)
    raise TypeError(f"unknown divergence {kind!r}")


def of_outliers(objective: ObjectiveConfig, log_t: Tensor, log_s: Tensor) -> Tensor:
    """D of positions outside the trust region, float [L], from log-probabilities of the whole vocabulary [L, V]."""
    if not isinstance(objective.outliers, ForwardKLOutliers):
        return torch.zeros_like(log_s[:, 0])
    best = log_t.topk(min(objective.outliers.top_k, log_t.shape[-1] - 1), dim=-1)
    others = log_t.scatter(-1, best.indices, -math.inf).logsumexp(-1)
    target = TopKTarget(ids=best.indices, logprobs=best.values, log_tail_mass=others, tail=objective.topk_tail)
    return kl_divergence(*target.classes(log_s))


@dataclass(kw_only=True)
class LossSums:
    """Sums over the positions of an update, for metrics: float64 scalars on the device.

    `loss` is the whole loss, `divergence` the sum of D alone, `agree` and `bad` are counts; `entropy` and
    `trusted`, a count, stay 0 where nothing asks for them. A list `per_position` gets every D.
    """

    loss: Tensor
    divergence: Tensor
    agree: Tensor
    bad: Tensor
    entropy: Tensor
    trusted: Tensor
    per_position: list[Tensor] | None = None

    def scalars(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "per_position"}


class ChunkedDivergence(torch.autograd.Function):
    """loss = sum_i c_i D_i, with logits = hidden @ weight.T computed chunk by chunk; `terms` change D_i and add to it.

    The gradients of `hidden` [L, d] and `weight` [V, d] are computed in the forward and only scaled in the backward. So
    no chunk is computed twice, and the backward does not need the LM head, which ZeRO-3 may have partitioned again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Target,
        coefficient: Tensor,
        kind: Divergence,
        chunk: int,
        sums: LossSums,
        terms: LogitTerms | None = None,
    ) -> Tensor:
        need_grad = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.zeros_like(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros(weight.shape if weight.requires_grad else (0,), dtype=wide, device=weight.device)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        starts = range(0, len(hidden), chunk)
        spans = terms.spans(len(hidden), chunk) if terms else ((slice(s, s + chunk), slice(0, 0)) for s in starts)
        for rows, pairs in spans:
            logits = full_precision_logits(hidden[rows].detach(), weight.detach())
            with torch.enable_grad():
                leaf = logits.requires_grad_(need_grad)
                log_t, log_s = target[rows].classes(leaf)
                per_position = divergence(kind, log_t, log_s)
                trusted = terms.trusted(log_t, log_s, rows) if terms else None
                if terms and trusted is not None:
                    outside = of_outliers(terms.objective, log_t, log_s)
                    per_position = torch.where(trusted, per_position, outside)
                    sums.trusted += trusted.double().sum()
                agree = target[rows].agree(log_t, log_s.detach(), leaf.detach())
                counted = terms.counted(per_position, log_t, log_s, rows) if terms else per_position
                chunk_loss = (coefficient[rows] * counted).sum()
                if terms and terms.needs_entropy:
                    entropy = entropy_of(leaf)
                    chunk_loss = chunk_loss + terms.added(entropy, agree, coefficient[rows], rows, pairs)
                    sums.entropy += entropy.detach().double().sum()
            if need_grad:
                (grad_logits,) = torch.autograd.grad(chunk_loss, leaf)
                grad_logits = grad_logits.to(weight.dtype)
                grad_hidden[rows] = grad_logits @ weight.detach()
                if weight.requires_grad:
                    grad_weight += grad_logits.T @ hidden[rows].detach()
            loss += chunk_loss.detach()
            _add(sums, per_position.detach(), chunk_loss.detach(), logits.detach(), agree)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_loss,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype),
            (grad_weight * grad_loss).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def token_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, chunk: int) -> Tensor:
    """log p of the tokens `ids` int64 [L] from hidden states [L, d], float [L]; logits of `chunk` of them at a time."""
    parts = []
    for rows, labels in zip(hidden.split(chunk), ids.split(chunk), strict=True):
        logits = full_precision_logits(rows, weight)
        parts.append(logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)


def empty_sums(device: torch.device) -> LossSums:
    def zero() -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=device)

    return LossSums(loss=zero(), divergence=zero(), agree=zero(), bad=zero(), entropy=zero(), trusted=zero())


def _add(sums: LossSums, per_position: Tensor, loss: Tensor, logits: Tensor, agree: Tensor) -> None:
    if sums.per_position is not None:
        sums.per_position.append(per_position)
    sums.loss += loss.double()
    sums.divergence += per_position.double().sum()
    sums.agree += agree.double().sum()
    sums.bad += (~torch.isfinite(logits).all(-1) | ~torch.isfinite(per_position)).double().sum()
