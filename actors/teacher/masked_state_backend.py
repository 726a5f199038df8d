"""A block-diffusion model as teacher: it reads the same masked state as the student (BARD, arXiv 2604.16514).

The target of a masked position is the teacher's own distribution there, given the clean tokens of the blocks before and
its own block as the state has it. Blocks are those of the teacher's own size, so that a teacher of small blocks can
teach a student of larger ones: what of the student's block lies in earlier blocks of the teacher is clean for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.teacher.targets import TargetRequest, Targets
from actors.teacher.transformers_backend import TransformersBackend
from common.config.teacher import TeacherConfig
from common.masks import dense_mask, per_layer_kind
from common.student import attention_windows, hidden_states, noised_masks
from common.trajectory import Trajectory

_PADDING = -1  # a document of its own


@dataclass(frozen=True)
class PackedStates(TargetRequest):
    """A sequence's clean blocks and behind them noised blocks: `ids`, `place` (position in the sequence) and `copy`,
    int64 [length]; `positions` are the columns whose distributions are asked for."""

    place: np.ndarray
    copy: np.ndarray


def packed_states(request: TargetRequest, block_size: int, mask_token_id: int) -> PackedStates:
    """The blocks that hold positions of a request, each as the state has it in which the position is masked."""
    x0, asked = request.ids.astype(np.int64), request.positions
    masked = asked if request.masked is None else request.masked
    state = np.zeros(len(masked), np.int64) if request.state is None else request.state
    order = np.argsort(masked, kind="stable")
    state_of = state[order][np.searchsorted(masked[order], asked)]
    clean = np.arange(asked.max() // block_size * block_size)
    ids, place, copy = [x0[clean]], [clean], [np.zeros_like(clean)]
    column, length = np.empty(len(asked), np.int64), len(clean)
    for number in np.unique(state_of):
        noised = x0.copy()
        here = state == number
        noised[masked[here]] = mask_token_id if request.shown is None else request.shown[here]
        own = state_of == number
        blocks = np.unique(asked[own] // block_size)
        where = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
        where = where[where < len(x0)]
        column[own] = length + np.searchsorted(where, asked[own])
        ids.append(noised[where])
        place.append(where)
        copy.append(np.full(len(where), number + 1))
        length += len(where)
    return PackedStates(
        ids=np.concatenate(ids), positions=column, place=np.concatenate(place), copy=np.concatenate(copy)
    )


class MaskedStateBackend(TransformersBackend):
    """Packed block-causal forwards of a student's folder, whose config knows its block size and mask token."""

    def __init__(self, config: TeacherConfig, model_path: str, tokens: int | None = None) -> None:
        super().__init__(config, model_path, tokens)
        self.block_size = int(self.model.config.block_size)
        self.mask_token_id = int(self.model.config.mask_token_id)
        self.windows = attention_windows(self.model.config)

    def request(self, trajectory: Trajectory) -> TargetRequest:
        prompt = len(trajectory.prompt_ids)
        return TargetRequest(
            trajectory.x0,
            prompt + trajectory.target_offsets,
            masked=prompt + trajectory.masked_offsets,
            state=trajectory.masked_state,
            shown=trajectory.shown_ids if len(trajectory.shown_ids) else None,
        )

    def _prepared(self, request: TargetRequest) -> PackedStates:
        return packed_states(request, self.block_size, self.mask_token_id)

    @torch.inference_mode()
    def _targets(self, batch: list[TargetRequest]) -> list[Targets]:
        width = max(len(r.ids) for r in batch)

        def padded(name: str, value: int = 0) -> Tensor:
            rows = torch.full((len(batch), width), value, dtype=torch.int64)
            for row, request in zip(rows, batch, strict=True):
                row[: len(request.ids)] = torch.from_numpy(getattr(request, name))
            return rows.to(self.model.device)

        ids, place, copy = padded("ids"), padded("place"), padded("copy", _PADDING)
        doc, block = torch.where(copy == _PADDING, _PADDING, 0), place // self.block_size
        mask = per_layer_kind(self.windows, lambda window: dense_mask(doc, copy, block, place, window))
        states = hidden_states(self.model, ids, place, mask, noised_masks(self.model, ids, copy))
        return [self._targets_of(states[row, torch.from_numpy(r.positions)]) for row, r in enumerate(batch)]
