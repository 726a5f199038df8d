r"""Log-likelihood of a given continuation under a block-diffusion student.

With b running over the blocks of the absolute grid, log p(x) = sum_b log p(x^b | x^{<b}). Within a block the student
gives, for any set M of masked positions, p(x_i | x^{<b}, x^b_{known}) for each i in M; the mask token is left out of
the softmax, as in decoding. Let S be the n continuation positions of a block. The positions before S in the block
(the end of the context) are known in every state, and those behind the continuation are masked in every state.
The likelihood of a block depends on the order in which it is decoded, so there are two estimates:

`sequential`, exact for the decoder that reveals one token a step from left to right (rule `sequential`, T = 1):

    log p(x^b | x^{<b}) = sum_{j=1..n} log p(x_{s_j} | x^{<b}, x_{s_1} ... x_{s_{j-1}})

Its probabilities of all continuations of one length sum to 1. It takes n states of the block.

`bound`, for the decoder that reveals one token a step in a uniformly random order; by Jensen's inequality

    log E_sigma[prod_j p(x_{sigma_j} | x_{sigma_{<j}})]  >=  E_sigma[sum_j log p(x_{sigma_j} | x_{sigma_{<j}})]
        = sum_{M subset of S, M not empty}  1 / (|M| C(n, |M|))  sum_{i in M} log p(x_i | x_{S \ M})

The right side is the evidence bound of masked diffusion with its time integral solved (Ou et al., 2024,
arXiv 2406.03736). If there are at most `samples` masks, all 2^n - 1 are enumerated and the bound is exact: for n = 4
these are 15 states. Otherwise it is estimated without bias: |M| uniform on 1..n, M uniform of that size, n / |M| times
the sum, averaged over `samples` masks. These depend on the seed and the block's index only, so the options of one
question are compared under the same masks.

As in training, every state is a noised copy of its block behind the clean sequence, so one forward scores many states.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.evaluation.noised_blocks import (
    HEAD_ROWS,
    TOKEN_BUDGET,
    BlockState,
    NoisedRow,
    blocks_behind,
    noised_rows,
    scored_hidden_states,
)
from common.padded_batches import padded_batches
from common.student import full_precision_logits, lm_head_weight

Method = Literal["sequential", "bound"]


@dataclass(frozen=True)
class Estimate:
    """Which estimate of the likelihood; `samples` and `seed` are for the bound."""

    method: Method = "sequential"
    samples: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Likelihood:
    """`log_prob` in nats; `greedy`: left-to-right decoding at temperature 0 would give this continuation."""

    log_prob: float
    greedy: bool


@dataclass(frozen=True)
class WeightedState(BlockState):
    """A state with the float64 [n] weight of each position in the estimate, and the position that left-to-right
    decoding would reveal here (-1: none)."""

    weight: np.ndarray
    greedy_at: int = -1

    @property
    def scored(self) -> np.ndarray:
        return (self.weight > 0) | self.greedy

    @property
    def greedy(self) -> np.ndarray:
        """bool [n]: the position that left-to-right decoding would reveal."""
        return np.arange(len(self.weight)) == self.greedy_at


def block_states(n: int, block: int, estimate: Estimate) -> list[WeightedState]:
    """The states of a block with n continuation positions, with their weights in the estimate."""
    left_to_right = [np.arange(n) >= j for j in range(n)]
    if estimate.method == "sequential":
        return [WeightedState(masked, np.eye(n)[j], j) for j, masked in enumerate(left_to_right)]
    states = []
    if 2**n - 1 <= estimate.samples:
        for size in range(1, n + 1):
            for chosen in combinations(range(n), size):
                masked = np.isin(np.arange(n), chosen)
                states.append(WeightedState(masked, masked / (size * comb(n, size))))
    else:
        rng = np.random.default_rng([estimate.seed, block])
        for _ in range(estimate.samples):
            size = int(rng.integers(1, n + 1))
            masked = np.isin(np.arange(n), rng.permutation(n)[:size])
            states.append(WeightedState(masked, masked * (n / size / estimate.samples)))
    # these only serve the greedy flag
    return states + [WeightedState(masked, np.zeros(n), j) for j, masked in enumerate(left_to_right)]


def log_likelihoods(
    model: PreTrainedModel,
    pairs: list[tuple[list[int], list[int]]],
    *,
    block_size: int,
    mask_token_id: int,
    estimate: Estimate,
    token_budget: int = TOKEN_BUDGET,
) -> list[Likelihood]:
    """Score the continuation of every (context ids, continuation ids), in order.

    One forward has at most `token_budget` tokens, clean and noised, or one sequence with one noised block.
    """
    log_prob, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    rows: list[NoisedRow[WeightedState]] = []
    for index, (context, continuation) in enumerate(pairs):
        x = np.asarray([*context, *continuation], dtype=np.int64)
        blocks = blocks_behind(len(context), len(x), block_size) if continuation else []
        states = [(block, state) for block, n in blocks for state in block_states(n, block, estimate)]
        rows += noised_rows(
            index,
            x,
            len(context),
            states,
            block_size=block_size,
            mask_token_id=mask_token_id,
            token_budget=token_budget,
        )
    for group in padded_batches([len(row.ids) for row in rows], token_budget):
        _score(model, [rows[index] for index in group], mask_token_id, log_prob, greedy)
    return [Likelihood(float(p), bool(g)) for p, g in zip(log_prob, greedy, strict=True)]


@torch.inference_mode()
def _score(
    model: PreTrainedModel,
    rows: list[NoisedRow[WeightedState]],
    mask_token_id: int,
    log_prob: np.ndarray,
    greedy: np.ndarray,
) -> None:
    """One forward; adds its scores to `log_prob` [pairs] and `greedy` [pairs]."""
    hidden = scored_hidden_states(model, rows)
    target = torch.from_numpy(np.concatenate([r.tokens for r in rows])).to(hidden.device)
    log_p, best = [], []
    for first in range(0, len(hidden), HEAD_ROWS):
        part = slice(first, first + HEAD_ROWS)
        logits = full_precision_logits(hidden[part], lm_head_weight(model))
        logits[:, mask_token_id] = -torch.inf
        log_p.append(torch.log_softmax(logits, dim=-1).gather(1, target[part, None])[:, 0])
        best.append(logits.argmax(dim=-1) == target[part])
    scored, right = torch.cat(log_p).double().cpu().numpy(), torch.cat(best).cpu().numpy()
    index = np.repeat([r.index for r in rows], [len(r.at) for r in rows])
    states = [state for row in rows for state in row.states]
    np.add.at(log_prob, index, scored * np.concatenate([s.weight[s.scored] for s in states]))
    np.logical_and.at(greedy, index, right | ~np.concatenate([s.greedy[s.scored] for s in states]))
