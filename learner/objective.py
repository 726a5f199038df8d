"""The objective: divergence of the student from the teacher at masked positions, without a [positions, V] tensor alive.

Both distributions are first written as log-probabilities over the same classes: the whole vocabulary (target
`hidden`), the teacher's top-k with or without a class for all other tokens (target `topk`), or the label and all other
tokens (hard labels). One function then computes every divergence over classes. The LM head and the divergence run in
chunks of positions; each chunk's gradient is taken at once, so that memory does not grow with the number of positions
times the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from common.config.objective import AS_IT_IS, Divergence, ForwardKL, JensenShannon, MixedKL, ReverseKL, TeacherTarget
from common.reshaping import reshape
from common.student import full_precision_logits
from learner.terms import LogitTerms, entropy_of

_LOG_FLOOR = -60.0  # log-probabilities of classes are clamped here, so that 0 * log 0 is 0


@dataclass(frozen=True, kw_only=True)
class TopKTarget:
    """ids int64 [L, K], log-probabilities float32 [L, K], log of the remaining mass float32 [L]."""

    ids: Tensor
    logprobs: Tensor
    log_tail_mass: Tensor
    tail: str

    def __getitem__(self, rows: slice) -> TopKTarget:
        return replace(self, ids=self.ids[rows], logprobs=self.logprobs[rows], log_tail_mass=self.log_tail_mass[rows])

    def classes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probabilities over the shared classes, float32 [L, K] or [L, K + 1]."""
        student = logits.gather(-1, self.ids)
        if self.tail == "renorm":
            return self.logprobs.log_softmax(-1), student.log_softmax(-1)
        log_z = logits.logsumexp(-1, keepdim=True)
        if self.tail == "drop":
            return self.logprobs, student - log_z
        tail_mass = logits.scatter(-1, self.ids, -math.inf).logsumexp(-1, keepdim=True)
        teacher = torch.cat([self.logprobs, self.log_tail_mass[:, None]], dim=-1).log_softmax(-1)
        return teacher, torch.cat([student, tail_mass], dim=-1) - log_z

    def agree(self, log_t: Tensor, log_s: Tensor, logits: Tensor) -> Tensor:
        """bool [L]: both have the same most likely class."""
        return log_t.argmax(-1) == log_s.argmax(-1)


@dataclass(frozen=True)
class HiddenTarget:
    """The teacher's final hidden states [L, d] and its LM head [V, d]: exact full-vocabulary distributions.

    `shape` is applied to them; a truncated one gives cut tokens probability 0.
    """

    hidden: Tensor
    head: Tensor
    shape: TeacherTarget = AS_IT_IS

    def __getitem__(self, rows: slice) -> HiddenTarget:
        return replace(self, hidden=self.hidden[rows])

    def classes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probabilities, float32 [L, V]."""
        teacher = full_precision_logits(self.hidden.to(self.head.dtype), self.head)
        teacher = reshape(teacher, self.shape) if self.shape.reshapes else teacher.log_softmax(-1)
        return teacher, logits.log_softmax(-1)

    def agree(self, log_t: Tensor, log_s: Tensor, logits: Tensor) -> Tensor:
        """bool [L]: both have the same most likely token."""
        return log_t.argmax(-1) == log_s.argmax(-1)


@dataclass(frozen=True)
class LabelTarget:
    """Hard labels, int64 [L]: all probability on one token, so that two classes, it and all others, lose nothing."""

    ids: Tensor

    def __getitem__(self, rows: slice) -> LabelTarget:
        return replace(self, ids=self.ids[rows])

    def classes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(label, student) log-probabilities, float32 [L, 2]; the forward KL of these is the cross-entropy."""
        ids = self.ids[:, None]
        others = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        student = torch.cat([logits.gather(-1, ids), others], dim=-1) - logits.logsumexp(-1, keepdim=True)
        return torch.tensor([0.0, -math.inf], dtype=logits.dtype, device=logits.device).expand_as(student), student

    def agree(self, log_t: Tensor, log_s: Tensor, logits: Tensor) -> Tensor:
        """bool [L]: the label is the student's most likely token."""
        return logits.argmax(-1) == self.ids


