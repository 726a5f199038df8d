"""The slot cache: keys and values of all sequences in decoding, one row per slot, indexed by absolute position.

Entry j of a slot holds position j of its sequence. Clean blocks are final; the block being denoised is rewritten by
every pass, and its last write (with clean tokens) is its commit. A query of block b sees entries of blocks <= b only,
so whatever stands behind the current block is never read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig


class SlotCache:
    """Static key-value memory with the `update` interface that transformers' attention layers call.

    Each layer holds keys and values [slots, kv_heads, length + block_size, head_dim]; the last `block_size` entries
    take the writes of rows that stand for no position.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        slots: int,
        length: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, config.num_key_value_heads, length + block_size, head_dim)
        layers = config.num_hidden_layers
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.slots = slots
        self.length = length
        self._rows = torch.arange(slots, device=device)
        self._positions = self._rows[:, None]
        self._context = length

    def at(self, rows: Tensor, positions: Tensor, context: int) -> SlotCache:
        """Aim the next forward: write int64 `positions` [R, Q] of the slots `rows` [R], read entries < `context`."""
        self._rows, self._positions, self._context = rows, positions, context
        return self

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [R, kv_heads, Q, head_dim] and return all that the queries may see [R, kv_heads, context, head_dim]."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._rows[:, None], :, self._positions] = key.transpose(1, 2)
        values[self._rows[:, None], :, self._positions] = value.transpose(1, 2)
        if len(self._rows) == self.slots:
            return keys[:, :, : self._context], values[:, :, : self._context]
        return keys[self._rows, :, : self._context], values[self._rows, :, : self._context]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._context
