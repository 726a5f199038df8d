"""Packing: trajectories become documents, documents become rows of a fixed width.

A document is `[clean blocks | noised blocks]` of one trajectory. Only what the loss depends on is in it: the clean
blocks before the last trained block, and the noised blocks that hold a masked trainable position. Noised tokens
repeat the positions of the clean ones; the mask (common/masks.py) tells them apart by their copy number.

The width of a row is the token budget for FlexAttention, which skips what the mask forbids, and the longest
document for a dense mask, whose cost grows with the width squared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.trajectory import Trajectory

PAD_DOCUMENT = -1


@dataclass(frozen=True)
class Document:
    """One trajectory as the student reads it in training; int arrays of equal length [N] but for the loss part.

    loss_index [L] points at masked trainable tokens; loss_target [L] at rows of the trajectory's targets;
    loss_weight [L] holds w (not normalised); loss_label [L] the tokens of x0; loss_round [L] the rounds in which they
    were revealed; loss_group [L] numbers the (state, block) that each is in. In a causal document
    next_index [A] points at the tokens before each response token, which next_label [A] holds; it has no loss part.
    """

    ids: np.ndarray
    positions: np.ndarray
    copy: np.ndarray
    block: np.ndarray
    loss_index: np.ndarray
    loss_target: np.ndarray
    loss_weight: np.ndarray
    loss_label: np.ndarray
    loss_round: np.ndarray
    loss_group: np.ndarray
    next_index: np.ndarray
    next_label: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class MicroBatch:
    """Packed documents: `ids`, `positions`, `copy`, `block`, `doc` int64 [R, W]; `doc` is -1 on padding.

    loss_index [L] points into the flattened R*W tokens; loss_doc [L] and loss_target [L] name the document of the
    update (its index there) and the row of its targets; loss_coefficient float32 [L] includes the normalisation;
    loss_label, loss_round and loss_group as in Document, groups numbered through. next_index [A] and
    next_label [A] are of all causal documents, with next_coefficient float32 [A].
    """

    ids: np.ndarray
    positions: np.ndarray
    copy: np.ndarray
    block: np.ndarray
    doc: np.ndarray
    loss_index: np.ndarray
    loss_doc: np.ndarray
    loss_target: np.ndarray
    loss_coefficient: np.ndarray
    loss_label: np.ndarray
    loss_round: np.ndarray
    loss_group: np.ndarray
    next_index: np.ndarray
    next_label: np.ndarray
    next_coefficient: np.ndarray

    @property
    def tokens(self) -> int:
        return int((self.doc != PAD_DOCUMENT).sum())


def document(trajectory: Trajectory, block_size: int, mask_token_id: int) -> Document:
    """The training document of a trajectory whose states were selected (shapes in Document)."""
    x0 = trajectory.x0.astype(np.int64)
    prompt = len(trajectory.prompt_ids)
    absolute = prompt + trajectory.masked_offsets.astype(np.int64)
    clean = (absolute.max() // block_size) * block_size if len(absolute) else 0

    ids, positions = [x0[:clean]], [np.arange(clean)]
    copies = [np.zeros(clean, np.int64)]
    loss_index, loss_target, loss_weight, loss_offset, loss_group = [], [], [], [], []
    length, groups = clean, 0
    for state in range(trajectory.state_count):
        of_state = trajectory.masked_state == state
        masked, weight = absolute[of_state], trajectory.loss_weight[of_state]
        blocks = np.unique(masked // block_size)
        where = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
        where = where[where < len(x0)]
        noised = x0[where]
        slot = np.searchsorted(where, masked)
        noised[slot] = mask_token_id
        ids.append(noised)
        positions.append(where)
        copies.append(np.full(len(where), state + 1))
        trained = weight > 0
        loss_index.append(length + slot[trained])
        loss_target.append(np.searchsorted(trajectory.target_offsets, masked[trained] - prompt))
        loss_weight.append(weight[trained])
        loss_offset.append(masked[trained] - prompt)
        loss_group.append(groups + np.searchsorted(blocks, masked[trained] // block_size))
        groups += len(blocks)
        length += len(where)
    all_positions = np.concatenate(positions)
    offsets = np.concatenate([np.empty(0, np.int64), *loss_offset])
    return Document(
        ids=np.concatenate(ids),
        positions=all_positions,
        copy=np.concatenate(copies),
        block=all_positions // block_size,
        loss_index=np.concatenate([np.empty(0, np.int64), *loss_index]),
        loss_target=np.concatenate([np.empty(0, np.int64), *loss_target]),
        loss_weight=np.concatenate([np.empty(0, np.float32), *loss_weight]),
        loss_label=x0[prompt + offsets],
        loss_round=trajectory.reveal_round[offsets],
        loss_group=np.concatenate([np.empty(0, np.int64), *loss_group]),
        next_index=np.empty(0, np.int64),
        next_label=np.empty(0, np.int64),
    )


def causal_document(trajectory: Trajectory) -> Document:
    """Prompt and response read autoregressively: blocks of one token make the attention rule causal."""
    ids = trajectory.causal_ids.astype(np.int64)
    positions, none = np.arange(len(ids) - 1), np.empty(0, np.int64)
    following = np.arange(max(len(trajectory.prompt_ids), 1), len(ids))
    return Document(
        ids=ids[:-1],
        positions=positions,
        copy=np.zeros(len(positions), np.int64),
        block=positions,
        loss_index=none,
        loss_target=none,
        loss_weight=np.empty(0, np.float32),
        loss_label=none,
        loss_round=none,
        loss_group=none,
        next_index=following - 1,
        next_label=ids[following],
    )


def coefficients(documents: list[Document], normalization: str) -> list[np.ndarray]:
    """Per document, float32 [L]: w times the normalisation over the update's rows.

    `row_mean`: mean over a row's positions, then over rows; `token_mean`: mean over all positions; `sum`: neither.
    Rows without a trained position do not count.
    """
    scale = scales([len(d.loss_index) for d in documents], normalization)
    return [(d.loss_weight * s).astype(np.float32) for d, s in zip(documents, scale, strict=True)]


def scales(counts: list[int], normalization: str) -> list[float]:
    """The normalisation of each row's positions, by their number per row."""
    rows, tokens = sum(c > 0 for c in counts), sum(counts)
    return {
        "row_mean": [1.0 / (rows * c) if c else 0.0 for c in counts],
        "row_sum": [1.0 / max(rows, 1)] * len(counts),
        "token_mean": [1.0 / max(tokens, 1)] * len(counts),
        "sum": [1.0] * len(counts),
    }[normalization]