Target = TopKTarget | HiddenTarget | LabelTarget


def divergence(kind: Divergence, log_t: Tensor, log_s: Tensor) -> Tensor:
    """D between teacher and student per position, nats, float [L].

    Args:
        log_t, log_s: log-probabilities over the same classes [L, C]. For the `drop` form of top-k they do not sum
            to one, and the forward KL can then be negative.

    Formulas: forward KL(t||s); reverse KL(s||t); mixed (1-a) KL(t||s) + a KL(s||t); Jensen-Shannon
    a KL(t||m) + (1-a) KL(s||m), m = a t + (1-a) s.
    """
    if isinstance(kind, ForwardKL):
        return _kl(log_t, log_s)
    if isinstance(kind, ReverseKL):
        return _kl(log_s, log_t)
    if isinstance(kind, MixedKL):
        return (1 - kind.alpha) * _kl(log_t, log_s) + kind.alpha * _kl(log_s, log_t)
    if isinstance(kind, JensenShannon):
        log_m = torch.logaddexp(log_t + math.log(kind.alpha), log_s + math.log1p(-kind.alpha))
        return kind.alpha * _kl(log_t, log_m) + (1 - kind.alpha) * _kl(log_s, log_m)
    raise TypeError(f"unknown divergence {kind!r}")


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_p, log_q = log_p.clamp_min(_LOG_FLOOR), log_q.clamp_min(_LOG_FLOOR)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(kw_only=True)
class LossSums:
    """Sums over the positions of an update, for metrics: float64 scalars on the device.

    `loss` is the whole loss, `divergence` the sum of D alone, `agree` and `bad` are counts; `entropy` stays 0 where
    nothing asks for it. A list `per_position` gets every D.
    """

    loss: Tensor
    divergence: Tensor
    agree: Tensor
    bad: Tensor
    entropy: Tensor
    per_position: list[Tensor] | None = None

    def scalars(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "per_position"}


class ChunkedDivergence(torch.autograd.Function):
    """loss = sum_i c_i D_i with logits = hidden @ weight.T computed chunk by chunk; `terms` change D_i and add to it.

    The gradients with respect to `hidden` and `weight` are computed in the forward, chunk by chunk, and scaled in the
    backward: no chunk is computed twice, and the LM head need not be present in the backward (ZeRO-3 may have
    re-partitioned it).
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
        grad_weight = torch.zeros(weight.shape if need_grad else (0,), dtype=wide, device=weight.device)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        starts = range(0, len(hidden), chunk)
        spans = terms.spans(len(hidden), chunk) if terms else ((slice(s, s + chunk), slice(0, 0)) for s in starts)
        for rows, pairs in spans:
            logits = full_precision_logits(hidden[rows].detach(), weight.detach())
            with torch.enable_grad():
                leaf = logits.requires_grad_(need_grad)
                log_t, log_s = target[rows].classes(leaf)
                per_position = divergence(kind, log_t, log_s)
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
            (grad_weight * grad_loss).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
            None,
            None,
        )


def empty_sums(device: torch.device) -> LossSums:
    def zero() -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=device)

    return LossSums(loss=zero(), divergence=zero(), agree=zero(), bad=zero(), entropy=zero())


def _add(sums: LossSums, per_position: Tensor, loss: Tensor, logits: Tensor, agree: Tensor) -> None:
    if sums.per_position is not None:
        sums.per_position.append(per_position)
    sums.loss += loss.double()
    sums.divergence += per_position.double().sum()
    sums.agree += agree.double().sum()
    sums.bad += (~torch.isfinite(logits).all(-1) | ~torch.isfinite(per_position)).double().sum()
