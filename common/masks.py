"""The one attention rule of the method, for training and for decoding.

Every token carries three integers: its document, its block on the absolute grid, and its copy (0: the clean
sequence, 1, 2, ...: a noised copy of it). A query sees a key of its own document if both stand in the same block of
the same copy, or if the key is clean and in an earlier block:

    allow(q, k) = doc_q = doc_k  and  ( copy_q = copy_k and block_q = block_k   or   copy_k = 0 and block_k < block_q )

For clean tokens alone this is block-causal attention. The rule is lowered to a dense boolean mask for SDPA, or to a
FlexAttention BlockMask on CUDA.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def allowed(doc_q: Tensor, copy_q: Tensor, block_q: Tensor, doc_k: Tensor, copy_k: Tensor, block_k: Tensor) -> Tensor:
    """The rule, elementwise on broadcastable integer tensors; returns bool of the broadcast shape."""
    same_block = (copy_q == copy_k) & (block_q == block_k)
    earlier = (copy_k == 0) & (block_k < block_q)
    return (doc_q == doc_k) & (same_block | earlier)


def dense_mask(doc: Tensor, copy: Tensor, block: Tensor) -> Tensor:
    """Boolean mask [R, 1, N, N] for packed rows; `doc`, `copy`, `block` are integer [R, N]."""
    q = (doc[:, None, :, None], copy[:, None, :, None], block[:, None, :, None])
    k = (doc[:, None, None, :], copy[:, None, None, :], block[:, None, None, :])
    return allowed(*q, *k)


def flex_mask(doc: Tensor, copy: Tensor, block: Tensor) -> Any:
    """FlexAttention BlockMask of packed rows; `doc`, `copy`, `block` are integer [R, N] on CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return allowed(doc[b, q], copy[b, q], block[b, q], doc[b, k], copy[b, k], block[b, k])

    rows, length = doc.shape
    return create_block_mask(mask_mod, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=doc.device.type)


def causal_mask(doc: Tensor, copy: Tensor, positions: Tensor, attention: str) -> Any:
    """Plain causal attention within each copy of each document, in the form that the attention takes; int [R, N]."""
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (doc[b, q] == doc[b, k]) & (copy[b, q] == copy[b, k])
            return same & (positions[b, k] <= positions[b, q])

        rows, length = doc.shape
        return create_block_mask(mask_mod, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=doc.device.type)
    same = (doc[:, :, None] == doc[:, None, :]) & (copy[:, :, None] == copy[:, None, :])
    return (same & (positions[:, None, :] <= positions[:, :, None]))[:, None]


def packed_mask(doc: Tensor, copy: Tensor, block: Tensor, attention: str) -> Any:
    """The mask in the form that the attention implementation takes (`flex_attention`, else dense)."""
    return flex_mask(doc, copy, block) if attention == "flex_attention" else dense_mask(doc, copy, block)
