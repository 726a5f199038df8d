r"""The held-out KL: how far the student is from the original on prompts that are never trained on.

For each held-out prompt x0 is the original's greedy response. Every block of it is masked whole: x_t^b has the mask
token at all positions of the response in block b, and what is behind the response's end in its last block is masked
too. With p the original's next-token distribution and q the student's, both over the whole vocabulary,

    KL_i = sum_v p(v | x_{<i}) log [ p(v | x_{<i}) / q(v | x^{<b}, x_t^b) ]

at every token i of a response, its end token included; neither the prompt nor what is behind the response counts. The
offset of i is its place in its block of the grid, 1 to B. KL_o is the mean over all tokens at offset o, and the
held-out KL is the mean of KL_1 ... KL_B: that of a block masked whole. An offset at which no response has a token is
is left out. The held-out entropy is that of q, averaged in the same way.

The held-out acceptance says what verified decoding (actors/sampler/verification.py) would keep of the student's drafts
at temperature 0, were the original the verifier. The first token of a block is the verifier's own there, and all behind
it are drafted at once; a draft is kept where the token that q gives most is that of the response, at its position and
at all that are drafted before it in its block. The acceptance is the share of drafted tokens that are kept.

The original is read once: its final hidden states at the responses and its LM head are kept, in host memory. This is
less than its weights and saves loading them for each evaluation. (Stored logits would take V / d times as much.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.evaluation.autoregressive import autoregressive_responses
from actors.evaluation.noised_blocks import (
    HEAD_ROWS,
    TOKEN_BUDGET,
    BlockState,
    NoisedRow,
    blocks_behind,
    noised_rows,
    scored_hidden_states,
)
from actors.sampler.request import Request
from actors.teacher.targets import TargetRequest
from actors.teacher.transformers_backend import causal_hidden_states
from common.kl import head_logits, kl_divergence
from common.padded_batches import padded_batches
from common.prompts import Prompt
from common.student import fitted_head, lm_head_weight

_ROWS = HEAD_ROWS // 4  # two distributions at once, and what the divergence makes of them


@dataclass(frozen=True)
class HeldOutSums:
    """For n prompts, by offset in blocks of B: the sums of KL and of the student's entropy, float64 [n, B], the
    response tokens and those of them that are accepted, int64 [n, B]; of the first offset none is drafted."""

    kl: np.ndarray
    entropy: np.ndarray
    tokens: np.ndarray
    accepted: np.ndarray

    @classmethod
    def zeros(cls, prompts: int, block_size: int) -> HeldOutSums:
        shape = prompts, block_size
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    def put(self, rows: Sequence[int] | slice, part: HeldOutSums) -> None:
        """Those of some of the prompts, in their places."""
        for name, column in vars(part).items():
            getattr(self, name)[rows] = column

    def metrics(self) -> dict[str, Any]:
        """For `summary.json`: `mean` and `by_offset` 1 to B in nats (None where there is no token), the mean `entropy`,
        the share `accepted`, of all drafts and by offset 2 to B, and of how many prompts and tokens. Prompts are added
        up in their order, so that it does not matter which process had which."""
        kl, entropy, tokens, kept = (column.sum(axis=0) for column in vars(self).values())
        measured = tokens > 0
        drafted = tokens[1:]
        return {
            "mean": float((kl[measured] / tokens[measured]).mean()),
            "entropy": float((entropy[measured] / tokens[measured]).mean()),
            "by_offset": [float(k / n) if n else None for k, n in zip(kl, tokens, strict=True)],
            "accepted": float(kept.sum() / drafted.sum()) if drafted.any() else None,
            "accepted_by_offset": [float(k / n) if n else None for k, n in zip(kept[1:], drafted, strict=True)],
            "prompts": len(self.tokens),
            "tokens": int(tokens.sum()),
        }


def greedy_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[np.ndarray]:
    """The original's greedy response to each prompt, int32 with its end token, at most `max_new_tokens` long."""
    requests = [Request(p.ordinal, 0, p.ids, max_new_tokens, p.domain) for p in prompts]
    return [response.ids for response in autoregressive_responses(model, tokenizer, requests)]


