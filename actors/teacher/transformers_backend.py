"""The teacher on the Hugging Face class itself: no engine, every platform, the reference for the other backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from actors.teacher.block_aware import block_aware
from actors.teacher.targets import (
    HiddenTargets,
    TargetRequest,
    Targets,
    TeacherBackend,
    TopkTargets,
    hidden_array,
    log_tail_mass,
)
from common.config.teacher import TeacherConfig
from common.device import device_for
from common.memory_budget import MemoryBudget
from common.padded_batches import padded_batches
from common.student import lm_head_weight, load_model

LOGITS_ROWS = 1024  # positions per product with the LM head: 0.6 GiB of float32 at a vocabulary of 152k


class TransformersBackend(TeacherBackend):
    """Sequences of similar length share one causal forward of at most `max_batched_tokens` tokens with padding.

    A longer sequence is read alone. The LM head is applied at the requested positions only.
    """

    def __init__(self, config: TeacherConfig, model_path: str, tokens: int | None = None) -> None:
        self.device = device_for("teacher", config.resources)
        self.model = self._load(config, model_path)
        self.budget = MemoryBudget("teacher.max_batched_tokens", config.max_batched_tokens)
        self.tokens = tokens
        model = self.model.config
        super().__init__(
            kind=config.target,
            width=config.top_k if config.target == "topk" else model.hidden_size,
            hidden_dtype=config.dtype,
            vocab_size=model.vocab_size,
            max_length=model.max_position_embeddings,
            tokens=tokens,
        )

    def _load(self, config: TeacherConfig, model_path: str) -> PreTrainedModel:
        return load_model(model_path, getattr(torch, config.dtype), "sdpa").to(self.device)

    def _forward(self, requests: Sequence[TargetRequest]) -> list[Targets]:
        """Where memory runs out, the rest is read in smaller batches, down to one sequence at a time."""
        answers: dict[int, Targets] = {}
        while left := [row for row in range(len(requests)) if row not in answers]:
            for places in padded_batches([len(requests[row].ids) for row in left], self.budget.value):
                rows = [left[place] for place in places]
                read = self._read([requests[row] for row in rows])
                if read is None:
                    break
                answers |= zip(rows, read, strict=True)
        return [answers[row] for row in range(len(requests))]

    def _read(self, batch: list[TargetRequest]) -> list[Targets] | None:
        """The targets of one forward; None where memory ran out, and from now on fewer sequences are read at once.

        Raises:
            torch.OutOfMemoryError: it does not hold a single sequence.
        """
        try:
            return self._targets(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise torch.OutOfMemoryError(
                    f"the teacher's memory does not hold one sequence of {len(batch[0].ids)} tokens: lower "
                    "curriculum.max_tokens, or give the teacher another GPU"
                ) from error
        self.budget.halve(most=len(batch) * max(len(r.ids) for r in batch))
        return None

    @torch.inference_mode()
    def _targets(self, batch: list[TargetRequest]) -> list[Targets]:
        return [self._targets_of(hidden) for hidden in causal_hidden_states(self.model, batch)]

    def block_aware(
        self, request: TargetRequest, targets: TopkTargets, block_size: int, share: float, routed: np.ndarray
    ) -> TopkTargets:
        return block_aware(self.model, request, targets, block_size, share, routed, self.tokens)

    def take_notes(self) -> list[str]:
        return self.budget.take_notes()

    def _targets_of(self, hidden: Tensor) -> Targets:
        if self.kind == "hidden":
            return HiddenTargets(hidden_array(hidden, self.hidden_dtype))
        best = [self._topk(rows) for rows in hidden.split(LOGITS_ROWS)]
        logprobs = torch.cat([values for values, _ in best]).cpu().numpy()
        ids = torch.cat([indices for _, indices in best]).to(torch.int32).cpu().numpy()
        return TopkTargets(ids, logprobs, log_tail_mass(logprobs))

    def _topk(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = linear(hidden, lm_head_weight(self.model))[:, : self.tokens].float()
        values, ids = logits.topk(self.width, dim=-1)
        return values - logits.logsumexp(dim=-1, keepdim=True), ids


def causal_hidden_states(model: PreTrainedModel, batch: Sequence[TargetRequest]) -> list[Tensor]:
    """For each request, the final hidden states [n, d] that predict its positions; one causal forward."""
    ids = torch.zeros(len(batch), max(len(r.ids) for r in batch), dtype=torch.int64)
    for row, request in enumerate(batch):
        ids[row, : len(request.ids)] = torch.from_numpy(request.ids.astype(np.int64))
    # padding is to the right of all requested positions, so the causal mask is enough
    states = model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return [states[row, torch.from_numpy(r.positions.astype(np.int64) - 1)] for row, r in enumerate(batch)]
