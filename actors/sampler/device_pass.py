"""The device's part of a pass: one forward, sampling, and what the unmasking rule or the verifier makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.sampler.cache import CacheRows
from actors.sampler.cached_model import CachedModel
from actors.sampler.pass_plan import PassPlan, by_slot, placed, plan
from actors.sampler.sampling import Candidates, Decoding, sample_tokens
from actors.sampler.slots import SlotState
from actors.sampler.unmasking import revision, unmask
from actors.sampler.verification import (
    Verdicts,
    drafting,
    needs_draft_distributions,
    rule_of,
    speculate,
    verdicts,
    verification_noise,
)
from actors.sampler.verifier import Verifier
from common.config.unmasking import SpeculativeUnmasking
from common.trajectory import EndTokens


class DevicePass:
    """Changes the slots' state in place; the host never waits for it."""

    def __init__(
        self,
        model: CachedModel,
        mask_token_id: int,
        eos_token_id: EndTokens,
        token_count: int | None,
        compiled: bool,
        verifier: Verifier | None = None,
    ) -> None:
        self.model = model
        self.verifier = verifier
        self.mask_token_id = mask_token_id
        self.token_count = token_count
        self._end_tokens = torch.tensor(eos_token_id, device=model.device).reshape(-1)
        self._plan: Callable[..., Any] = plan
        self._unmask: Callable[..., Any] = unmask
        if compiled:
            self._plan, self._unmask = (torch.compile(part, dynamic=True) for part in (plan, unmask))

    def __call__(
        self, state: SlotState, decodings: tuple[Decoding, ...], slots: Tensor, commits: int, tokens: int
    ) -> Tensor:
        """The device's part of a pass over `slots` int64 [R]; the host does not wait. Returns what `SlotState.reveal`
        returns.

        There is room for the commits of `commits` blocks and for sampling at `tokens` masked positions. Slots that need
        more wait; room that nobody needs is padding.
        """
        revises = any(revision(d.unmasking) for d in decodings)
        work = self._plan(state, slots, commits, tokens, revises)
        causal = self.model.causal_from(len(slots), len(work.rows))
        cache_rows = CacheRows(work.rows, work.positions, state.block_size, work.partner, causal)
        wanted = work.sampled.clamp(max=len(slots) * state.block_size - 1)
        if isinstance(decodings[0].unmasking, SpeculativeUnmasking):
            return self._speculate(state, decodings, slots, work, cache_rows, wanted)
        masked = self.model.mask_positions(state, slots, len(work.rows))
        logits = self.model.logits(self.model.decode(work.ids, work.positions, cache_rows, wanted, masked))
        if len(decodings) == 1:
            (decoding,) = decodings
            candidates = sample_tokens(logits, work.noise, decoding, self.mask_token_id, self.token_count)
            unmask_pass, which = self._unmask, None
        else:
            which = _which(state, slots, decodings)
            candidates = self._sample_each(state, logits, work, decodings, which)
            unmask_pass = unmask
        rules = tuple(d.unmasking for d in decodings)
        return unmask_pass(state, rules, slots, work.sampled, candidates, work.waits, self._end_tokens, which)

    def _speculate(
        self,
        state: SlotState,
        decodings: tuple[Decoding, ...],
        slots: Tensor,
        work: PassPlan,
        cache_rows: CacheRows,
        wanted: Tensor,
    ) -> Tensor:
        """The rest of a pass in which what is committed is verified and what is masked is drafted; returns what
        `SlotState.reveal` returns."""
        rule = rule_of(decodings[0].unmasking)
        if any(d.unmasking != rule for d in decodings):
            raise ValueError(
                "requests of unmasking.rule 'speculative' that run together need equal draft_rounds, verify"
            )
        which = _which(state, slots, decodings) if len(decodings) > 1 else None
        size, count = state.block_size, len(slots)
        masked = self.model.mask_positions(state, slots, len(work.rows))
        asked = wanted
        if rule.verify == "self":  # its commit is the verification
            asked = torch.cat([wanted, torch.arange(count * size, len(work.rows) * size, device=slots.device)])
        hidden = self.model.decode(work.ids, work.positions, cache_rows, asked, masked)
        logits = self.model.logits(hidden)
        draft_logits, causal_logits = logits[: len(wanted)], logits[len(wanted) :].unflatten(0, (-1, size))
        if self.verifier and rule.verify == "base" and len(work.done):
            blocks = work.ids[count:], work.positions[count:], work.rows[count:]
            causal_logits = self.verifier.logits(*blocks, size, logits.shape[-1])
        if which is None:
            settings = drafting(decodings[0])
            drafts = sample_tokens(draft_logits, work.noise, settings, self.mask_token_id, self.token_count)
        else:
            drafts = self._sample_each(state, draft_logits, work, tuple(map(drafting, decodings)), which)
        drafts = Candidates(*(placed(x, work.sampled, count, size) for x in drafts))
        drawn = any(map(needs_draft_distributions, decodings))
        if drawn and state.draft_hidden is None:
            state.draft_hidden = hidden.new_zeros(len(state.block_host), size, hidden.shape[-1])
        found = self._verdicts(state, slots, work, causal_logits, decodings, which)
        if drawn and state.draft_hidden is not None:
            new = placed(hidden[: len(wanted)], work.sampled, count, size)
            drafted = (state.masked[slots] & ~work.waits[:, None])[..., None]
            state.draft_hidden[slots] = torch.where(drafted, new, state.draft_hidden[slots])
        return speculate(state, rule, slots, drafts, found, work.waits, self._end_tokens, self.mask_token_id)

    def _verdicts(
        self,
        state: SlotState,
        slots: Tensor,
        work: PassPlan,
        causal_logits: Tensor,
        decodings: tuple[Decoding, ...],
        which: Tensor | None,
    ) -> Verdicts:
        """Of the blocks that the pass commits, [R, B]: `causal_logits` float32 [commits, B, V] are of the verifier,
        `which` as in `unmask`; zeros for slots that commit nothing."""
        size, count = state.block_size, len(slots)
        there = work.done.clamp(max=count - 1)  # of padding, any
        done = slots[there]
        found = Verdicts(
            torch.zeros(len(done), size, dtype=torch.int64, device=slots.device),
            torch.zeros(len(done), size, device=slots.device),
            torch.zeros(len(done), size, dtype=torch.bool, device=slots.device),
        )
        column = torch.arange(size, device=slots.device)
        tested = (column + 1 >= state.kept[done, None]) & (column + 1 < size)
        drafts, noise = work.ids[count:].roll(-1, 1), verification_noise(state, done, state.block[done] - 1)
        for number, decoding in enumerate(decodings if len(done) else ()):
            at = slice(None) if which is None else (which[there] == number).nonzero()[:, 0]
            drawn_from = None
            if needs_draft_distributions(decoding) and state.draft_hidden is not None:
                drawn_from = self.model.logits(state.draft_hidden[done[at]]).roll(-1, 1)
            own = verdicts(
                causal_logits[at],
                drafts[at],
                drawn_from,
                tested[at],
                (noise[0][at], noise[1][at]),
                decoding,
                self.mask_token_id,
                self.token_count,
            )
            for whole, part in zip(found, own, strict=True):
                whole[at] = part
        return Verdicts(*(by_slot(x, work.done, count) for x in found))

    def _sample_each(
        self, state: SlotState, logits: Tensor, work: PassPlan, decodings: tuple[Decoding, ...], which: Tensor
    ) -> Candidates:
        """Candidates of a pass whose slots have several settings: each setting at its own positions."""
        of_row = torch.cat([which, which.new_tensor([-1])])  # the last one is padding's
        chosen = of_row[work.sampled // state.block_size]
        tokens, zeros = torch.zeros_like(work.sampled), torch.zeros_like(work.noise)
        candidates = Candidates(tokens, zeros, zeros.clone())
        for number, decoding in enumerate(decodings):
            at = (chosen == number).nonzero()[:, 0]
            own = sample_tokens(logits[at], work.noise[at], decoding, self.mask_token_id, self.token_count)
            for whole, part in zip(candidates, own, strict=True):
                whole[at] = part
        return candidates


def _which(state: SlotState, slots: Tensor, decodings: tuple[Decoding, ...]) -> Tensor:
    """int64 [R]: the place among `decodings` of that of each slot, int64 [R]; any for a slot that does not run."""
    place = {d: i for i, d in enumerate(decodings)}
    of_slot = [place.get(decoding, 0) if decoding else 0 for decoding in state.decodings]
    return torch.tensor(of_slot, device=slots.device)[slots]