class HeldOutTargets:
    """What the original predicts at every token of its responses to some prompts.

    Life cycle: constructed with the original, which may be freed then; `sums` any number of times:

        targets = HeldOutTargets(original, [(prompt_ids, response_ids)], rows=student.config.vocab_size)
        sums = targets.sums(student, block_size=4, mask_token_id=263)
        print(sums.kl.sum(0) / sums.tokens.sum(0))  # by offset
    """

    def __init__(
        self,
        original: PreTrainedModel,
        pairs: Sequence[tuple[np.ndarray, np.ndarray]],
        *,
        rows: int,
        tokens: int | None = None,
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        """`pairs` of prompt and response, int32; `rows` of the student's LM head; `tokens` as `counted_tokens` gives
        them: how many of the original's count where it has another number of rows."""
        self.pairs = [(prompt.astype(np.int64), response.astype(np.int64)) for prompt, response in pairs]
        self.tokens = tokens
        self.token_budget = token_budget
        head = lm_head_weight(original).detach()
        self.head = (head if tokens is None else fitted_head(head, tokens, rows)).cpu()
        self.hidden = self._read(original)

    @torch.inference_mode()
    def _read(self, original: PreTrainedModel) -> list[Tensor]:
        """For each pair, the final hidden states [response tokens, d] that predict the response, in host memory."""
        requests = [
            TargetRequest(np.concatenate(pair), len(pair[0]) + np.arange(len(pair[1]), dtype=np.int64))
            for pair in self.pairs
        ]
        found: dict[int, Tensor] = {}
        for group in padded_batches([len(r.ids) for r in requests], self.token_budget):
            states = causal_hidden_states(original, [requests[i] for i in group])
            found |= {i: hidden.cpu() for i, hidden in zip(group, states, strict=True)}
        return [found[i] for i in range(len(requests))]

    @torch.inference_mode()
    def sums(self, student: PreTrainedModel, *, block_size: int, mask_token_id: int) -> HeldOutSums:
        """The student's KL with every block masked whole."""
        sums = HeldOutSums.zeros(len(self.pairs), block_size)
        rows: list[NoisedRow[BlockState]] = []
        for index, (prompt, response) in enumerate(self.pairs):
            x = np.concatenate([prompt, response])
            states = [
                (block, BlockState(np.ones(n, dtype=bool)))
                for block, n in blocks_behind(len(prompt), len(x), block_size)
            ]
            rows += noised_rows(
                index,
                x,
                len(prompt),
                states,
                block_size=block_size,
                mask_token_id=mask_token_id,
                token_budget=self.token_budget,
            )
        head = self.head.to(lm_head_weight(student).device)
        for group in padded_batches([len(row.ids) for row in rows], self.token_budget):
            chosen = [rows[i] for i in group]
            position = np.concatenate([row.position[row.at] for row in chosen])
            at = np.repeat([row.index for row in chosen], [len(row.at) for row in chosen]), position % block_size
            kl, entropy, agrees = self._measured(student, chosen, head, mask_token_id)
            np.add.at(sums.kl, at, kl)
            np.add.at(sums.entropy, at, entropy)
            np.add.at(sums.tokens, at, 1)
            np.add.at(sums.accepted, at, _accepted(agrees > 0, *at, position // block_size))
        return sums

    def _measured(
        self, student: PreTrainedModel, rows: list[NoisedRow[BlockState]], head: Tensor, mask_token_id: int
    ) -> np.ndarray:
        """KL and entropy, nats, and whether the student's best token is the response's, float64 [3, K], at the scored
        positions; logits of _ROWS of them exist at a time."""
        hidden = scored_hidden_states(student, rows)
        teacher = torch.cat(
            [self.hidden[row.index][row.position[row.at] - len(self.pairs[row.index][0])] for row in rows]
        )
        written = torch.from_numpy(np.concatenate([row.tokens for row in rows])).to(hidden.device)
        parts = []
        chunks = (x.split(_ROWS) for x in (hidden, teacher, written))
        for of_student, of_teacher, token in zip(*chunks, strict=True):
            log_t = head_logits(of_teacher.to(head.device), head, self.tokens).log_softmax(-1)
            log_s = head_logits(of_student, lm_head_weight(student)).log_softmax(-1)
            entropy = -(log_s.exp() * log_s).sum(-1)
            kl = kl_divergence(log_t, log_s)
            log_s[:, mask_token_id] = -torch.inf  # no draft is a mask
            agrees = log_s.argmax(-1) == token
            parts.append(torch.stack([kl, entropy, agrees.to(kl.dtype)]).double().cpu())
        return torch.cat(parts, dim=1).numpy()


def _accepted(agrees: np.ndarray, index: np.ndarray, offset: np.ndarray, block: np.ndarray) -> np.ndarray:
    """bool [K]: drafts that are kept, of positions at an `offset` in a `block` of sequence `index`; blocks are runs."""
    drafted = offset > 0
    begins = np.append(True, (index[1:] != index[:-1]) | (block[1:] != block[:-1]))
    wrong = drafted & ~agrees
    until = np.cumsum(wrong)
    before = np.maximum.accumulate(np.where(begins, until - wrong, 0))
    return drafted & (until == before)
