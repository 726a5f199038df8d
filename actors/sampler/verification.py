"""Verified decoding: what is drafted by diffusion and kept where the student's own causal reading agrees.

A block is drafted from its masks, then fed again as clean tokens in a causal row, which is its commit as well. The
row's logits at j - 1 are the verifier's distribution p of the token at j, after the tokens that stand before it. The
drafted tokens are tested from left to right until the first that is rejected; the verifier's own token takes its place,
and what is drafted behind it is forgotten. When all are kept, the last logits give the first token of the next block,
which the same forward has drafted. So a block that is kept whole costs one forward, and after a rejection it is two:
the rest of the block is drafted anew, then verified.

With q the distribution that a draft x was drawn from, x is kept with probability min(1, p(x) / q(x)), else a token is
drawn from the normalised max(0, p - q): what is written is distributed as the verifier's own text (Leviathan et al.,
2023, arXiv 2211.17192). Draws of one round are independent given the state, so q is the product of their distributions.
In several rounds later draws depend on earlier ones; there drafts are the most likely tokens and q is 1 at x: x is kept
with p(x), and a rejected one is drawn from p without x. At temperature 0 both keep x where it is p's best token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.sampler.sampling import Candidates, Decoding, inverse_cdf, probabilities, sample_tokens
from actors.sampler.slots import SlotState
from actors.sampler.unmasking import choose
from common.config.unmasking import DynamicUnmasking, SpeculativeUnmasking, Unmasking
from common.seeds import uniform
from common.trajectory import Trajectory

# rounds of the random stream that no draft reaches: for keeping a draft, and for the verifier's own token
KEEP_ROUND, OWN_ROUND = 2**20, 2**20 + 1


class Verdicts(NamedTuple):
    """Of C blocks that are verified: column j says it of the token at offset j + 1, the last one of the next block's
    first token."""

    tokens: Tensor  # int64 [C, B], the verifier's own, should the draft be rejected
    confidence: Tensor  # float32 [C, B], their probability under the raw softmax
    keeps: Tensor  # bool [C, B], whether the draft is kept if it is tested


def drafting(decoding: Decoding) -> Decoding:
    """How drafts are sampled: drawn like the text in one round, greedily in several."""
    rounds = rule_of(decoding.unmasking).draft_rounds
    return decoding if rounds == 1 else replace(decoding, temperature=0.0, top_k=0, top_p=1.0)


def needs_draft_distributions(decoding: Decoding) -> bool:
    """Whether drafts are verified against the distributions that they were drawn from."""
    return decoding.temperature > 0 and rule_of(decoding.unmasking).draft_rounds == 1


def rule_of(unmasking: Unmasking) -> SpeculativeUnmasking:
    assert isinstance(unmasking, SpeculativeUnmasking)
    return unmasking


def kept_probability(p: Tensor, q: Tensor, drafts: Tensor) -> Tensor:
    """min(1, p(x) / q(x)) of the drafts x, int64 [...], which have q(x) > 0; p and q [..., V]."""
    at = drafts[..., None]
    return (p.gather(-1, at) / q.gather(-1, at)).clamp(max=1)[..., 0]


def own_distribution(p: Tensor, q: Tensor) -> Tensor:
    """What the token in place of a rejected draft is drawn from, [..., V]: max(0, p - q), normalised; q of zeros, where
    nothing was drafted, gives p."""
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)  # p = q rejects nothing, but for rounding


def verdicts(
    logits: Tensor,
    drafts: Tensor,
    draft_logits: Tensor | None,
    tested: Tensor,
    noise: tuple[Tensor, Tensor],
    decoding: Decoding,
    mask_token_id: int,
    token_count: int | None,
) -> Verdicts:
    """Verify C blocks; columns as in Verdicts, where `drafts` and what is of them has no meaning in the last one.

    Args:
        logits: float32 [C, B, V] of the causal reading.
        drafts: int64 [C, B]; draft_logits: float32 [C, B, V] that they were drawn from, None: they are greedy.
        tested: bool [C, B], where a draft is tested; elsewhere the verifier's token is drawn from p.
        noise: two of float32 [C, B] in (0, 1), for keeping and for the verifier's own tokens.
    """
    keep_noise, own_noise = noise
    if decoding.temperature == 0:
        own = sample_tokens(logits.contiguous(), own_noise, decoding, mask_token_id, token_count)
        return Verdicts(own.tokens, own.confidence, own.tokens == drafts)
    p = probabilities(logits, decoding, mask_token_id, token_count)
    if draft_logits is None:
        q = torch.nn.functional.one_hot(drafts, logits.shape[-1]).to(p.dtype)
    else:
        q = probabilities(draft_logits, decoding, mask_token_id, token_count)
    keeps = tested & (keep_noise < kept_probability(p, q, drafts))
    tokens = inverse_cdf(own_distribution(p, q * tested[..., None]), own_noise)
    confidence = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return Verdicts(tokens, confidence, keeps)


def verification_noise(state: SlotState, slots: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The uniform numbers float32 [C, B] for `verdicts` of the `blocks` of `slots`, int64 [C] each."""
    position = blocks[:, None] * state.block_size + 1 + torch.arange(state.block_size, device=slots.device)
    keys = state.key[slots, None]
    keep, own = (torch.full_like(position, number) for number in (KEEP_ROUND, OWN_ROUND))
    return uniform(keys, position, keep), uniform(keys, position, own)


