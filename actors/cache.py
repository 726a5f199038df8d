"""The slot cache: keys and values of all sequences in decoding, one row per slot, indexed by absolute position.

Entry j of a slot holds position j of its sequence. Clean blocks are final; the block being denoised is rewritten by
every pass, and its last write (with clean tokens) is its commit. A query of block b sees entries of blocks <= b only,
so whatever stands behind its block is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig


class SlotCache:
    """Static key-value memory: per layer, keys and values [slots, kv_heads, length, head_dim]."""

    def __init__(
        self, config: PretrainedConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, config.num_key_value_heads, length, head_dim)
        layers = config.num_hidden_layers
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.length = length

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Give the slots `target` int64 [n] the first `length` entries of the slots `source` int64 [n]."""
        for memory in (*self.keys, *self.values):
            memory[target, :, :length] = memory[source, :, :length]


@dataclass(frozen=True)
class CacheRows:
    """Where the rows of one forward stand: each is a run of positions of one slot.

    Every row is written to the cache before any is read, so two rows may belong to one slot: a block being committed
    and the block behind it. A position of -1 is padding: not written, and sees nothing.
    """

    cache: SlotCache
    slots: Tensor  # int64 [N]
    positions: Tensor  # int64 [N, Q]
    block_size: int
