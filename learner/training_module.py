"""The student and its loss in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.divergences import ForwardKL
from common.config.run import RunConfig
from common.student import hidden_states, lm_head_weight, noised_masks
from learner.alignment import LayerAlignment
from learner.batches import TrainingBatch
from learner.objective import (
    ChunkedDivergence,
    CleanStream,
    HiddenTarget,
    LabelTarget,
    LossSums,
    SeveralTeachers,
    Target,
    empty_sums,
    token_logprobs,
)
from learner.terms import misalignment


class TrainingModule(nn.Module):
    """The student and its loss in one forward, so that ZeRO-3 keeps the LM head gathered while the loss uses it.

    `read` gives the student's final hidden states [R, W, d] of a micro-batch; its layers run one by one by default.
    """

    def __init__(
        self, student: PreTrainedModel, config: RunConfig, read: Callable[[TrainingBatch], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.read = read or self._read
        self.chunk = config.learner.logits_chunk_rows
        self.alignment: LayerAlignment | None = None  # set by whoever has the frozen ARLM
        self.freezes = config.learner.freeze_embeddings
        if self.freezes:
            # no gradient arrives, so that the optimizer, which has them like all other weights, changes nothing
            student.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.detach())

    def forward(self, batch: TrainingBatch, sums: LossSums | None) -> Tensor:
        """The loss, added up in `sums` too; without them, float [L], the log-probabilities of the tokens of x0."""
        hidden = self.read(batch)
        rows = hidden.reshape(-1, hidden.shape[-1])[batch.loss_index]
        head: Tensor = lm_head_weight(self.student)
        if self.freezes:
            head = head.detach()
        if sums is None:
            return token_logprobs(rows, head, batch.labels, self.chunk)
        target = batch.target.of(hidden, head) if isinstance(batch.target, CleanStream) else batch.target
        loss = ChunkedDivergence.apply(
            rows, head, target, batch.coefficient, batch.objective.divergence, self.chunk, sums, batch.terms
        )
        for term in self._added(batch, target, hidden, rows, head):
            loss = loss + term
            sums.loss += term.detach().double()
        return loss

    def _read(self, batch: TrainingBatch) -> Tensor:
        masked = noised_masks(self.student, batch.ids, batch.copy)
        return hidden_states(self.student, batch.ids, batch.positions, batch.mask, masked)

    def _added(
        self, batch: TrainingBatch, target: Target, hidden: Tensor, rows: Tensor, head: Tensor
    ) -> Iterator[Tensor]:
        """The terms that need more than the logits at the masked positions."""
        terms = batch.objective.terms
        if self.alignment and batch.clear:
            aligned = self.alignment.loss(hidden, batch.loss_index, batch.clear, batch.coefficient)
            yield terms.alignment * aligned
        elif isinstance(target, HiddenTarget | SeveralTeachers) and terms.alignment and not terms.aligns_layers:
            yield terms.alignment * misalignment(rows, target.hidden, batch.coefficient)
        if batch.next_tokens:
            before = hidden.reshape(-1, hidden.shape[-1])[batch.next_tokens.index]
            labels, unseen = LabelTarget(batch.next_tokens.label), empty_sums(hidden.device)
            yield terms.autoregressive * ChunkedDivergence.apply(
                before, head, labels, batch.next_tokens.coefficient, ForwardKL(), self.chunk, unseen
            )
