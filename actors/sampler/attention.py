"""Attention over the slot cache: new keys and values are stored, then each query sees its slot up to its own block,
or in a causal row up to itself.

One operator with two implementations: the reference in plain PyTorch, which runs on CPU, and Triton kernels for CUDA.
Both read each key once for all query heads that share it; transformers would repeat it for every head.

Why kernels of our own: FlexAttention would need a new block mask for every pass. The attention kernels of serving
engines would read a slot's cache twice where a pass commits one block and denoises the next, and would be a further
dependency.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from actors.sampler.cache import AttentionInputs, CacheRows, attention_inputs

SLOT_ATTENTION = "opdlm_slots"
MOST_QUERIES = 64  # largest block size of the kernel for decoding, whose programs hold two blocks


def register() -> str:
    """Make the attention known to transformers; returns its name for `set_attn_implementation`."""
    AttentionInterface.register(SLOT_ATTENTION, attention)
    AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
    return SLOT_ATTENTION


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cache_rows: CacheRows | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function as transformers calls it: query [N, H, Q, D], key and value [N, H_kv, Q, D] of the new
    tokens; returns [N, Q, H, D].

    Without `cache_rows`, in a plain causal forward, it is transformers' own function.
    """
    if cache_rows is None:
        options["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return slot_attention(attention_inputs(module, query, key, value, cache_rows, scale, sliding_window)), None


def slot_attention(inputs: AttentionInputs) -> Tensor:
    """Store the new keys and values, then attend; returns [N, Q, H, D] in the dtype of the query.

    The result has no meaning at padding, nor in rows that are padding by `partner`.
    """
    return torch.ops.opdlm.slot_attention(*inputs)


def slot_attention_reference(inputs: AttentionInputs) -> Tensor:
    """The reference: gathers the context of every row and masks it densely. It ignores `partner`."""
    query, key, value, keys, values, slots, positions, block_size, scale, window, _, causal = inputs
    n, heads, queries, width = query.shape
    kv_heads = keys.shape[1]
    row, column = (positions >= 0).nonzero(as_tuple=True)
    at = slots[row], slice(None), positions[row, column]
    keys[at] = key[row, :, column]
    values[at] = value[row, :, column]

    visible = (torch.div(positions, block_size, rounding_mode="floor") + 1) * block_size
    if causal is not None:
        visible = torch.where(causal[:, None], positions + 1, visible)
    context = int(visible.max())
    j = torch.arange(context, device=query.device)
    mask = (j < visible[:, None, :, None]) & (positions[:, None, :, None] - j < window)
    group = heads // kv_heads
    folded = query.reshape(n, kv_heads, group * queries, width)
    mask = mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    context_keys, context_values = keys[slots, :, :context], values[slots, :, :context]
    out = scaled_dot_product_attention(folded, context_keys, context_values, attn_mask=mask, scale=scale)
    return out.reshape(n, heads, queries, width).transpose(1, 2).contiguous()


# torch operators take no tuple, so here, and only here, the fields of AttentionInputs are passed one by one
@torch.library.custom_op(
    "opdlm::slot_attention",
    mutates_args=("keys", "values"),
    device_types="cpu",
    schema="(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, "
    "Tensor positions, SymInt block_size, float scale, SymInt window, Tensor? partner, Tensor? causal) -> Tensor",
)
def _operator(*inputs: Any) -> Tensor:
    return slot_attention_reference(AttentionInputs(*inputs))


@_operator.register_kernel("cuda")
def _(*inputs: Any) -> Tensor:
    from actors.sampler.kernels.block_attention import block_attention_triton  # needs triton
    from actors.sampler.kernels.slot_attention import slot_attention_triton

    given = AttentionInputs(*inputs)
    by_block = given.partner is not None and given.query.shape[2] <= MOST_QUERIES
    return block_attention_triton(given) if by_block else slot_attention_triton(given)


@_operator.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    n, heads, queries, width = query.shape
    return query.new_empty(n, queries, heads, width)
