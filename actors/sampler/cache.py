"""The slot cache: keys and values of all running sequences, one row per slot, indexed by absolute position.

Entry j of a slot holds position j of its sequence. Committed blocks are final. The block being denoised is written anew
by every pass; its commit, with clean tokens, is the last time. A query of block b sees entries of blocks <= b only, so
entries that an earlier sequence left behind are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.student import head_width

NO_WINDOW = 2**30  # the window of a layer that attends to all positions before it


class SlotCache:
    """Static key-value memory: per layer, keys and values [slots, kv_heads, length, head_dim]; all of it is `memory`
    [2, layers, slots, kv_heads, length, head_dim], so that one operation copies for all layers.

    `attach` gives each attention module its two tensors as `slot_keys` and `slot_values`. So a module need not know
    which layer it is in, and one compiled layer serves all.
    """

    def __init__(self, model: PreTrainedModel, slots: int, length: int) -> None:
        config, like = model.config, model.get_output_embeddings().weight
        head_dim = head_width(config)
        shape = (2, len(model.model.layers), slots, config.num_key_value_heads, length, head_dim)
        self.memory = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.keys, self.values = (list(memory) for memory in self.memory)
        self.length = length

    def attach(self, model: PreTrainedModel) -> None:
        for layer, keys, values in zip(model.model.layers, self.keys, self.values, strict=True):
            layer.self_attn.slot_keys, layer.self_attn.slot_values = keys, values

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Give the slots `target` int64 [n] the first `length` entries of the slots `source` int64 [n]."""
        for memory in (*self.keys, *self.values):  # layer by layer: what is read is copied once on the way
            memory[target, :, :length] = memory[source, :, :length]


@dataclass(frozen=True)
class CacheRows:
    """The slot and the positions of every row of one forward.

    All rows are written to the cache before any is read, so two rows may be of one slot: a block being committed and
    the block behind it. A position of -1 is padding: it is not written and sees nothing.

    `partner` lets a kernel read a slot's cache once for both of its rows. The first R rows are of different slots, and
    partner[n] is the other row of row n's slot, or -1. All other rows are padding.
    """

    slots: Tensor  # int64 [N]
    positions: Tensor  # int64 [N, Q]
    block_size: int
    partner: Tensor | None = None  # int64 [R], R <= N
    causal: Tensor | None = None  # bool [N], rows whose queries see nothing behind them; None: none


class AttentionInputs(NamedTuple):
    """Everything that the attention of one layer over the slot cache needs, for N rows of Q new positions.

    H query heads share H_kv key-value heads. Floating-point tensors have the model's dtype; `key` and `value` are
    written into `keys` and `values` before anything is read.
    """

    query: Tensor  # [N, H, Q, D]
    key: Tensor  # [N, H_kv, Q, D]
    value: Tensor  # [N, H_kv, Q, D]
    keys: Tensor  # [slots, H_kv, length, D], the layer's cache, changed in place
    values: Tensor  # [slots, H_kv, length, D], likewise
    slots: Tensor  # int64 [N]
    positions: Tensor  # int64 [N, Q]; -1: padding
    block_size: int
    scale: float  # of the scores before the softmax
    window: int  # a key is seen if it stands fewer than so many positions before the query; or NO_WINDOW
    partner: Tensor | None  # see CacheRows
    causal: Tensor | None = None  # bool [N], likewise


def attention_inputs(
    module: Any, query: Tensor, key: Tensor, value: Tensor, rows: CacheRows, scale: float, window: int | None
) -> AttentionInputs:
    """The inputs of an attention module to which a cache is attached; shapes as in AttentionInputs."""
    where = (rows.slots, rows.positions, rows.block_size, scale, window or NO_WINDOW, rows.partner, rows.causal)
    return AttentionInputs(query, key, value, module.slot_keys, module.slot_values, *where)
