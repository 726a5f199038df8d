"""What a record batch must hold beyond its schema, checked before anything is computed with it.

A wrong offset or id in a batch would otherwise train on other tokens without a word, or end the process on a GPU. All
checks work on whole columns: a record batch takes about a millisecond, where a loop over rows would take longer than to
read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from common.trajectory import NO_ROUND, OFFLINE, REPLAYED, TrajectoryMeta

_FINISH_REASONS = ("eos", "stop", "length")
_MASS = 0.02  # that probabilities of a target may differ from 1, rounding of bfloat16 logits included
_TARGETS = ("topk_ids", "topk_logprobs", "log_tail_mass", "hidden")
_PER_POSITION = ("reveal_round", "confidence")
_MASKED = ("masked_offsets", "masked_state", "loss_weight")
_LEAST = {
    "ordinal": 0,
    "sample": 0,
    "weights_version": REPLAYED,
    "denoise_forwards": 0,
    "commit_forwards": 0,
    "state_count": 0,
}
_ANY_ID = 2**31
_WORDS = 2**15  # of 8 bytes, looked at together: they stay in the cache


class TrajectoryError(ValueError):
    """A record batch that must not be used; the message names the column, the row and what is wrong."""


def check_batch(batch: pa.RecordBatch, vocabulary: int = _ANY_ID) -> TrajectoryMeta:
    """The metadata of a record batch that holds what common/trajectory.py says.

    Args:
        vocabulary: rows of the student's embedding, which every id is below, where that is known.

    Raises:
        TrajectoryError: a value is not possible; names column and row.
        ValueError: the schema is another (TrajectoryMeta.of).
    """
    meta = TrajectoryMeta.of(batch.schema)
    _check_meta(meta, vocabulary)
    _check_structure(batch)
    rows = _Rows(batch, meta)
    rows.check_scalars()
    rows.check_tokens(vocabulary)
    rows.check_rounds()
    rows.check_masked()
    rows.check_targets(vocabulary)
    return meta


def _check_meta(meta: TrajectoryMeta, vocabulary: int) -> None:
    if meta.block_size < 1:
        raise TrajectoryError(f"trajectory batch has block_size {meta.block_size}; it must be 1 or more")
    if not 0 <= meta.mask_token_id < vocabulary:
        raise TrajectoryError(f"trajectory batch has mask_token_id {meta.mask_token_id}, outside 0 to {vocabulary - 1}")
    if meta.target_kind not in ("none", "topk", "hidden"):
        raise TrajectoryError(f"trajectory batch has target_kind {meta.target_kind!r}; none, topk and hidden are known")
    if meta.hidden_dtype not in ("float32", "bfloat16"):
        raise TrajectoryError(
            f"trajectory batch has hidden_dtype {meta.hidden_dtype!r}; float32 and bfloat16 are known"
        )
    if (meta.target_width > 0) != (meta.target_kind != "none"):
        raise TrajectoryError(f"trajectory batch has target_width {meta.target_width} and target {meta.target_kind!r}")


def _check_structure(batch: pa.RecordBatch) -> None:
    """Offsets of lists within their values, text in UTF-8, nothing missing: what Arrow itself relies on."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise TrajectoryError(f"trajectory column {name!r} is damaged: {error}") from error
        values = column.values if pa.types.is_list(column.type) else column
        if column.null_count or values.null_count:
            raise TrajectoryError(f"trajectory column {name!r} has missing values; every value must be there")