def assign_ranks(lengths: list[int], ranks: int) -> list[list[int]]:
    """Document indices per rank, longest first to the least loaded; the same on every rank."""
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += lengths[index]
        shares[rank].append(index)
    return shares


def fill_rows(lengths: dict[int, int], width: int) -> list[list[int]]:
    """First-fit decreasing: documents per row, each row at most `width` tokens (a longer document stands alone)."""
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
        flexible_width: rows as wide as the budget (FlexAttention); else as the longest document (dense mask).
    """
    if not lengths:
        return []
    width = max_tokens if flexible_width else max(lengths.values())
    rows = fill_rows(lengths, width)
    per_batch = max(1, max_tokens // max(width, max(lengths.values())))
    return [rows[i : i + per_batch] for i in range(0, len(rows), per_batch)]


def microbatch(
    rows: list[list[int]],
    documents: dict[int, Document],
    coefficient: dict[int, np.ndarray],
    multiple: int = 8,
) -> MicroBatch:
    """Lay out rows of documents; the width is rounded up to `multiple`. `coefficient` [L + A] is by document."""
    width = max(sum(len(documents[i]) for i in row) for row in rows)
    width = -(-width // multiple) * multiple
    shape = (len(rows), width)
    ids, positions, copy = (np.zeros(shape, np.int64) for _ in range(3))
    block, doc = np.zeros(shape, np.int64), np.full(shape, PAD_DOCUMENT, np.int64)
    loss_index, loss_doc, loss_target, loss_coefficient, loss_group = [], [], [], [], []
    next_index, next_coefficient, groups = [], [], 0
    for r, row in enumerate(rows):
        start = 0
        for index in row:
            d = documents[index]
            span = slice(start, start + len(d))
            ids[r, span], positions[r, span], copy[r, span], block[r, span] = (
                d.ids,
                d.positions,
                d.copy,
                d.block,
            )
            doc[r, span] = index
            loss_index.append(r * width + start + d.loss_index)
            loss_doc.append(np.full(len(d.loss_index), index))
            loss_target.append(d.loss_target)
            loss_coefficient.append(coefficient[index][: len(d.loss_index)])
            loss_group.append(groups + d.loss_group)
            groups += int(d.loss_group.max(initial=-1)) + 1
            next_index.append(r * width + start + d.next_index)
            next_coefficient.append(coefficient[index][len(d.loss_index) :])
            start += len(d)
    return MicroBatch(
        ids=ids,
        positions=positions,
        copy=copy,
        block=block,
        doc=doc,
        loss_index=np.concatenate(loss_index),
        loss_doc=np.concatenate(loss_doc),
        loss_target=np.concatenate(loss_target),
        loss_coefficient=np.concatenate(loss_coefficient),
        loss_label=np.concatenate([documents[i].loss_label for row in rows for i in row]),
        loss_round=np.concatenate([documents[i].loss_round for row in rows for i in row]),
        loss_group=np.concatenate(loss_group),
        next_index=np.concatenate(next_index),
        next_label=np.concatenate([documents[i].next_label for row in rows for i in row]),
        next_coefficient=np.concatenate(next_coefficient),
    )
