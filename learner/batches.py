"""From the trajectories of one update to the tensors of this rank's forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config.model import AttentionContext
from common.config.objective import ObjectiveConfig
from common.config.run import RunConfig
from common.conversion import TeacherHead
from common.masks import TILE, packed_mask, per_layer_kind
from common.prompts import part_of
from common.seeds import stream_key, uniform
from common.trajectory import Trajectory, TrajectoryMeta
from learner.alignment import ClearRows, clear_rows
from learner.objective import CleanStream, HiddenTarget, LabelTarget, SeveralTeachers, Target, TopKTarget
from learner.packing import (
    MicroBatch,
    assign_ranks,
    causal_document,
    coefficients,
    document,
    empty_document,
    microbatch,
    plan_microbatches,
    rounded_up,
)
from learner.terms import LogitTerms, Pairs


@dataclass(frozen=True, kw_only=True)
class NextTokens:
    """What the autoregressive term needs: `index` int64 [A] points into the R*W tokens, `label` int64 [A] is the token
    that follows each, `coefficient` float32 [A] its share of the term."""

    index: Tensor
    label: Tensor
    coefficient: Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Tensors of one forward, on the device.

    `layout` int64 [5, R, W] holds ids, positions, document, copy and block of each token; `mask` is in the form that
    the attention takes, or None where it is made in a CUDA graph; `loss_index` int64 [L] points into the
    R*W tokens; `coefficient` float32 [L] and `target` are of these L positions, `labels` int64 [L] the tokens
    of x0 there; `tokens` is the number of all without padding; `objective` is the
    loss that it is for.
    """

    layout: Tensor
    mask: Any
    loss_index: Tensor
    coefficient: Tensor
    target: Target | CleanStream
    objective: ObjectiveConfig
    tokens: int
    labels: Tensor
    terms: LogitTerms | None = None
    clear: ClearRows | None = None
    next_tokens: NextTokens | None = None

    @property
    def ids(self) -> Tensor:
        return self.layout[0]

    @property
    def positions(self) -> Tensor:
        return self.layout[1]

    @property
    def copy(self) -> Tensor:
        return self.layout[3]


def update_shares(trajectories: list[Trajectory], parts: int, samples: int, rows: int) -> list[list[list[Trajectory]]]:
    """The trajectories of each update, for each loss: `rows` of the main loss, and the extra losses' for the same
    samples of the same prompts. A loss that has none in this rollout batch has none in its updates.

    Args:
        trajectories: by (ordinal, sample). samples: of a prompt, for one loss.
    """
    of = [[t for t in trajectories if part_of(t.sample, samples) == part] for part in range(parts)]
    return [[own[i : i + rows] for own in of] for i in range(0, max(map(len, of)), rows)]