@dataclass
class _List:
    """A list column: all values one after another, and per row where they begin and how many they are."""

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, column: pa.ListArray) -> _List:
        offsets = column.offsets.to_numpy()
        values = column.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]]
        return cls(values, offsets[:-1] - offsets[0], np.diff(offsets))

    @cached_property
    def row(self) -> np.ndarray:
        """int64 [values]: the row of each value."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def place(self) -> np.ndarray:
        """int64 [values]: the place of each value in its list."""
        return np.arange(len(self.values)) - np.repeat(self.starts, self.lengths)


class _Rows:
    """The columns of one record batch; each check raises TrajectoryError for the first row that fails."""

    def __init__(self, batch: pa.RecordBatch, meta: TrajectoryMeta) -> None:
        self.meta = meta
        self.scalars: dict[str, Any] = {}
        self.lists: dict[str, _List] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_list(column.type):
                self.lists[name] = _List.of(column)
            else:
                self.scalars[name] = np.asarray(column.to_pylist(), object if name == "finish_reason" else None)
        self.prompt, self.response, self.tail = (
            self.lists[f"{part}_ids"].lengths for part in ("prompt", "response", "tail")
        )
        self.written = self.response + self.tail

    def check_scalars(self) -> None:
        for name, least in _LEAST.items():
            self._at_least(name, least)
        reasons = self.scalars["finish_reason"]
        known = np.isin(reasons.astype(str), _FINISH_REASONS)
        self._require("finish_reason", known, lambda r: f"is {reasons[r]!r}; {', '.join(_FINISH_REASONS)} are known")

    def check_tokens(self, vocabulary: int) -> None:
        """Ids within the vocabulary; the sequence ends on the block grid; the tail lies in its last block."""
        for name in ("prompt_ids", "response_ids", "tail_ids", "shown_ids"):
            self._in_range(name, 0, vocabulary)
        block, mask = self.meta.block_size, self.meta.mask_token_id
        length = self.prompt + self.written
        self._require("tail_ids", length % block == 0, lambda r: f"ends at {length[r]}, off the grid of {block} tokens")
        cut = self.scalars["finish_reason"] == "stop"  # a stop string may begin in an earlier block
        self._require("tail_ids", (self.tail < block) | cut, lambda r: f"has {self.tail[r]} tokens, a block or more")
        response, tail = self.lists["response_ids"], self.lists["tail_ids"]
        self._each("response_ids", response, response.values != mask, lambda v: f"holds the mask token {v}")
        filled = (tail.values == mask) == self._offline[tail.row]
        self._each("tail_ids", tail, filled, lambda v: f"holds {v}; only offline responses are filled with masks")

    @property
    def _offline(self) -> np.ndarray:
        offline: np.ndarray = self.scalars["weights_version"] == OFFLINE
        return offline

    def check_rounds(self) -> None:
        """One round and confidence for every written position; the rounds of a block begin at 0 and leave none out."""
        for name in _PER_POSITION:
            self._same_length(name, self.written)
        confidence = self.lists["confidence"]
        possible = (confidence.values >= 0) & (confidence.values <= 1.001)  # false for NaN
        self._each("confidence", confidence, possible, lambda v: f"holds {v}, no probability")
        rounds, size = self.lists["reveal_round"], self.meta.block_size
        row = rounds.row
        offline = self._offline[row]
        possible = np.where(offline, rounds.values == NO_ROUND, (rounds.values >= 0) & (rounds.values < size))
        self._each("reveal_round", rounds, possible, lambda v: f"holds {v}, no round of a block of {size}")
        blocks = -(-(self.prompt + self.written) // size)
        first = np.cumsum(blocks) - blocks
        block = first[row] + (self.prompt[row] + rounds.place) // size
        seen = np.zeros((int(blocks.sum()), size), bool)
        seen[block[~offline], rounds.values[~offline]] = True
        gap = seen[:, 1:] & ~seen[:, :-1]
        if gap.any():
            bad = int(np.flatnonzero(gap.any(axis=1))[0])
            self._fail("reveal_round", int(np.searchsorted(first, bad, "right")) - 1, "leaves out a round of a block")

    def check_masked(self) -> None:
        """Masked positions in order and within the sequence; what is trained is in the response and has a target."""
        offsets, states, weights = (self.lists[name] for name in _MASKED)
        for name in _MASKED[1:]:
            self._same_length(name, offsets.lengths)
        row = offsets.row
        inside = (offsets.values >= 0) & (offsets.values < self.written[row])
        self._each("masked_offsets", offsets, inside, lambda v: f"holds {v}, outside response and tail")
        known = (states.values >= 0) & (states.values < self.scalars["state_count"][row])
        self._each("masked_state", states, known, lambda v: f"holds {v}, not below state_count")
        later = np.diff(states.values.astype(np.int64) * 2**32 + offsets.values) > 0
        self._each("masked_offsets", offsets, _within_rows(offsets, later), lambda v: f"holds {v} out of order")
        shown = self.lists["shown_ids"].lengths
        self._same_length("shown_ids", np.where(shown > 0, offsets.lengths, 0))
        first_of_state = _starts(offsets)
        first_of_state[1:] |= np.diff(states.values) != 0
        count, told = np.bincount(row[first_of_state], minlength=len(self.written)), self.scalars["state_count"]
        self._require("state_count", count == told, lambda r: f"is {told[r]}, and {count[r]} have masked positions")
        fine = (weights.values >= 0) & (weights.values < np.inf)  # false for NaN
        self._each("loss_weight", weights, fine, lambda v: f"holds {v}; a weight is finite and 0 or more")
        trained = weights.values > 0
        fine = ~trained | (offsets.values < self.response[row])
        self._each("loss_weight", weights, fine, lambda v: f"holds {v} for the tail, which is never trained")
        targets = self.lists["target_offsets"]
        inside = (targets.values >= 0) & (targets.values < self.response[targets.row])
        self._each("target_offsets", targets, inside, lambda v: f"holds {v}, outside the response")
        later = np.diff(targets.values) > 0
        self._each("target_offsets", targets, _within_rows(targets, later), lambda v: f"holds {v} out of order")
        first = np.cumsum(self.written) - self.written
        needed, asked = np.zeros((2, int(self.written.sum())), bool)
        needed[(first[row] + offsets.values)[trained]] = True
        asked[first[targets.row] + targets.values] = True
        missing = needed & ~asked
        if missing.any():
            place = int(np.argmax(missing))
            bad = int(np.searchsorted(first, place, "right")) - 1
            self._fail("target_offsets", bad, f"lacks {place - first[bad]}, which is trained")

    def check_targets(self, vocabulary: int) -> None:
        """As many targets as are asked for, each a distribution or finite hidden states."""
        kind, width = self.meta.target_kind, self.meta.target_width
        asked = self.lists["target_offsets"].lengths
        expected = {
            "topk_ids": width if kind == "topk" else 0,
            "topk_logprobs": width if kind == "topk" else 0,
            "log_tail_mass": int(kind == "topk"),
            "hidden": width if kind == "hidden" else 0,
        }
        for name in _TARGETS:
            self._same_length(name, asked * expected[name])
        self._in_range("topk_ids", 0, vocabulary)
        if kind == "topk":
            self._check_mass(width)
        hidden = self.lists["hidden"]
        if not all_finite(hidden.values):
            wide = hidden.values.astype(np.uint32) << 16 if hidden.values.dtype == np.uint16 else hidden.values
            finite = np.isfinite(wide.view(np.float32))
            self._each("hidden", hidden, finite, lambda v: "holds values that are not finite")

    def _check_mass(self, width: int) -> None:
        logprobs, tail = self.lists["topk_logprobs"], self.lists["log_tail_mass"]
        # -inf is the log of no probability: a token that the target's reshaping has cut
        possible = logprobs.values <= 1e-3
        self._each("topk_logprobs", logprobs, possible, lambda v: f"holds {v}, no log-probability")
        possible = (tail.values <= 1e-3) & (tail.values > -np.inf)
        self._each("log_tail_mass", tail, possible, lambda v: f"holds {v}, no finite log-probability")
        mass = np.exp(logprobs.values).reshape(-1, width).sum(axis=1) + np.exp(tail.values)
        self._each(
            "log_tail_mass",
            tail,
            np.abs(mass - 1) < _MASS,
            lambda v: f"holds {v}: with topk_logprobs the mass is not 1",
        )

    def _at_least(self, name: str, least: int) -> None:
        values = self.scalars[name]
        self._require(name, values >= least, lambda row: f"is {values[row]}, below {least}")

    def _in_range(self, name: str, low: int, high: int) -> None:
        column = self.lists[name]
        inside = (column.values >= low) & (column.values < high)
        self._each(name, column, inside, lambda v: f"holds {v}, outside {low} to {high - 1}")

    def _same_length(self, name: str, expected: np.ndarray) -> None:
        lengths = self.lists[name].lengths
        self._require(name, lengths == expected, lambda r: f"has {lengths[r]} values, expected {expected[r]}")

    def _each(self, name: str, column: _List, fine: np.ndarray, said: Callable[[Any], str]) -> None:
        if not fine.all():
            bad = int(np.argmin(fine))
            self._fail(name, int(column.row[bad]), said(column.values[bad]))

    def _require(self, name: str, fine: np.ndarray, said: Callable[[int], str]) -> None:
        if not fine.all():
            row = int(np.argmin(fine))
            self._fail(name, row, said(row))

    def _fail(self, name: str, row: int, said: str) -> None:
        key = self.scalars["ordinal"][row], self.scalars["sample"][row]
        raise TrajectoryError(f"trajectory column {name!r} {said} (row {row}, ordinal {key[0]}, sample {key[1]})")


def _within_rows(column: _List, later: np.ndarray) -> np.ndarray:
    """`later` bool [values - 1] of neighbours, for each value: the first of a row has none before it."""
    fine = _starts(column)
    fine[1:] |= later
    return fine


def _starts(column: _List) -> np.ndarray:
    """bool [values]: the first of each row."""
    first = np.zeros(len(column.values), bool)
    first[column.starts[column.lengths > 0]] = True
    return first


def all_finite(values: np.ndarray) -> bool:
    """Whether float32 values, or uint16 bits of bfloat16, are all finite: none has all bits of the exponent set."""
    exponent, one = (0x7F80, 0x0080) if values.dtype == np.uint16 else (0x7F800000, 0x00800000)
    lanes = 8 // values.itemsize
    spread = sum(1 << (8 * values.itemsize * lane) for lane in range(lanes))
    bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")
    whole = len(bits) // lanes * lanes
    words = bits[:whole].view(np.uint64)
    # the exponent's last bit added: only a full exponent carries into the sign's place
    mask, add, sign = (np.uint64(n * spread) for n in (exponent, one, exponent + one))
    for start in range(0, len(words), _WORDS):
        if (((words[start : start + _WORDS] & mask) + add) & sign).any():
            return False
    return bool(((bits[whole:] & exponent) != exponent).all())
