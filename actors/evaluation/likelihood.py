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

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.masks import dense_mask, per_layer_kind
from common.padded_batches import padded_batches
from common.student import attention_windows, full_precision_logits, hidden_states, lm_head_weight

Method = Literal["sequential", "bound"]
_HEAD_ROWS = 1024  # positions whose logits exist at the same time


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
class BlockState:
    """One state of a block: bool [n] masked, float64 [n] weight of each position, and the position that left-to-right
    decoding would reveal here (-1: none)."""

    masked: np.ndarray
    weight: np.ndarray
    greedy_at: int = -1


def block_states(n: int, block: int, estimate: Estimate) -> list[BlockState]:
    """The states of a block with n continuation positions, with their weights in the estimate."""
    left_to_right = [np.arange(n) >= j for j in range(n)]
    if estimate.method == "sequential":
        return [BlockState(masked, np.eye(n)[j], j) for j, masked in enumerate(left_to_right)]
    states = []
    if 2**n - 1 <= estimate.samples:
        for size in range(1, n + 1):
            for chosen in combinations(range(n), size):
                masked = np.isin(np.arange(n), chosen)
                states.append(BlockState(masked, masked / (size * comb(n, size))))
    else:
        rng = np.random.default_rng([estimate.seed, block])
        for _ in range(estimate.samples):
            size = int(rng.integers(1, n + 1))
            masked = np.isin(np.arange(n), rng.permutation(n)[:size])
            states.append(BlockState(masked, masked * (n / size / estimate.samples)))
    # these only serve the greedy flag
    return states + [BlockState(masked, np.zeros(n), j) for j, masked in enumerate(left_to_right)]


def log_likelihoods(
    model: PreTrainedModel,
    pairs: list[tuple[list[int], list[int]]],
    *,
    block_size: int,
    mask_token_id: int,
    estimate: Estimate,
    token_budget: int = 8192,
) -> list[Likelihood]:
    """Score the continuation of every (context ids, continuation ids), in order.

    One forward has at most `token_budget` tokens, clean and noised, or one sequence with one noised block.
    """
    log_prob, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    rows = [
        row
        for index, (context, continuation) in enumerate(pairs)
        for row in _rows(index, context, continuation, block_size, mask_token_id, estimate, token_budget)
    ]
    for group in padded_batches([len(row.ids) for row in rows], token_budget):
        _score(model, [rows[index] for index in group], mask_token_id, log_prob, greedy)
    return [Likelihood(float(p), bool(g)) for p, g in zip(log_prob, greedy, strict=True)]


@dataclass
class _Row:
    """A clean sequence and some noised copies of its blocks, int64 [L] each, and what is scored there.

    Scored: columns `at` int64 [K] with tokens `target` int64 [K], `weight` float64 [K] and `greedy` bool [K].
    """

    index: int
    ids: np.ndarray
    position: np.ndarray
    copy: np.ndarray
    at: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    greedy: np.ndarray
    block_size: int


def _rows(
    index: int,
    context: list[int],
    continuation: list[int],
    block_size: int,
    mask_token_id: int,
    estimate: Estimate,
    token_budget: int,
) -> Iterator[_Row]:
    """The states of one sequence, in as few rows of at most `token_budget` tokens as possible."""
    if not continuation:
        return
    x = np.asarray([*context, *continuation], dtype=np.int64)
    blocks = range(len(context) // block_size, (len(x) - 1) // block_size + 1)
    clean = blocks[-1] * block_size  # no block has the last one as context
    states = []
    for block in blocks:
        first, end = max(block * block_size, len(context)), min((block + 1) * block_size, len(x))
        states += [(block, first, state) for state in block_states(end - first, block, estimate)]
    per_row = max((token_budget - clean) // block_size, 1)
    for start in range(0, len(states), per_row):
        chunk = states[start : start + per_row]
        ids, positions, copies = [x[:clean]], [np.arange(clean)], [np.zeros(clean, dtype=np.int64)]
        at, target, weight, greedy = [], [], [], []
        for number, (block, first, state) in enumerate(chunk):
            position = block * block_size + np.arange(block_size)
            noised = np.full(block_size, mask_token_id, dtype=np.int64)
            known = x[position[0] : position[0] + block_size]
            noised[: len(known)] = known
            offset = first - position[0] + np.arange(len(state.masked))  # continuation positions within the block
            noised[offset[state.masked]] = mask_token_id
            scored = (state.weight > 0) | (np.arange(len(state.masked)) == state.greedy_at)
            ids.append(noised)
            positions.append(position)
            copies.append(np.full(block_size, number + 1))
            at.append(clean + number * block_size + offset[scored])
            target.append(x[position[0] + offset[scored]])
            weight.append(state.weight[scored])
            greedy.append(np.flatnonzero(scored) == state.greedy_at)
        yield _Row(
            index,
            ids=np.concatenate(ids),
            position=np.concatenate(positions),
            copy=np.concatenate(copies),
            at=np.concatenate(at),
            target=np.concatenate(target),
            weight=np.concatenate(weight),
            greedy=np.concatenate(greedy),
            block_size=block_size,
        )


@torch.inference_mode()
def _score(
    model: PreTrainedModel, rows: list[_Row], mask_token_id: int, log_prob: np.ndarray, greedy: np.ndarray
) -> None:
    """One forward; adds its scores to `log_prob` [pairs] and `greedy` [pairs]."""
    device = lm_head_weight(model).device
    length = max(len(row.ids) for row in rows)

    def padded(parts: list[np.ndarray], value: int) -> Tensor:
        out = np.full((len(parts), length), value, dtype=np.int64)
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
        return torch.from_numpy(out).to(device)

    ids, positions = padded([r.ids for r in rows], 0), padded([r.position for r in rows], 0)
    doc = padded([np.zeros_like(r.ids) for r in rows], -1)  # padding is a document of its own
    copy, block = padded([r.copy for r in rows], 0), positions // rows[0].block_size
    windows = attention_windows(model.config)
    mask = per_layer_kind(windows, lambda window: dense_mask(doc, copy, block, positions, window))
    hidden = hidden_states(model, ids, positions, mask)

    row_of = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(r.at) for r in rows])).to(device)
    at = torch.from_numpy(np.concatenate([r.at for r in rows])).to(device)
    target = torch.from_numpy(np.concatenate([r.target for r in rows])).to(device)
    log_p, best = [], []
    for first in range(0, len(at), _HEAD_ROWS):
        part = slice(first, first + _HEAD_ROWS)
        logits = full_precision_logits(hidden[row_of[part], at[part]], lm_head_weight(model))
        logits[:, mask_token_id] = -torch.inf
        log_p.append(torch.log_softmax(logits, dim=-1).gather(1, target[part, None])[:, 0])
        best.append(logits.argmax(dim=-1) == target[part])
    scored, right = torch.cat(log_p).double().cpu().numpy(), torch.cat(best).cpu().numpy()
    index = np.repeat([r.index for r in rows], [len(r.at) for r in rows])
    np.add.at(log_prob, index, scored * np.concatenate([r.weight for r in rows]))
    np.logical_and.at(greedy, index, right | ~np.concatenate([r.greedy for r in rows]))
