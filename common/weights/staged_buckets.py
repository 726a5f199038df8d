"""Staged buckets: copies of tensors in flat buffers that stay where they are from version to version."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.weights.transport import TensorSpec

_ALIGNMENT = 64


class StagedBuckets:
    """Buffers [bytes] by number on one device, page-locked if `pinned`; a buffer grows at need, and never shrinks."""

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        self.device = device
        self.pinned = pinned
        self._buffers: dict[int, Tensor] = {}

    def parts(self, number: int, tensors: Sequence[TensorSpec | Tensor]) -> list[Tensor]:
        """A uint8 view [nbytes, rounded up] of buffer `number` for each of the tensors, one after the other."""
        sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors]
        return list(self.buffer(number, sum(sizes)).split(sizes))

    def buffer(self, number: int, nbytes: int) -> Tensor:
        """The first `nbytes` of buffer `number`, with whatever it holds."""
        if number not in self._buffers or len(self._buffers[number]) < nbytes:
            self._buffers.pop(number, None)  # free it before its successor is made
            self._buffers[number] = torch.empty(nbytes, dtype=torch.uint8, device=self.device, pin_memory=self.pinned)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # other streams may write there from now on
        return self._buffers[number][:nbytes]


def as_tensor(part: Tensor, like: TensorSpec | Tensor) -> Tensor:
    """View uint8 [>= nbytes] as a tensor of that dtype and shape."""
    dtype = like.dtype if isinstance(like, Tensor) else getattr(torch, like.dtype)
    return part[: like.nbytes].view(dtype).view(like.shape)
