"""Attention for decoding: grouped queries without copies of the keys and values.

With a mask, transformers' SDPA path repeats keys and values for every query head of a group, which multiplies the
memory traffic of a decoding pass. Here the heads of a group become further query rows of their key-value head: the
same products and the same sums, with every key and value read once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED_SDPA = "grouped_sdpa"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [R, H, Q, D], key and value [R, H_kv, K, D], bool mask [R, 1, Q, K]; returns [R, Q, H, D].

    Without a mask (plain causal attention) transformers' own function answers.
    """
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **options)
    rows, heads, length, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    folded = query.reshape(rows, kv_heads, group * length, width)
    mask = attention_mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    out = nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, length, width).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make it known to transformers; returns the name for `attn_implementation`."""
    AttentionInterface.register(GROUPED_SDPA, grouped_attention)
    AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
    return GROUPED_SDPA
