"""Many states of a sequence in one forward: as in training, noised copies of its blocks behind the clean sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.masks import block_numbers, dense_mask, per_layer_kind
from common.student import attention_context, attention_windows, hidden_states, lm_head_weight, noised_masks

HEAD_ROWS = 1024  # positions whose logits exist at the same time
TOKEN_BUDGET = 8192  # tokens of one forward, clean and noised


@dataclass(frozen=True)
class BlockState:
    """One state of a block with n positions behind the context: bool [n] `masked`."""

    masked: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """bool [n]: where the student's distribution is wanted."""
        return self.masked


State = TypeVar("State", bound=BlockState)


@dataclass(frozen=True)
class NoisedRow(Generic[State]):
    """A clean sequence and noised copies of some of its blocks, int64 [L] each, in the states `states`.

    The K scored positions, state by state: columns `at` int64 [K], and the clean `tokens` int64 [K] there. `index` says
    which sequence it is.
    """

    index: int
    states: Sequence[State]
    ids: np.ndarray
    position: np.ndarray
    copy: np.ndarray
    at: np.ndarray
    tokens: np.ndarray
    block_size: int


def blocks_behind(context: int, length: int, block_size: int) -> list[tuple[int, int]]:
    """(block, n): the blocks of the grid that hold what is behind a sequence's context, and how much of it."""
    blocks = range(context // block_size, -(-length // block_size))
    return [(b, min((b + 1) * block_size, length) - max(b * block_size, context)) for b in blocks]


def noised_rows(
    index: int,
    x: np.ndarray,
    context: int,
    states: Sequence[tuple[int, State]],
    *,
    block_size: int,
    mask_token_id: int,
    token_budget: int = TOKEN_BUDGET,
) -> Iterator[NoisedRow[State]]:
    """The (block, state) pairs of a sequence `x` int64 [length] in as few rows of at most `token_budget` tokens as
    possible, or of one state.

    In every state the first `context` tokens are known, and what is behind the sequence in its last block is masked.
    """
    clean = (len(x) - 1) // block_size * block_size  # no block has the last one as context
    per_row = max((token_budget - clean) // block_size, 1)
    for start in range(0, len(states), per_row):
        chunk = states[start : start + per_row]
        ids, positions, copies = [x[:clean]], [np.arange(clean)], [np.zeros(clean, dtype=np.int64)]
        at, tokens = [], []
        for number, (block, state) in enumerate(chunk):
            position = block * block_size + np.arange(block_size)
            noised = np.full(block_size, mask_token_id, dtype=np.int64)
            known = x[position[0] : position[0] + block_size]
            noised[: len(known)] = known
            first = max(context - position[0], 0)
            offset = first + np.arange(len(state.masked))  # within the block
            noised[offset[state.masked]] = mask_token_id
            ids.append(noised)
            positions.append(position)
            copies.append(np.full(block_size, number + 1))
            at.append(clean + number * block_size + offset[state.scored])
            tokens.append(x[position[0] + offset[state.scored]])
        yield NoisedRow(
            index,
            states=[state for _, state in chunk],
            ids=np.concatenate(ids),
            position=np.concatenate(positions),
            copy=np.concatenate(copies),
            at=np.concatenate(at),
            tokens=np.concatenate(tokens),
            block_size=block_size,
        )


def scored_hidden_states(model: PreTrainedModel, rows: Sequence[NoisedRow[State]]) -> Tensor:
    """One forward of the student: its final hidden states [K, d] at the scored positions of all rows, row by row."""
    device = lm_head_weight(model).device
    length = max(len(row.ids) for row in rows)

    def padded(parts: list[np.ndarray], value: int) -> Tensor:
        out = np.full((len(parts), length), value, dtype=np.int64)
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
        return torch.from_numpy(out).to(device)

    ids, positions = padded([r.ids for r in rows], 0), padded([r.position for r in rows], 0)
    doc = padded([np.zeros_like(r.ids) for r in rows], -1)  # padding is a document of its own
    copy = padded([r.copy for r in rows], 0)
    block = block_numbers(positions, copy, rows[0].block_size, attention_context(model.config))
    windows = attention_windows(model.config)
    mask = per_layer_kind(windows, lambda window: dense_mask(doc, copy, block, positions, window))
    hidden = hidden_states(model, ids, positions, mask, noised_masks(model, ids, copy))
    row_of = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(r.at) for r in rows])).to(device)
    return hidden[row_of, torch.from_numpy(np.concatenate([r.at for r in rows])).to(device)]
