"""Plain autoregressive decoding with the sampler's cache, kernels, CUDA graphs and continuous batching.

It is verified decoding with blocks of one token, in which all that is written is the verifier's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.sampler.cache import CacheRows
from actors.sampler.device_pass import DevicePass
from actors.sampler.pass_plan import by_slot
from actors.sampler.request import Request
from actors.sampler.request_queue import More
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Candidates, Decoding
from actors.sampler.slots import SlotState
from actors.sampler.verification import Verdicts, rule_of, speculate, verdicts, verification_noise
from common.config.unmasking import SpeculativeUnmasking
from common.trajectory import EndTokens, Trajectory


class AutoregressivePass(DevicePass):
    """One forward of the last token of every sequence; the rows of masks are left out of it."""

    def __call__(
        self, state: SlotState, decodings: tuple[Decoding, ...], slots: Tensor, commits: int, tokens: int
    ) -> Tensor:
        if len(decodings) > 1:
            raise ValueError("requests that are decoded token by token together need equal decoding settings")
        (decoding,) = decodings
        count, commits, device = len(slots), max(commits, 1), slots.device
        work = self._plan(state, slots, commits, tokens, False)
        causal = torch.ones(commits, dtype=torch.bool, device=device)
        alone = torch.full((commits,), -1, device=device)
        rows = CacheRows(work.rows[count:], work.positions[count:], 1, alone, causal)
        every = torch.arange(commits, device=device)
        logits = self.model.logits(self.model.decode(work.ids[count:], work.positions[count:], rows, every, None))
        done = slots[work.done.clamp(max=count - 1)]  # of padding, any
        untested = torch.zeros(commits, 1, dtype=torch.bool, device=device)
        noise = verification_noise(state, done, state.block[done] - 1)
        found = verdicts(
            logits[:, None], untested.long(), None, untested, noise, decoding, self.mask_token_id, self.token_count
        )
        found = Verdicts(*(by_slot(x, work.done, count) for x in found))
        nothing = torch.zeros(count, 1, device=device)
        drafts = Candidates(nothing.long(), nothing, nothing)
        rule = rule_of(decoding.unmasking)
        return speculate(state, rule, slots, drafts, found, work.waits, self._end_tokens, self.mask_token_id)


class AutoregressiveSampler(Sampler):
    """A causal LM's own text, one token a sequence and pass. A response depends on the weights, its request, `seed` and
    the temperature, not on what runs beside it (but for floating-point rounding).

    Constructed on any causal LM of a supported family, which need not be converted: it has no mask token, and
    `never_written` may name a token that is left out as a student's mask is. Decoding is what `token_by_token` gives:

        model, tokenizer = load_autoregressive("runs/arlm", "cpu")
        sampler = AutoregressiveSampler(model, eos_token_id=tokenizer.eos_token_id, slots=8, seed=0)
        for trajectory in sampler.generate([Request(0, 0, prompt_ids, 64)], token_by_token(temperature=0.0)):
            print(tokenizer.decode(trajectory.response_ids))
    """

    pass_class = AutoregressivePass

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_id: EndTokens,
        token_count: int | None = None,
        never_written: int | None = None,
        slots: int,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        longest: int = 0,
        cuda_graphs: bool = True,
        compiled: bool = True,
    ) -> None:
        model.config.attention_context = "causal"
        mask = model.config.vocab_size if never_written is None else never_written  # no token has the first id
        super().__init__(
            model,
            block_size=1,
            mask_token_id=mask,
            eos_token_id=eos_token_id,
            token_count=token_count,
            slots=slots,
            seed=seed,
            tokenizer=tokenizer,
            longest=longest,
            cuda_graphs=cuda_graphs,
            compiled=compiled,
        )

    def passes(
        self, requests: Iterable[Request], decoding: Decoding, more: More | None = None, longest: int = 0
    ) -> Iterator[list[Trajectory]]:
        """As of any sampler; what commits a token gives the next one, so no token costs a forward beside its own."""
        for ended in super().passes(requests, decoding, more, longest):
            self.token_rows -= sum(t.commit_forwards for t in ended)
            yield [replace(t, commit_forwards=0) for t in ended]


def token_by_token(temperature: float, top_p: float = 1.0) -> Decoding:
    return Decoding(SpeculativeUnmasking(), temperature, top_p=top_p)
