"""Staged buckets: copies of tensors in flat buffers that keep their address from version to version."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.weights.transport import TensorSpec

_ALIGNMENT = 64


class StagedBuckets:
    """Numbered buffers of bytes on one device, page-locked if `pinned`. They grow when needed and never shrink."""

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        self.device = device
        self.pinned = pinned
        self._buffers: dict[int, Tensor] = {}

    def parts(self, number: int, tensors: Sequence[TensorSpec | Tensor]) -> list[Tensor]:
        """A uint8 view of buffer `number` for each tensor, one behind the other, each rounded up to 64 bytes."""
        sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors]
        return list(self.buffer(number, sum(sizes)).split(sizes))

    def buffer(self, number: int, nbytes: int) -> Tensor:
        """The first `nbytes` of buffer `number`, with their present content."""
        if number not in self._buffers or len(self._buffers[number]) < nbytes:
            self._buffers.pop(number, None)  # free it before the larger one is allocated
            self._buffers[number] = torch.empty(nbytes, dtype=torch.uint8, device=self.device, pin_memory=self.pinned)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # so that other streams may write to it
        return self._buffers[number][:nbytes]


def as_tensor(part: Tensor, like: TensorSpec | Tensor) -> Tensor:
    """The bytes [>= nbytes] viewed as a tensor with the dtype and shape of `like`."""
    dtype = like.dtype if isinstance(like, Tensor) else getattr(torch, like.dtype)
    return part[: like.nbytes].view(dtype).view(like.shape)
