"""Checksums of bytes: XXH3 in host memory, sums of 64-bit words on a GPU.

Both find the faults of a transfer: bytes that were not written, written twice, written to another place, or changed.
Neither protects against forged weights. On a GPU a real hash was left out: it would need a kernel of its own, or the
bytes in host memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np
import torch
import xxhash
from torch import Tensor

PIECE_BYTES = 16 * 2**20  # one thread's share of a large tensor
_ROW_WORDS = 1024


def pieces(data: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive parts of uint8 `data` [N], of PIECE_BYTES each except the last; at least one."""
    for start in range(0, max(len(data), 1), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def piece_digest(piece: np.ndarray) -> bytes:
    return xxhash.xxh3_64_digest(piece.data)  # releases the GIL


def combined(digests: Iterable[bytes]) -> int:
    """The checksum of an array from the digests of its pieces."""
    return xxhash.xxh3_64_intdigest(b"".join(digests))


def host_checksums(arrays: Sequence[np.ndarray], pool: Executor) -> list[int]:
    """The checksum of each uint8 array; the pieces are hashed in parallel."""
    parts = [list(pieces(array)) for array in arrays]
    digests = pool.map(piece_digest, [piece for part in parts for piece in part])
    return [combined(next(digests) for _ in part) for part in parts]


def device_checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Checksums of uint8 tensors [N], N a multiple of 8, on one device, with one synchronisation for all.

    The 64-bit words are laid out in rows of 1,024, and the sums of all rows and columns are hashed. This finds every
    change of one word, and words that changed places unless all sums stay the same.
    """
    sums = [_word_sums(tensor.view(torch.int64)) for tensor in tensors]
    host = torch.cat(sums).cpu().split([len(s) for s in sums])
    return [xxhash.xxh3_64_intdigest(s.numpy().data) for s in host]


def _word_sums(words: Tensor) -> Tensor:
    whole = len(words) // _ROW_WORDS * _ROW_WORDS
    rows = words[:whole].view(-1, _ROW_WORDS)
    return torch.cat(
        [rows.sum(0), rows.sum(1), words[whole:]]
    )  # integer sums wrap around, so their order does not matter
