"""The original as the verifier: a model of its own beside the student, with a cache of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.sampler.cache import CacheRows, SlotCache
from actors.sampler.cached_model import CachedModel


class Verifier:
    """Reads causally what the student drafts. It needs no adapter and no mask; its text is what is written.

    Two models have two caches: drafts read the student's, which may be block-causal, verification the original's. So a
    pass in which blocks are verified is two forwards, where a student that verifies itself needs one.

    Life cycle: as that of the sampler it belongs to, which makes its cache beside the student's.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        self.model = CachedModel(model, compiled)
        self.model.causal = True
        self.cache: SlotCache | None = None

    @property
    def memory_bytes(self) -> int:
        """Of its weights and its cache."""
        weights = sum(p.nbytes for p in self.model.model.parameters())
        return weights + (self.cache.memory.nbytes if self.cache else 0)

    def make_cache(self, slots: int, length: int) -> None:
        self.cache = None
        self.cache = SlotCache(self.model.model, slots, length)

    def attach(self) -> None:
        if self.cache:
            self.cache.attach(self.model.model)

    def logits(self, ids: Tensor, positions: Tensor, slots: Tensor, block_size: int, width: int) -> Tensor:
        """float32 [C, B, width] of the blocks `ids` int64 [C, B] at `positions` int64 [C, B] (-1: padding) of `slots`
        int64 [C]. Tokens from `width` on are not the student's; where there are fewer, nothing is predicted."""
        count, size = ids.shape
        alone = torch.full((count,), -1, device=ids.device)
        rows = CacheRows(slots, positions, block_size, alone, self.model.causal_from(0, count))
        every = torch.arange(count * size, device=ids.device)
        logits = self.model.logits(self.model.decode(ids, positions, rows, every, None))[:, :width]
        padding = logits.new_full((len(logits), width - logits.shape[1]), -torch.inf)
        return torch.cat([logits, padding], dim=1).unflatten(0, (count, size))
