"""The one attention rule of the method, for training and for decoding.

Every token carries three integers: its document, its block on the absolute grid, and its copy (0: the clean
sequence, 1, 2, ...: a noised copy of it). A query sees a key of its own document if both stand in the same block of
the same copy, or if the key is clean and in an earlier block:

    allow(q, k) = doc_q = doc_k  and  ( copy_q = copy_k and block_q = block_k   or   copy_k = 0 and block_k < block_q )

For clean tokens alone this is block-causal attention. Context-causal attention (NBDiff, arXiv 2512.06776) is the same
rule with other numbers: a clean token is a block of its own, whose number is its position, and a noised block has the
number of its first position. Then clean tokens attend causally, and noised ones see what they saw before
(`block_numbers`).

The rule is lowered to a dense boolean mask for SDPA, or to a
FlexAttention BlockMask on CUDA. PyTorch's create_block_mask would test all N * N pairs of a row, for every micro-batch;
here the tiles are counted from the two runs of keys that each query sees, which is a hundredth of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.config.model import AttentionContext

Integers = TypeVar("Integers", np.ndarray, Tensor)

TILE = 128  # queries and keys that FlexAttention treats, or skips, together


def block_numbers(positions: Integers, copy: Integers, block_size: int, context: AttentionContext) -> Integers:
    """The number of each token's block as the rule takes it, from its position and copy, integers of one shape."""
    if context == "block":
        return positions // block_size
    return positions - (copy != 0) * (positions % block_size)


def allowed(doc_q: Tensor, copy_q: Tensor, block_q: Tensor, doc_k: Tensor, copy_k: Tensor, block_k: Tensor) -> Tensor:
    """The rule, elementwise on broadcastable integer tensors; returns bool of the broadcast shape."""
    same_block = (copy_q == copy_k) & (block_q == block_k)
    earlier = (copy_k == 0) & (block_k < block_q)
    return (doc_q == doc_k) & (same_block | earlier)


def within(window: int | None, position_q: Tensor, position_k: Tensor) -> Tensor | bool:
    """Whether a key is close enough for a sliding-window layer: fewer than `window` positions before the query."""
    return True if window is None else position_q - position_k < window


def dense_mask(
    doc: Tensor, copy: Tensor, block: Tensor, positions: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Boolean mask [R, 1, N, N] for packed rows, all integer [R, N]; a `window` needs `positions`."""
    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    seen = allowed(doc[q], copy[q], block[q], doc[k], copy[k], block[k])
    if positions is not None:
        seen = seen & within(window, positions[q], positions[k])
    return seen[:, None]


def flex_mask(
    doc: Tensor, copy: Tensor, block: Tensor, positions: Tensor | None = None, window: int | None = None
) -> Any:
    """FlexAttention BlockMask of packed rows, all integer [R, N]; a `window` needs `positions`.

    The rows are laid out as `key_runs` says. What FlexAttention calls a block is a tile here.
    """
    from torch.nn.attention.flex_attention import BlockMask

    begin, end = (runs.to(torch.int32) for runs in key_runs(doc, copy, block, positions, window))
    (begin_clean, begin_own), (end_clean, end_own) = begin, end

    # four numbers of the query, in place of three of each key
    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        clean = (k >= begin_clean[b, q]) & (k < end_clean[b, q])
        return clean | ((k >= begin_own[b, q]) & (k < end_own[b, q]))

    pairs = tile_pairs(begin, end)[:, None]
    full = pairs == TILE * TILE
    return BlockMask.from_kv_blocks(
        *_ordered((pairs > 0) & ~full),
        *_ordered(full),
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(doc.shape[1], doc.shape[1]),
    )


def key_runs(
    doc: Tensor, copy: Tensor, block: Tensor, positions: Tensor | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The keys that each query sees, as two runs of neighbours: where they begin and end, int64 [2, R, N] each.

    The first run holds the clean tokens of earlier blocks, the second the query's own block. This holds for rows as
    learner/packing.py lays them out: documents side by side; in each the clean tokens, then one noised copy after the
    other; in each of these the blocks in order, whose positions ascend by one. Padding is one block of one document.
    """
    index = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
    first_of_doc, _ = _runs(index, doc)
    own_begin, own_end = _runs(index, doc, copy, block)
    begin = first_of_doc
    end = _first_clean(first_of_doc, copy, block, block)
    if positions is not None and window is not None:
        oldest = positions - window + 1
        begin = torch.minimum(_first_clean(first_of_doc, copy, positions, oldest.clamp_min(0)), end)
        own_begin = own_begin + (oldest - positions.gather(1, own_begin)).clamp_min(0)
    return torch.stack([begin, own_begin]), torch.stack([end, own_end])


def tile_pairs(begin: Tensor, end: Tensor) -> Tensor:
    """How many (query, key) pairs are seen in each tile, int32 [R, tiles of queries, tiles of keys].

    Args:
        begin, end: int64 [runs, R, N], runs of keys that do not overlap.
    """
    tiles = -(-begin.shape[-1] // TILE)
    beyond = (0, tiles * TILE - begin.shape[-1])  # queries that fill the last tile see nothing
    begin, end = (torch.nn.functional.pad(x.to(torch.int32), beyond)[..., None] for x in (begin, end))
    first_key = torch.arange(tiles, device=begin.device, dtype=torch.int32) * TILE
    seen = (end - first_key).clamp(0, TILE) - (begin - first_key).clamp(0, TILE)
    return seen.unflatten(2, (tiles, TILE)).sum((0, 3), dtype=torch.int32)


def packed_mask(
    doc: Tensor, copy: Tensor, block: Tensor, positions: Tensor, attention: str, window: int | None = None
) -> Any:
    """The mask in the form that the attention implementation takes (`flex_attention`, else dense); `window` is that of
    a sliding-window layer."""
    form = flex_mask if attention == "flex_attention" else dense_mask
    return form(doc, copy, block, positions if window else None, window)


def per_layer_kind(windows: dict[str, int | None], mask_of: Callable[[int | None], Any]) -> Any:
    """The masks of a model whose kinds of layers have these windows: one mask, or one by kind where there are more."""
    masks = {kind: mask_of(window) for kind, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _runs(index: Tensor, *fields: Tensor) -> tuple[Tensor, Tensor]:
    """Begin and end of the run of tokens, equal in all fields, that each token is in; int64 [R, N]."""
    changes = torch.zeros_like(index, dtype=torch.bool)
    for values in fields:
        changes[:, 1:] |= values[:, 1:] != values[:, :-1]
    begin = torch.where(changes, index, 0).cummax(1).values
    next_begin = torch.where(changes.roll(-1, 1), index + 1, index.shape[1])
    next_begin[:, -1] = index.shape[1]
    return begin, next_begin.flip(1).cummin(1).values.flip(1)


def _first_clean(first_of_doc: Tensor, copy: Tensor, values: Tensor, least: Tensor) -> Tensor:
    """Where the clean tokens of each token's document with `values` >= `least` begin, or its clean tokens end."""
    # one ascending number for a row: documents apart, and in each the noised tokens behind all clean ones
    far = 2**32
    ascending = first_of_doc * far + torch.where(copy == 0, values, far - 1)
    return torch.searchsorted(ascending, first_of_doc * far + least)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """For each tile of queries: the number of chosen tiles of keys, and all of these, the chosen first, as int32."""
    order = tiles.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)
