"""Qwen3's attention layer with its norms and RoPE inside the attention kernel, where a pass decodes blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from actors.attention import EVERYTHING
from actors.block_attention_kernels import MOST_QUERIES, Fusion, block_attention_triton
from actors.cache import CacheRows
from actors.projections import PackedLinear


def fuse_attention(model: PreTrainedModel) -> None:
    """Let the attention layers that can be fused be so; their projections must be packed already."""
    for layer in model.model.layers:
        attention = layer.self_attn
        if type(attention) is Qwen3Attention and isinstance(attention.q_proj, PackedLinear):
            attention.__class__ = FusedQwen3Attention


class FusedQwen3Attention(Qwen3Attention):
    """The same parameters and the same result, by fewer kernels; other forwards take the parent's way."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        cache_rows: CacheRows | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if cache_rows is None or cache_rows.partner is None or cache_rows.positions.shape[1] > MOST_QUERIES:
            options["cache_rows"] = cache_rows
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **options)
        packed = self.q_proj.product.of(hidden_states)
        out = torch.ops.opdlm.fused_block_attention(
            packed, self.q_norm.weight, self.k_norm.weight, *position_embeddings, self.slot_keys, self.slot_values,
            cache_rows.slots, cache_rows.positions, cache_rows.partner, cache_rows.block_size,
            self.q_norm.variance_epsilon, self.scaling, self.sliding_window or EVERYTHING,
        )  # fmt: skip
        return self.o_proj(out.flatten(2)), None


@torch.library.custom_op("opdlm::fused_block_attention", mutates_args=("keys", "values"), device_types="cuda")
def fused_block_attention(
    packed: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    partner: Tensor,
    block_size: int,
    epsilon: float,
    scale: float,
    window: int,
) -> Tensor:
    """[N, Q, H, D] from the packed projections [N, Q, (H + 2 H_kv) D]: the heads of query, key, value."""
    heads = packed.unflatten(2, (-1, keys.shape[3])).transpose(1, 2)
    kv_heads = keys.shape[1]
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    fusion = Fusion(query_weight, key_weight, epsilon, cos.contiguous(), sin.contiguous())
    memory = (keys, values, slots, positions, block_size, scale, window, partner)
    return block_attention_triton(query, key, value, *memory, fusion)


@fused_block_attention.register_fake
def _(
    packed: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, *_: Any
) -> Tensor:
    n, queries, total = packed.shape
    width = keys.shape[3]
    return packed.new_empty(n, queries, total // width - 2 * keys.shape[1], width)
