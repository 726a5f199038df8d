"""The one attention rule of the method, for training and for decoding.

Every token carries three integers: its document, its block on the absolute grid, and its copy (0: the clean
sequence, 1, 2, ...: a noised copy of it). A query sees a key of its own document if both stand in the same block of
the same copy, or if the key is clean and in an earlier block:

    allow(q, k) = doc_q = doc_k  and  ( copy_q = copy_k and block_q = block_k   or   copy_k = 0 and block_k < block_q )

For clean tokens alone this is block-causal attention. The rule is lowered to a dense boolean mask for SDPA, or to a
FlexAttention BlockMask on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


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
    """FlexAttention BlockMask of packed rows, all integer [R, N] on CUDA; a `window` needs `positions`."""

    def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = allowed(doc[b, q], copy[b, q], block[b, q], doc[b, k], copy[b, k], block[b, k])
        return seen if positions is None else seen & within(window, positions[b, q], positions[b, k])

    return _block_mask(rule, doc)


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


def _block_mask(rule: Callable[[Tensor, Tensor, Tensor], Tensor], like: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule(b, q, k)

    rows, length = like.shape
    return create_block_mask(mask_mod, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=like.device.type)
