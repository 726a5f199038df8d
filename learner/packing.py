"""Packing: trajectories become documents, documents become rows, rows become micro-batches.

A document is `[clean blocks | noised blocks]` of one trajectory. Only what the loss depends on is in it: the clean
blocks before the last trained block, and the noised blocks that hold a masked trainable position. Noised tokens
repeat the positions of the clean ones; the mask (common/masks.py) tells them apart by their copy number.

Packing to a token budget was chosen over padding to the longest row, which computes mostly padding when one response
has 100 tokens and the next 4,000, and over truncation, which drops tokens that were already generated and annotated. A
document is never split over rows: its last noised block attends to all of its clean blocks. So a document longer than
the budget gets a row, and a micro-batch, of its own.

The width of a row is the token budget for FlexAttention, which skips what the mask forbids, and the longest
document for a dense mask, whose cost grows with the width squared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from common.config.model import AttentionContext
from common.masks import block_numbers
from common.trajectory import Trajectory

PAD_DOCUMENT = -1
_TOKEN_FIELDS = ("ids", "positions", "copy", "block", "doc")


def _column(dtype: type = np.int64, moves_with: str | None = None) -> Any:
    """A field that is empty by default. `moves_with`: it counts `tokens` or `groups` from the start of its part."""
    return field(default_factory=lambda: np.empty(0, dtype), metadata={"moves_with": moves_with})


@dataclass(frozen=True, kw_only=True)
class Document:
    """Tokens of one trajectory as the student reads them in training, or a part of them.

    ids, positions, copy, block: int64 [N], what the model and the mask take.
    loss_*: of the L masked tokens that are trained. `loss_index` int64 points at them, `loss_target` int64 at their
    rows in the trajectory's targets; `loss_weight` float32 is w, not normalised; `loss_label` int64 is the token of
    x0, `loss_round` int16 the round that revealed it; `loss_group` int64 numbers the (state, block) that it is in.
    `before_index` int64 [L] points at the clean token before each, where the student is its own teacher; else empty.
    next_*: of a causal document, which has nothing masked. `next_index` int64 [A] points at the token before each
    response token, `next_label` int64 [A] is that response token.
    """

    ids: np.ndarray
    positions: np.ndarray
    copy: np.ndarray
    block: np.ndarray
    loss_index: np.ndarray = _column(moves_with="tokens")
    loss_target: np.ndarray = _column()
    loss_weight: np.ndarray = _column(np.float32)
    loss_label: np.ndarray = _column()
    loss_round: np.ndarray = _column(np.int16)
    loss_group: np.ndarray = _column(moves_with="groups")
    before_index: np.ndarray = _column(moves_with="tokens")
    next_index: np.ndarray = _column(moves_with="tokens")
    next_label: np.ndarray = _column()

    def __len__(self) -> int:
        return self.ids.size

    @property
    def groups(self) -> int:
        """How many groups `loss_group` numbers."""
        return int(self.loss_group.max(initial=-1)) + 1


@dataclass(frozen=True, kw_only=True)
class MicroBatch(Document):
    """Documents side by side in R rows of W tokens.

    `ids`, `positions`, `copy`, `block` and `doc` are int64 [R, W]; the other fields are those of all documents, one
    after another. Indices point into the R*W tokens, and no two documents share a group number. `doc` and `loss_doc`
    int64 [L] are the document's index in the update; `doc` is -1 on padding. `loss_coefficient` [L] and
    `next_coefficient` [A], float32, include the normalisation.
    """

    doc: np.ndarray
    loss_doc: np.ndarray = _column()
    loss_coefficient: np.ndarray = _column(np.float32)
    next_coefficient: np.ndarray = _column(np.float32)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.doc != PAD_DOCUMENT).sum())


Part = TypeVar("Part", bound=Document)


def joined(parts: Sequence[Part]) -> Part:
    """All parts one after another, in every field; indices and group numbers count on from the parts before.

    Documents and micro-batches are made here and nowhere else, so a new field cannot be forgotten.
    """
    before = {
        "tokens": list(accumulate((len(p) for p in parts), initial=0)),
        "groups": list(accumulate((p.groups for p in parts), initial=0)),
    }

    def column(name: str, moves_with: str | None) -> np.ndarray:
        values = [getattr(p, name) for p in parts]
        if moves_with:
            values = [v + start for v, start in zip(values, before[moves_with], strict=False)]
        return np.concatenate(values)

    return type(parts[0])(**{f.name: column(f.name, f.metadata.get("moves_with")) for f in fields(parts[0])})


def document(
    trajectory: Trajectory,
    block_size: int,
    mask_token_id: int,
    context: AttentionContext = "block",
    with_targets: bool = False,
) -> Document:
    """The training document of a trajectory whose states were selected; `context`: what its clean tokens see.

    `with_targets`: its clean tokens, which see what stands before them, go on to the last one that predicts a trained
    token.
    """

    def numbers(positions: np.ndarray, copy: np.ndarray) -> np.ndarray:
        return block_numbers(positions, copy, block_size, context)

    x0 = trajectory.x0.astype(np.int64)
    prompt = len(trajectory.prompt_ids)
    absolute = prompt + trajectory.masked_offsets.astype(np.int64)
    last_block = (absolute.max() // block_size) * block_size if len(absolute) else 0
    last_trained = absolute[trajectory.loss_weight > 0].max(initial=0) if with_targets else 0
    clean = np.arange(max(last_block, last_trained))
    unmasked = np.zeros_like(clean)
    parts = [Document(ids=x0[clean], positions=clean, copy=unmasked, block=numbers(clean, unmasked))]
    for state in range(trajectory.state_count):
        of_state = trajectory.masked_state == state
        masked, weight = absolute[of_state], trajectory.loss_weight[of_state]
        blocks = np.unique(masked // block_size)
        where = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
        where = where[where < len(x0)]
        slot = np.searchsorted(where, masked)
        noised = x0[where]
        noised[slot] = trajectory.shown_at(of_state, mask_token_id)
        trained = masked[weight > 0]
        copy = np.full(len(where), state + 1)
        parts.append(
            Document(
                ids=noised,
                positions=where,
                copy=copy,
                block=numbers(where, copy),
                loss_index=slot[weight > 0],
                loss_target=np.searchsorted(trajectory.target_offsets, trained - prompt),
                loss_weight=weight[weight > 0],
                loss_label=x0[trained],
                loss_round=trajectory.reveal_round[trained - prompt],
                loss_group=np.searchsorted(blocks, trained // block_size),
            )
        )
    whole = joined(parts)
    # the clean tokens stand first, each at the place of its position
    return replace(whole, before_index=whole.positions[whole.loss_index] - 1) if with_targets else whole


def causal_document(trajectory: Trajectory) -> Document:
    """Prompt and response as an autoregressive model reads them: with blocks of one token the mask is causal."""
    ids = trajectory.causal_ids.astype(np.int64)
    positions = np.arange(len(ids) - 1)
    following = np.arange(max(len(trajectory.prompt_ids), 1), len(ids))
    return Document(
        ids=ids[:-1],
        positions=positions,
        copy=np.zeros_like(positions),
        block=positions,
        next_index=following - 1,
        next_label=ids[following],
    )


def empty_document(block_size: int) -> Document:
    """One clean block that trains nothing, for a rank that has less to do than the others."""
    zeros = np.zeros(block_size, np.int64)
    return Document(ids=zeros, positions=np.arange(block_size), copy=zeros, block=zeros)


def coefficients(documents: Sequence[Document], normalization: str) -> list[np.ndarray]:
    """Per document, float32 [L + A]: w, or 1 for next tokens, times the normalisation over the update's rows.

    `row_mean`: mean over a row's positions, then over rows; `row_sum`: sum over a row's positions, then mean over
    rows; `token_mean`: mean over all positions; `sum`: neither. Rows without a trained position do not count.
    """
    weights = [np.concatenate([d.loss_weight, np.ones(len(d.next_index), np.float32)]) for d in documents]
    rows, tokens = sum(len(w) > 0 for w in weights), sum(len(w) for w in weights)
    scale = {
        "row_mean": lambda count: 1.0 / (rows * count),
        "row_sum": lambda count: 1.0 / rows,
        "token_mean": lambda count: 1.0 / tokens,
        "sum": lambda count: 1.0,
    }[normalization]
    return [(w * scale(len(w))).astype(np.float32) if len(w) else w for w in weights]


def assign_ranks(lengths: list[int], ranks: int) -> list[list[int]]:
    """Document indices per rank: longest first, each to the rank with the fewest tokens; the same on every rank."""
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += lengths[index]
        shares[rank].append(index)
    return shares


def fill_rows(lengths: dict[int, int], width: int) -> list[list[int]]:
    """Document indices per row of at most `width` tokens, by first-fit decreasing; a longer document is a row alone."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(lengths, key=lambda i: (-lengths[i], i)):
        fits = next((r for r, free in enumerate(room) if free >= lengths[index]), None)
        if fits is None:
            rows.append([])
            room.append(max(width, lengths[index]))
            fits = len(rows) - 1
        rows[fits].append(index)
        room[fits] -= lengths[index]
    return rows


