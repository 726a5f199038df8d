"""Unmasking rules: which masked positions of a block are revealed in this step.

All rules work on whole batches, and the host never waits for the device. Of equal positions the leftmost comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.sampler.pass_plan import placed
from actors.sampler.sampling import Candidates
from actors.sampler.slots import SlotState
from common.config.unmasking import (
    AdaptiveUnmasking,
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    SpeculativeUnmasking,
    StaticUnmasking,
    Unmasking,
)


def tokens_revealed(rule: Unmasking, block_size: int) -> tuple[int, bool]:
    """The least number of tokens that a step reveals in a block (or all that are left); whether it is never more."""
    if isinstance(rule, StaticUnmasking):
        return block_size // (rule.steps_per_block or block_size), True
    if isinstance(rule, SequentialUnmasking):
        return rule.tokens_per_step, True
    if isinstance(rule, DynamicUnmasking):
        return rule.min_tokens, False
    if isinstance(rule, SpeculativeUnmasking) and rule.draft_rounds == 1:
        return block_size, False
    return 1, False


def without_threshold(rule: Unmasking) -> tuple[Unmasking, float]:
    """The rule with threshold 0, and its threshold (0 for rules without one): the same graphs serve every threshold."""
    if isinstance(rule, DynamicUnmasking | SpeculativeUnmasking):
        return rule.model_copy(update={"threshold": 0.0}), rule.threshold
    return rule, 0.0


def revision(rule: Unmasking) -> float:
    """The probability above which another token replaces a revealed one; 0: never."""
    return rule.revise if isinstance(rule, DynamicUnmasking) else 0.0


def revised(rule: Unmasking, revealed: Tensor, differs: Tensor, confidence: Tensor) -> Tensor:
    """Revealed positions that take their candidate, bool [S, B]: it `differs` from the token there, bool [S, B], and is
    more probable than the rule asks for. `revealed` and `confidence` as in `choose`."""
    return ~revealed.isnan() & differs & (confidence > revision(rule))


def choose(
    rule: Unmasking,
    masked: Tensor,
    confidence: Tensor,
    entropy: Tensor,
    revealed: Tensor,
    threshold: Tensor | None = None,
) -> Tensor:
    """Positions to reveal, bool [S, B]: a subset of `masked`, at least one position of every block that has any.

    Args:
        masked: bool [S, B].
        confidence: float [S, B], probability of the candidate under the raw softmax.
        entropy: float [S, B], nats, of the raw softmax.
        revealed: float [S, B], the confidence of what earlier rounds of the block have revealed, NaN elsewhere.
        threshold: float32 [S, 1], used in place of the rule's own.
    """
    if isinstance(rule, StaticUnmasking):
        return _most(confidence, masked, tokens_revealed(rule, masked.shape[1])[0])
    if isinstance(rule, DynamicUnmasking):
        sure = confidence > (rule.threshold if threshold is None else threshold)
        return (masked & sure) | _most(confidence, masked, rule.min_tokens)
    if isinstance(rule, SequentialUnmasking):
        return masked & (masked.cumsum(dim=1) <= rule.tokens_per_step)
    if isinstance(rule, EntropyBoundUnmasking):
        return _under_entropy_bound(entropy, masked, rule.bound_nats)
    if isinstance(rule, AdaptiveUnmasking):
        sure = confidence >= _adaptive_threshold(rule, masked, confidence, revealed)
        return (masked & sure) | _most(confidence, masked, 1)
    raise TypeError(f"unknown unmasking rule {rule!r}")


def unmask(
    state: SlotState,
    rules: tuple[Unmasking, ...],
    slots: Tensor,
    sampled: Tensor,
    candidates: Candidates,
    waits: Tensor,
    end_tokens: Tensor,
    which: Tensor | None = None,
) -> Tensor:
    """Reveal the candidates that the rule of each slot, with its threshold, chooses; `sampled` and `waits` as in
    PassPlan. `which` int64 [R] says which of the rules is a slot's, where there are several. Returns what
    `SlotState.reveal` returns."""
    masked = state.masked[slots]
    token, confidence, entropy = (placed(x, sampled, *masked.shape) for x in candidates)
    revealed, threshold = state.revealed_confidence(slots), state.threshold[slots, None]

    def changed(rule: Unmasking) -> Tensor:
        chosen = choose(rule, masked, confidence, entropy, revealed, threshold)
        if not revision(rule):
            return chosen
        return chosen | revised(rule, revealed, token != state.present_ids(slots), confidence)

    reveal = changed(rules[0])
    if which is not None:
        for number, rule in enumerate(rules[1:], start=1):
            reveal = torch.where(which[:, None] == number, changed(rule), reveal)
    return state.reveal(slots, reveal, token, confidence, waits, end_tokens)


def _adaptive_threshold(rule: AdaptiveUnmasking, masked: Tensor, confidence: Tensor, revealed: Tensor) -> Tensor:
    """float [S, 1] (arXiv 2602.09555, and its code for the first round)."""
    highest = confidence.masked_fill(~masked, 0.0).amax(dim=1, keepdim=True)
    mean = revealed.nanmean(dim=1, keepdim=True)
    return torch.where(mean.isnan(), highest, mean).clamp(rule.lower, rule.upper)


def _most(score: Tensor, masked: Tensor, count: int) -> Tensor:
    return masked & (_rank(score.masked_fill(~masked, -torch.inf)) < count)


def _rank(score: Tensor) -> Tensor:
    """0 for the highest score of each row, 1 for the next, ..."""
    column = torch.arange(score.shape[1], device=score.device)
    other, own = score[:, None, :], score[:, :, None]
    return ((other > own) | ((other == own) & (column < column[:, None]))).sum(dim=2)


def _under_entropy_bound(entropy: Tensor, masked: Tensor, bound: float) -> Tensor:
    entropy = entropy.masked_fill(~masked, torch.inf)
    ordered, order = torch.sort(entropy, dim=1, stable=True)
    chosen = ordered.cumsum(dim=1) <= bound
    chosen[:, 0] = True
    return masked & torch.zeros_like(masked).scatter(1, order, chosen)
