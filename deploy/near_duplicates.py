"""Near-duplicates of texts: found by MinHash, confirmed by the exact similarity.

A text is compared without case, punctuation and white space runs, as the set of its runs of five characters (shingles,
hashed with xxh64). Two texts are near-duplicates if their sets have a Jaccard similarity, shared by all, of at least
0.8. Candidates are found by locality-sensitive hashing: 64 MinHashes in 16 bands of 4, which misses a pair with a
similarity of 0.8 in one of 5,000 cases. The cost is linear in the number of texts, and nothing is random between runs.
(Broder, On the resemblance and containment of documents, 1997.)
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import xxhash

SIMILARITY = 0.8
_SHINGLE = 5  # characters
_BANDS, _ROWS = 16, 4
_NO_LETTERS = re.compile(r"[\W_]+")
_SEED = 20240101
_rng = np.random.default_rng(_SEED)
_FACTORS = _rng.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64) | np.uint64(1)
_OFFSETS = _rng.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64)


class NearDuplicates:
    """The texts that were seen; asked and told in one order, the answers are always the same."""

    def __init__(self) -> None:
        self._shingles: list[np.ndarray] = []  # uint64, sorted, of each text that was new
        self._buckets: dict[tuple[int, bytes], list[int]] = {}

    def is_new(self, text: str) -> bool:
        """Whether no text like this one was new before; it then counts as seen."""
        shingles = _hashed_shingles(text)
        bands = list(enumerate(_signature(shingles).reshape(_BANDS, _ROWS)))
        keys = [(band, row.tobytes()) for band, row in bands]
        candidates = {index for key in keys for index in self._buckets.get(key, ())}
        if any(_similarity(shingles, self._shingles[index]) >= SIMILARITY for index in candidates):
            return False
        for key in keys:
            self._buckets.setdefault(key, []).append(len(self._shingles))
        self._shingles.append(shingles)
        return True


def _hashed_shingles(text: str) -> np.ndarray:
    """uint64 [n], sorted and distinct, n >= 1."""
    words = _NO_LETTERS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    runs = {words[i : i + _SHINGLE] for i in range(max(1, len(words) - _SHINGLE + 1))}
    return np.unique(np.array([xxhash.xxh64_intdigest(run.encode()) for run in runs], np.uint64))


def _signature(shingles: np.ndarray) -> np.ndarray:
    """uint64 [64]: the least value of each of the hash functions x -> high bits of (factor * x + offset)."""
    mixed = shingles[:, None] * _FACTORS + _OFFSETS  # modulo 2**64
    return (mixed ^ (mixed >> np.uint64(32))).min(axis=0)


def _similarity(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
