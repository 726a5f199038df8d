"""Prefixes that sequences have in common: keys and values of clean tokens, kept from one sequence to the next.

What is cached of a block depends on its tokens and on those before it alone, and blocks are counted from position 0. So
sequences that begin with the same blocks share what is cached of them: a chat's history, a system prompt.

Prefixes are kept in pages of whole blocks. A page's key is a hash of all tokens up to its end. Pages are copied into a
slot and out of it, since a position is a plain index into its slot; reading them in place would save the copy, and
would need kernels that look up pages.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.sampler.cache import SlotCache
from common.grid import grid_ceil

PAGE_TOKENS = 16  # or the next multiple of the block size
_WORTH_TOKENS = 256  # that are not computed twice are worth a forward more


class PrefixCache:
    """Pages of the weights `version`; the ones that were not used for the longest time make room for new ones.

    `read` copies what is known of a sequence into its slot, `write` keeps what a slot holds.
    """

    def __init__(self, like: SlotCache, block_size: int, tokens: int, version: int) -> None:
        """Memory for `tokens` tokens, whole pages, at least one, laid out like that of `like`."""
        self.page = grid_ceil(PAGE_TOKENS, block_size)
        self.version = version
        _, layers, _, kv_heads, _, width = like.memory.shape
        count = max(tokens // self.page, 1)
        self._memory = like.memory.new_zeros(2, layers, count, kv_heads, self.page, width)
        self._at: OrderedDict[bytes, int] = OrderedDict()  # places of pages by key, the one used last at the end
        self._free = list(range(count))

    @property
    def tokens(self) -> int:
        """Tokens that are kept."""
        return len(self._at) * self.page

    def forget(self, version: int) -> None:
        """Drop all pages: the weights are others now."""
        self.version = version
        self._free += self._at.values()
        self._at.clear()

    def waves(self, sequences: Sequence[tuple[int, np.ndarray]]) -> list[list[tuple[int, np.ndarray]]]:
        """The sequences in the order in which they are to be computed: those that begin as an earlier one of them does,
        further than is known, come in a second part, and find that beginning kept. In one part where that saves little.
        """
        first: list[tuple[int, np.ndarray]] = []
        later: list[tuple[int, np.ndarray]] = []
        coming: set[bytes] = set()
        saved = 0
        for sequence in sequences:
            unknown = [key for key in self._keys(sequence[1]) if key not in self._at]
            shared = sum(key in coming for key in unknown)
            saved += shared * self.page
            if shared:
                later.append(sequence)
            else:
                first.append(sequence)
                coming.update(unknown)
        return [first, later] if saved >= _WORTH_TOKENS else [list(sequences)]

    def read(self, cache: SlotCache, sequences: Sequence[tuple[int, np.ndarray]]) -> list[int]:
        """Copy what is known of each sequence, given as its slot and its token ids, into the slot; returns how many
        tokens that is, whole pages."""
        known = []
        places: list[tuple[int, int, int]] = []
        for slot, ids in sequences:
            found = []
            for key in self._keys(ids):
                if key not in self._at:
                    break
                found.append(key)
            self._touch(found)
            places += [(slot, number, self._at[key]) for number, key in enumerate(found)]
            known.append(len(found) * self.page)
        if places:
            slots, numbers, at = self._on_device(places)
            self._paged(cache)[:, :, slots, :, numbers] = self._memory[:, :, at].movedim(2, 0)
        return known

    def write(self, cache: SlotCache, sequences: Sequence[tuple[int, np.ndarray]]) -> None:
        """Keep the complete pages of each sequence, given as its slot and the ids of the tokens that are cached there
        clean."""
        places: list[tuple[int, int, int]] = []
        for slot, ids in sequences:
            keys = self._keys(ids)[: self._memory.shape[2]]
            self._touch([key for key in keys if key in self._at])
            for number, key in enumerate(keys):
                if key not in self._at:
                    self._at[key] = self._free.pop() if self._free else self._at.popitem(last=False)[1]
                    places.append((slot, number, self._at[key]))
            self._touch(keys)
        if places:
            slots, numbers, at = self._on_device(list({place[2]: place for place in places}.values()))
            self._memory[:, :, at] = self._paged(cache)[:, :, slots, :, numbers].movedim(0, 2)

    def _touch(self, keys: list[bytes]) -> None:
        """These are used now; of one prefix its end is forgotten before its beginning."""
        for key in reversed(keys):
            self._at.move_to_end(key)

    def _keys(self, ids: np.ndarray) -> list[bytes]:
        """The keys of the complete pages of a sequence. A hash that nobody can invert, so that no client can make
        another's prompt go on from what is not its own beginning."""
        hashed = hashlib.blake2b(digest_size=16)
        keys = []
        for start in range(0, len(ids) - self.page + 1, self.page):
            hashed.update(np.ascontiguousarray(ids[start : start + self.page], np.int64).tobytes())
            keys.append(hashed.copy().digest())
        return keys

    def _paged(self, cache: SlotCache) -> Tensor:
        """The slots' memory [2, layers, slots, kv_heads, pages, page, D], a view."""
        whole = cache.memory.shape[4] // self.page * self.page
        return cache.memory[:, :, :, :, :whole].unflatten(4, (-1, self.page))

    def _on_device(self, places: list[tuple[int, int, int]]) -> Tensor:
        """int64 [3, N]: slots, pages of their sequences, places here."""
        host = torch.from_numpy(np.array(places).T.copy())
        device = self._memory.device
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