@dataclass(frozen=True)
class BatchBuilder:
    """Packs updates for one rank.

    `teacher_head` [V, d] is needed for the target kind `hidden`, and its first `teacher_tokens` rows count (None: all).
    Of several teachers it is the first one's, `other_heads` are the others', and `teacher_of` gives the number of the
    one for a domain.
    The kind `none` trains on the tokens of x0 as hard labels. `windows` comes from attention_windows of the student.
    With `graphs` rows come in few widths, and without masks. `seed` is the run's; `scale` is
    the weight of the whole loss; `context` is what clean tokens see. With `teaches_itself` targets are those of the
    clean tokens, of which the first `teacher_tokens` rows of the student's own LM head count.
    """

    meta: TrajectoryMeta
    normalization: str
    topk_tail: str
    max_tokens: int
    attention: str
    device: torch.device
    teacher_head: Tensor | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    want_entropy: bool = False
    windows: dict[str, int | None] = field(default_factory=lambda: {"full_attention": None})
    teacher_tokens: int | None = None
    graphs: bool = False
    seed: int = 0
    scale: float = 1.0
    other_heads: tuple[TeacherHead, ...] = ()
    teacher_of: Callable[[str], int] = lambda domain: 0
    context: AttentionContext = "block"
    teaches_itself: bool = False

    @classmethod
    def of(cls, config: RunConfig, meta: TrajectoryMeta, **device_and_models: Any) -> BatchBuilder:
        """As the learner of a run packs; `device_and_models` are the fields that the config does not decide."""
        curriculum = config.curriculum
        return cls(
            meta=meta,
            normalization=config.objective.normalization,
            topk_tail=config.objective.topk_tail,
            max_tokens=config.learner.max_tokens_per_microbatch,
            objective=config.objective,
            want_entropy=curriculum.schedule == "entropy_gated" and curriculum.gate_on == "training",
            seed=config.seed,
            teacher_of=config.teacher_of,
            context=config.attention.context,
            teaches_itself=config.teaches_itself,
            **device_and_models,
        )

    def with_extra(self, objective: ObjectiveConfig, weights: Sequence[float]) -> list[BatchBuilder]:
        """This one, for the main loss, and one for each loss in `objective.extra`, by their weights."""
        extra = zip(objective.parts[1:], weights, strict=True)
        return [self, *(replace(self, objective=part, scale=w, want_entropy=False) for part, w in extra)]

    def update(self, trajectories: list[Trajectory], rank: int, ranks: int) -> tuple[list[MicroBatch], int]:
        """This rank's micro-batches of an update, and the number of trained positions over all ranks.

        Every rank gets the same number of micro-batches, since ZeRO-3 forwards are collective; those that are missing
        hold one document that trains nothing.
        """
        form = self.meta.block_size, self.meta.mask_token_id, self.context, self._reads_targets
        masked = [document(t, *form) for t in trajectories]
        causal = [causal_document(t) for t in trajectories] if self.objective.terms.autoregressive else []
        documents = dict(enumerate(masked + causal))
        weights = coefficients(masked, self.normalization) + coefficients(causal, self.normalization)
        coefficient = dict(enumerate(self.scale * weight for weight in weights))
        positions = sum(len(d.loss_index) for d in masked)
        trained = [i for i, d in documents.items() if len(d.loss_index) or len(d.next_index)]
        shares = assign_ranks([len(documents[i]) for i in trained], ranks)
        plans = [
            plan_microbatches(
                {trained[i]: len(documents[trained[i]]) for i in share},
                self.max_tokens,
                self.attention == "flex_attention",
            )
            for share in shares
        ]
        count = max(len(plan) for plan in plans)
        batches = [microbatch(rows, documents, coefficient, self._width) for rows in plans[rank]]
        return batches + [self.untrained()] * (count - len(batches)), positions

    def untrained(self, length: int = 0) -> MicroBatch:
        """One document that trains nothing, in a row for at least so many tokens."""
        document = empty_document(self.meta.block_size)
        return microbatch(
            [[0]], {0: document}, {0: document.loss_weight}, lambda longest: self._width(max(longest, length))
        )

    def _width(self, longest: int) -> int:
        """How wide rows are made that hold at most `longest` tokens."""
        if self.graphs:
            return rounded_up(longest, max(TILE, 2 ** (longest.bit_length() - 4)))  # eight widths an octave
        return rounded_up(longest, TILE if self.attention == "flex_attention" else 8)

    def tensors(self, batch: MicroBatch, trajectories: list[Trajectory]) -> TrainingBatch:
        """One micro-batch on the device, with its mask and targets."""

        def move(array: np.ndarray) -> Tensor:
            return self._moved(torch.from_numpy(np.ascontiguousarray(array)))

        layout = move(np.stack([batch.ids, batch.positions, batch.doc, batch.copy, batch.block]))
        _, positions, doc, copy, block = layout
        terms = next_tokens = None
        labels = move(batch.loss_label)
        if self.objective.changes_positions or self.want_entropy:
            pairs = self._pairs(batch) if self.objective.terms.rank else None
            terms = LogitTerms(
                self.objective,
                labels,
                pairs,
                self.want_entropy,
                self._moved(self._noise(batch, trajectories)) if self.objective.routes else None,
            )
        if self.objective.terms.autoregressive:
            next_tokens = NextTokens(
                index=move(batch.next_index),
                label=move(batch.next_label),
                coefficient=move(batch.next_coefficient),
            )
        return TrainingBatch(
            layout=layout,
            mask=None
            if self.graphs
            else per_layer_kind(
                self.windows, lambda window: packed_mask(doc, copy, block, positions, self.attention, window)
            ),
            loss_index=move(batch.loss_index),
            coefficient=move(batch.loss_coefficient),
            target=self._target(batch, trajectories),
            objective=self.objective,
            tokens=batch.tokens,
            labels=labels,
            terms=terms,
            clear=ClearRows(*map(move, clear_rows(batch, trajectories)))
            if self.objective.terms.aligns_layers and len(batch.loss_index)
            else None,
            next_tokens=next_tokens,
        )

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the device; from page-locked memory, so that the host need not wait for the copy."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _noise(self, batch: MicroBatch, trajectories: list[Trajectory]) -> Tensor:
        """Uniform numbers in (0, 1), float32 [L], that depend on trajectory, position and state alone."""
        keys = [stream_key(self.seed, t.ordinal, t.sample) for t in trajectories]
        position, copy = (torch.from_numpy(x.ravel()[batch.loss_index]) for x in (batch.positions, batch.copy))
        # rounds are counted from 0, so that copies below it draw other numbers than the sampler
        return uniform(torch.tensor(keys, dtype=torch.int64)[torch.from_numpy(batch.loss_doc)], position, -1 - copy)

    def _pairs(self, batch: MicroBatch) -> Pairs:
        """All pairs of one block's positions with different rounds, both within the window; they share the block's
        coefficients equally."""
        window = self.objective.terms.rank_window
        ends = np.append(np.flatnonzero(np.diff(batch.loss_group)) + 1, len(batch.loss_group))
        ends = ends[ends > 0]
        earlier, later, coefficient, pair_ends = [], [], [], []
        start = count = 0
        for end in ends:
            rounds = batch.loss_round[start:end]
            ranked = rounds < rounds.min() + window if window else np.ones(len(rounds), bool)
            first, second = np.nonzero((rounds[:, None] < rounds[None, :]) & ranked[None, :])
            earlier.append(start + first)
            later.append(start + second)
            weight = batch.loss_coefficient[start:end].sum() / max(len(first), 1)
            coefficient.append(np.full(len(first), weight, np.float32))
            count += len(first)
            pair_ends.append(count)
            start = end
        return Pairs(
            earlier=self._moved(torch.from_numpy(np.concatenate([np.empty(0, np.int64), *earlier]))),
            later=self._moved(torch.from_numpy(np.concatenate([np.empty(0, np.int64), *later]))),
            coefficient=self._moved(torch.from_numpy(np.concatenate([np.empty(0, np.float32), *coefficient]))),
            group_ends=ends.tolist(),
            pair_ends=pair_ends,
        )

    @property
    def _reads_targets(self) -> bool:
        """Whether this loss has its targets from the student's own clean tokens."""
        return self.teaches_itself and self.objective.target.kind == "teacher"

    def _target(self, batch: MicroBatch, trajectories: list[Trajectory]) -> Target | CleanStream:
        if self._reads_targets:
            index = self._moved(torch.from_numpy(batch.before_index))
            return CleanStream(index, self.objective.shape, self.teacher_tokens)
        if self.meta.target_kind == "none" or self.objective.target.kind == "hard":
            return LabelTarget(self._moved(torch.from_numpy(batch.loss_label)))
        order = list(dict.fromkeys(batch.loss_doc.tolist()))
        if self.meta.target_kind == "topk":
            width = self.meta.target_width
            return TopKTarget(
                ids=self._moved(_rows(batch, trajectories, order, "topk_ids", width, np.int32)).long(),
                logprobs=self._moved(_rows(batch, trajectories, order, "topk_logprobs", width, np.float32)),
                log_tail_mass=self._moved(_rows(batch, trajectories, order, "log_tail_mass", 1, np.float32)[:, 0]),
                tail=self.topk_tail,
            )
        if self.teacher_head is None:
            raise ValueError("target kind 'hidden' needs the teacher's LM head")
        heads = (TeacherHead(self.teacher_head, self.teacher_tokens), *self.other_heads)
        teacher = [self.teacher_of(trajectories[i].domain) for i in order]
        parts = []
        for number in sorted(set(teacher)) or [0]:
            docs = [doc for doc, of in zip(order, teacher, strict=True) if of == number]
            hidden = self._hidden(batch, trajectories, docs, heads[number])
            parts.append((np.flatnonzero(np.isin(batch.loss_doc, docs)), hidden))
        return parts[0][1] if len(parts) == 1 else SeveralTeachers(tuple(parts))

    def _hidden(
        self, batch: MicroBatch, trajectories: list[Trajectory], docs: list[int], head: TeacherHead
    ) -> HiddenTarget:
        """The targets of some documents, all of one teacher."""
        half = self.meta.hidden_dtype == "bfloat16"
        width = head.weight.shape[1]
        hidden = _rows(batch, trajectories, docs, "hidden", width, np.uint16 if half else np.float32)
        hidden = hidden.view(torch.bfloat16) if half else hidden
        return HiddenTarget(self._moved(hidden), head.weight, self.objective.shape, head.tokens)


def of_heads(heads: tuple[TeacherHead, ...]) -> dict[str, Any]:
    """The fields of a BatchBuilder that the LM heads of all teachers are; there may be none."""
    if not heads:
        return {}
    first, *others = heads
    return {"teacher_head": first.weight, "teacher_tokens": first.tokens, "other_heads": tuple(others)}


def _rows(
    batch: MicroBatch, trajectories: list[Trajectory], docs: list[int], name: str, columns: int, dtype: type
) -> Tensor:
    """A column of some documents' targets, [L, columns], in the order of their trained positions; uint16 as int16."""
    parts = [getattr(trajectories[i], name).reshape(-1, columns)[batch.loss_target[batch.loss_doc == i]] for i in docs]
    rows = np.concatenate([np.empty((0, columns), dtype), *parts])
    return torch.from_numpy(rows.view(np.int16) if dtype is np.uint16 else rows)