def speculate(
    state: SlotState,
    rule: SpeculativeUnmasking,
    slots: Tensor,
    drafts: Candidates,
    found: Verdicts,
    waits: Tensor,
    end_tokens: Tensor,
    mask_token_id: int,
) -> Tensor:
    """The end of a pass over `slots` int64 [R]: keep what is verified of the blocks that were committed, and what is
    drafted of the present ones.

    A block whose draft is complete is uncommitted, as one that other rules have finished; when a token of it is
    rejected the slot goes back to it.

    Args:
        drafts: [R, B], zeros at positions that are not masked.
        found: [R, B]; zeros for slots that commit nothing.
        waits: bool [R], slots for which the pass had no room: they stay as they are.

    Returns:
        What `SlotState.reveal` returns.
    """
    size = state.block_size
    column = torch.arange(size, device=slots.device)
    at, block, kept = slots[:, None], state.block[slots], state.kept[slots]
    masked, rounds = state.masked[slots], state.round[slots]
    verifying = state.uncommitted[slots] & ~waits

    # the block that was committed: its first token was known before, so offset j is judged in column j - 1
    before = (block - verifying.long())[:, None] * size + column
    keeps, own = (torch.cat([x[:, :1], x[:, :-1]], dim=1) for x in (found.keeps, found.tokens))
    confidence = torch.cat([found.confidence[:, :1], found.confidence[:, :-1]], dim=1)
    wrong = verifying[:, None] & (column >= kept[:, None]) & ~keeps
    rejected = wrong.any(dim=1)
    first = torch.where(rejected, wrong.int().argmax(dim=1), size)  # the first that is rejected, or B
    ids = state.ids[at, before]
    tested = verifying[:, None] & (column >= kept[:, None]) & (column <= first[:, None])
    state.drafts[at, before] = torch.where(tested, ids, state.drafts[at, before])
    correct = verifying[:, None] & (column == first[:, None])
    ids = torch.where(correct, own, ids)
    state.confidence[at, before] = torch.where(correct, confidence, state.confidence[at, before])
    known = torch.where(rejected, first + 1, size)
    in_response = before >= state.prompt_length[slots, None]
    verified = verifying[:, None] & (column < known[:, None]) & in_response
    has_end = (verified & (ids[..., None] == end_tokens).any(dim=2)).any(dim=1)
    limit = state.limit[slots]  # no more than that is asked for
    ended_before = verifying & (has_end | (before[:, 0] + known >= limit))
    back = rejected & (known < size) & ~ended_before
    again = rejected & (known == size) & ~ended_before  # all of it is known, but what is cached of it is not
    passed = verifying & ~rejected & ~ended_before
    state.ids[at, before] = torch.where(back[:, None] & (column > first[:, None]), mask_token_id, ids)

    # the present block: its draft counts unless the block before was not kept
    current = block[:, None] * size + column
    drafted = (passed | ~verifying) & ~waits & masked.any(dim=1)
    bonus = passed[:, None] & (column == 0)
    left = masked & ~bonus
    if rule.draft_rounds == 1:
        reveal = left
    else:
        last = (state.draft_round[slots] >= rule.draft_rounds - 1)[:, None]
        level = state.threshold[slots, None]
        sure = choose(DynamicUnmasking(), left, drafts.confidence, drafts.entropy, drafts.entropy, level)
        reveal = torch.where(last, left, sure)
    first_token = found.tokens[:, -1:]
    bonus_end = passed & ((first_token == end_tokens).any(dim=1) | (current[:, 0] + 1 >= limit))
    reveal = (reveal | (left & bonus_end[:, None])) & drafted[:, None]
    state.ids[at, current] = torch.where(bonus, first_token, torch.where(reveal, drafts.tokens, state.ids[at, current]))
    state.confidence[at, current] = torch.where(
        bonus, found.confidence[:, -1:], torch.where(reveal, drafts.confidence, state.confidence[at, current])
    )
    numbers = rounds[:, None].to(torch.int16)
    state.reveal_round[at, current] = torch.where(bonus | reveal, numbers, state.reveal_round[at, current])
    left = left & ~reveal

    complete = drafted & ~left.any(dim=1) & ~bonus_end
    partial = drafted & left.any(dim=1)
    ended = ended_before | bonus_end
    idle = ~masked.any(dim=1) & ~state.uncommitted[slots]
    fresh = (complete | again)[:, None]
    masked = torch.where(partial[:, None], left, masked)
    masked = torch.where(back[:, None], column > first[:, None], masked | fresh) & ~ended[:, None]
    kept = torch.where(verifying, torch.where(passed, 1, known), kept)
    block_rounds = state.block_rounds[slots]
    state.block_rounds[slots] = torch.where(complete, rounds, block_rounds)
    state.round[slots] = torch.where(
        back, block_rounds + 1, torch.where(complete | again | ended, 0, torch.where(partial, rounds + 1, rounds))
    )
    state.draft_round[slots] = torch.where(partial, state.draft_round[slots] + 1, state.draft_round[slots] * waits)
    state.kept[slots] = kept
    state.masked[slots] = masked
    uncommitted = torch.where(waits, state.uncommitted[slots], complete | again)
    state.uncommitted[slots] = uncommitted
    moved = complete.long() - (back | ended_before).long()
    state.block[slots] = block + moved
    written = (block + moved - uncommitted.long()) * size + kept
    finite = torch.isfinite(drafts.confidence).all(dim=1) & torch.isfinite(found.confidence).all(dim=1)
    over = ended | idle
    return torch.stack([moved, over, ~finite, masked.sum(dim=1), waits, uncommitted, written]).int()


def acceptance(trajectories: Iterable[Trajectory], block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """By offset in the block, int64 [B] each: drafts that were kept, and drafts that were tested. The first token of a
    block is the verifier's own, and a draft behind a rejected one is not tested."""
    kept, tested = np.zeros(block_size, np.int64), np.zeros(block_size, np.int64)
    for t in trajectories:
        drafts = t.draft_ids[: len(t.response_ids)]
        offset = (len(t.prompt_ids) + np.arange(len(drafts))) % block_size
        np.add.at(tested, offset, drafts >= 0)
        np.add.at(kept, offset, drafts == t.response_ids)
    return kept, tested