def plan_microbatches(lengths: dict[int, int], max_tokens: int, flexible_width: bool) -> list[list[list[int]]]:
    """Micro-batches of rows of document indices, each at most `max_tokens` tokens with padding.

    Args:
        lengths: tokens by document index.
        flexible_width: rows may be as wide as the budget (FlexAttention), else as the longest document (dense mask).
    """
    if not lengths:
        return []
    width = max_tokens if flexible_width else max(lengths.values())
    rows = fill_rows(lengths, width)
    per_batch = max(1, max_tokens // max(width, max(lengths.values())))
    return [rows[i : i + per_batch] for i in range(0, len(rows), per_batch)]


def rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def microbatch(
    rows: list[list[int]],
    documents: Mapping[int, Document],
    coefficient: Mapping[int, np.ndarray],
    width_for: Callable[[int], int] = lambda longest: rounded_up(longest, 8),
) -> MicroBatch:
    """Lay out rows of document indices, all of one width.

    Args:
        documents, coefficient: by document index; the coefficients are float32 [L + A].
        width_for: the width of rows of which the longest holds so many tokens; products like multiples of 8.
    """
    lengths = [sum(len(documents[i]) for i in row) for row in rows]
    width = width_for(max(lengths))
    parts = []
    for row, length in zip(rows, lengths, strict=True):
        parts += [_placed(index, documents[index], coefficient[index]) for index in row]
        parts.append(_padding(width - length))
    batch = joined(parts)
    return replace(batch, **{name: getattr(batch, name).reshape(len(rows), width) for name in _TOKEN_FIELDS})


def _placed(index: int, document: Document, coefficient: np.ndarray) -> MicroBatch:
    trained = len(document.loss_index)
    return MicroBatch(
        **vars(document),
        doc=np.full(len(document), index),
        loss_doc=np.full(trained, index),
        loss_coefficient=coefficient[:trained],
        next_coefficient=coefficient[trained:],
    )


def _padding(length: int) -> MicroBatch:
    zeros = np.zeros(length, np.int64)
    return MicroBatch(ids=zeros, positions=zeros, copy=zeros, block=zeros, doc=np.full(length, PAD_DOCUMENT))
