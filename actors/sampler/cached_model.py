"""The model over the slot cache: its forwards over rows of new tokens."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.sampler import attention
from actors.sampler.attention import MOST_QUERIES
from actors.sampler.cache import CacheRows
from actors.sampler.fused_decoder import FusedDecoder
from actors.sampler.projections import pack_projections
from actors.sampler.slots import SlotState
from common.lora import gate_of
from common.student import attention_context, full_precision_logits, hidden_states

_log = logging.getLogger(__name__)


class CachedModel:
    """Constructed on a loaded model, whose attention it replaces and, on CUDA, whose projections it packs."""

    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        self.model = model
        self.device = model.get_output_embeddings().weight.device
        self.causal = attention_context(model.config) == "causal"  # clean tokens see nothing behind them
        self.fused: FusedDecoder | None = None
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)  # who sees what is in CacheRows
        model.set_attn_implementation(attention.register())
        if self.device.type == "cuda":
            pack_projections(model)
            if reason := FusedDecoder.misfit(model):
                _log.warning("passes run transformers' layers, not the fused ones, since %s", reason)
            else:
                self.fused = FusedDecoder(model, compiled)
            if compiled:
                for layer in model.model.layers:  # one compiled layer serves all
                    layer.compile(dynamic=True)

    def forward(self, ids: Tensor, positions: Tensor, rows: CacheRows, masked: Tensor | None = None) -> Tensor:
        """Hidden states [N, Q, d] of ids [N, Q] at `positions` [N, Q], over the cache; gated adapters act where bool
        `masked` [N, Q] says."""
        return hidden_states(self.model, ids, positions, self._no_mask, masked, cache_rows=rows)

    def decode(self, ids: Tensor, positions: Tensor, rows: CacheRows, wanted: Tensor, masked: Tensor | None) -> Tensor:
        """Hidden states [len(wanted), d] at `wanted` int64, places in the flattened ids [N, Q]; `masked` as in
        `forward`."""
        if self.fused and ids.shape[1] <= MOST_QUERIES:
            return self.fused(ids, positions, rows, wanted, masked)
        return self.forward(ids, positions, rows, masked).flatten(0, 1)[wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., V] of hidden states [..., d]."""
        return full_precision_logits(hidden, self.model.get_output_embeddings().weight)

    def mask_positions(self, state: SlotState, slots: Tensor, rows: int) -> Tensor | None:
        """bool [rows, B], the mask positions of a pass over `slots`; behind them are rows of clean tokens. None where
        no adapter asks for them."""
        if gate_of(self.model) is None:
            return None
        masked = state.masked[slots]
        return torch.cat([masked, masked.new_zeros(rows - len(slots), state.block_size)])

    def causal_from(self, first_clean: int, rows: int) -> Tensor | None:
        """bool [rows] for CacheRows: which rows are causal, of which those from `first_clean` on hold clean tokens."""
        return torch.arange(rows, device=self.device) >= first_clean if self.causal else None
