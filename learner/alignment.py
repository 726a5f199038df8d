"""Alignment of all layers (REPR-ALIGN, arXiv 2605.06885): the student's hidden states at masked positions go with those
of the frozen ARLM, which reads the clean sequence causally.

The ARLM's states are made anew at the learner from a frozen copy: to ship d numbers a layer and position would take as
many times the payload of target `hidden` as there are layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.run import RunConfig
from common.config.terms import ExtraTerms
from common.student import load_model
from common.trajectory import Trajectory
from learner.packing import MicroBatch
from learner.terms import misalignment


@dataclass(frozen=True)
class ClearRows:
    """What the ARLM reads of a micro-batch: `ids` int64 [D, W], one clean sequence a row, padded; `row` and `column`
    int64 [L] say where the state stands that predicts the token of each masked position."""

    ids: Tensor
    row: Tensor
    column: Tensor


def clear_rows(batch: MicroBatch, trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The fields of ClearRows, in host memory."""
    docs, row = np.unique(batch.loss_doc, return_inverse=True)
    sequences = [trajectories[doc].causal_ids for doc in docs]
    ids = np.zeros((len(docs), max(map(len, sequences), default=1)), np.int64)
    for padded, sequence in zip(ids, sequences, strict=True):
        padded[: len(sequence)] = sequence
    column = np.maximum(batch.positions.ravel()[batch.loss_index] - 1, 0)
    return ids, row.astype(np.int64), column


class LayerAlignment:
    """Keeps what each layer of the student gives in a forward, and compares it with a frozen ARLM of as many layers.

    Life cycle: made once for a student that trains without recomputed activations; after each of its forwards `loss`
    once. Layer 0 is the embedding, the last one the final hidden state after the norm.
    """

    def __init__(self, student: PreTrainedModel, base: PreTrainedModel, terms: ExtraTerms) -> None:
        self.base = base.requires_grad_(False).eval()
        self.terms = terms
        self.states: list[Tensor] = []
        student.get_input_embeddings().register_forward_hook(self._first)
        for layer in student.model.layers[:-1]:
            layer.register_forward_hook(self._next)

    def _first(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.states = [output]

    def _next(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.states.append(output)

    def loss(self, final: Tensor, loss_index: Tensor, clear: ClearRows, coefficient: Tensor) -> Tensor:
        """sum_i c_i (1 - sum_l v_l cos(h_S^l,i, h_T^l,i)), v the weights of the layers, which add up to 1.

        Args:
            final: [R, W, d], the student's final hidden states.
        """
        with torch.no_grad():
            of_base = self.base.model(input_ids=clear.ids, use_cache=False, output_hidden_states=True).hidden_states
        own = [*self.states, final]
        self.states = []
        total = torch.zeros((), dtype=torch.promote_types(final.dtype, torch.float32), device=final.device)
        for layer, weight in self.terms.aligned(len(own)).items():
            student = own[layer].reshape(-1, own[layer].shape[-1])[loss_index]
            total = total + weight * misalignment(student, of_base[layer][clear.row, clear.column], coefficient)
        return total


def frozen_base(config: RunConfig, device: torch.device) -> PreTrainedModel | None:
    """The frozen copy that the student is aligned with; None: only final states are, or none."""
    if not config.objective.terms.aligns_layers:
        return None
    return load_model(config.teacher_path, getattr(torch, config.learner.dtype), "sdpa").to(device)
