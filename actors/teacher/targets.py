"""What a teacher is asked, what it answers, and the interface of its backends.

The target of position i is the teacher's distribution given x0^{<i}. One causal pass over x0 therefore serves all
states of a trajectory, and the pass may stop before the last requested position.

There are two kinds of targets. `topk` is small and has a tail mass in place of the other tokens; `hidden` is exact: the
learner computes all logits from d numbers a position. Left out: logits as targets, V numbers a position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.config.targets import TeacherTarget
from common.reshaping import reshape
from common.trajectory import Trajectory

LEAST_TAIL_MASS = 1e-12  # keeps log_tail_mass finite; float32 log-probabilities give the mass to about 1e-7


@dataclass(frozen=True)
class TargetRequest:
    """One sequence and the positions whose next-token distributions are requested.

    `ids` int32 [length], `positions` int [n]: the distribution at i >= 1 is that of ids[i] given ids[:i]. One that
    reads masked states gets all their `masked` positions int [m] with the number of the `state` int [m] of each; None:
    `positions` are masked, in one state. `shown` int [m] is what the states show there; None: the mask token.
    """

    ids: np.ndarray
    positions: np.ndarray
    masked: np.ndarray | None = field(default=None, kw_only=True)
    state: np.ndarray | None = field(default=None, kw_only=True)
    shown: np.ndarray | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class TopkTargets:
    """The K best tokens of n distributions, best first.

    `ids` int32 [n, K], `logprobs` float32 [n, K], `log_tail_mass` float32 [n]: log of the probability of all other
    tokens together.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    log_tail_mass: np.ndarray


@dataclass(frozen=True)
class HiddenTargets:
    """`hidden` [n, d]: final hidden states after the last norm, float32, or uint16 with the bits of bfloat16."""

    hidden: np.ndarray


Targets = TopkTargets | HiddenTargets


class TeacherBackend(ABC):
    """A loaded teacher with one kind of target. It is constructed, used and closed in one thread."""

    def __init__(
        self,
        kind: Literal["topk", "hidden"],
        width: int,
        hidden_dtype: str,
        vocab_size: int,
        max_length: int,
        tokens: int | None = None,
    ) -> None:
        """`width` is K or d; `max_length` is the longest prefix that the engine reads, in tokens; top-k targets are of
        the distribution over the first `tokens` of the vocabulary (None: all)."""
        if kind == "topk" and width > (tokens or vocab_size):
            raise ValueError(f"teacher.top_k ({width}) is above the vocabulary ({tokens or vocab_size}); lower it")
        self.kind = kind
        self.width = width
        self.hidden_dtype = hidden_dtype
        self.vocab_size = vocab_size
        self.max_length = max_length

    def targets(self, requests: Sequence[TargetRequest]) -> list[Targets]:
        """The targets of every request, in the order of its positions.

        Raises:
            ValueError: a position or token id is out of range, or a prefix is longer than the engine reads.
        """
        for request in requests:
            self._check(request)
        asked = [self._prepared(r) for r in requests if len(r.positions)]
        answers = iter(self._forward(asked) if asked else [])
        return [next(answers) if len(r.positions) else self._nothing() for r in requests]

    def request(self, trajectory: Trajectory) -> TargetRequest:
        """What is asked for a trajectory with `target_offsets`."""
        return TargetRequest(trajectory.causal_ids, len(trajectory.prompt_ids) + trajectory.target_offsets)

    def _prepared(self, request: TargetRequest) -> TargetRequest:
        """The request as `_forward` gets it: what stands behind its last position does not count."""
        return TargetRequest(request.ids[: request.positions.max()], request.positions)

    def block_aware(
        self, request: TargetRequest, targets: TopkTargets, block_size: int, share: float, routed: np.ndarray
    ) -> TopkTargets:
        """Targets of which `share` is block-aware where bool [n] `routed` says so (actors/teacher/block_aware.py), for
        engines that can branch."""
        raise NotImplementedError

    def take_notes(self) -> list[str]:
        """What somebody should hear of since the last call."""
        return []

    def close(self) -> None:
        """Release the engine."""

    @abstractmethod
    def _forward(self, requests: Sequence[TargetRequest]) -> list[Targets]:
        """As `targets`, for checked and prepared requests with positions."""

    def _check(self, request: TargetRequest) -> None:
        ids, positions = request.ids, request.positions
        if not len(positions):
            return
        if positions.min() < 1 or positions.max() > len(ids):
            raise ValueError(
                f"teacher positions [{positions.min()}, {positions.max()}] are outside 1 to {len(ids)}, "
                f"the range of a sequence of {len(ids)} tokens"
            )
        # a wrong id would crash the process on a GPU
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"token id {ids.max()} is outside the teacher's vocabulary of {self.vocab_size}")
        if positions.max() > self.max_length:
            raise ValueError(
                f"a sequence needs {positions.max()} tokens of context, the teacher reads {self.max_length}: "
                "shorten data.max_prompt_tokens or curriculum.max_tokens, or, if the model allows more, raise "
                "teacher.kv_cache_mib"
            )

    def _nothing(self) -> Targets:
        if self.kind == "hidden":
            dtype = np.uint16 if self.hidden_dtype == "bfloat16" else np.float32
            return HiddenTargets(np.empty((0, self.width), dtype))
        ids, logprobs = np.empty((0, self.width), np.int32), np.empty((0, self.width), np.float32)
        return TopkTargets(ids, logprobs, log_tail_mass(logprobs))


def log_tail_mass(logprobs: np.ndarray) -> np.ndarray:
    """log(1 - sum of exp(logprobs)) over the last axis, float32; never below log(LEAST_TAIL_MASS)."""
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=-1)
    return np.log(np.maximum(1.0 - mass, LEAST_TAIL_MASS)).astype(np.float32)


def hidden_array(hidden: Tensor, dtype: str) -> np.ndarray:
    """A tensor [n, d] in the form of HiddenTargets, in host memory."""
    if dtype == "bfloat16":
        return hidden.to(torch.bfloat16).view(torch.uint16).cpu().numpy()
    return hidden.float().cpu().numpy()


def reshape_topk(targets: TopkTargets, shape: TeacherTarget) -> TopkTargets:
    """The K best tokens of the reshaped distribution, exact for 1 <= shape.top_k <= K. Tokens that are cut have -inf,
    and the tail mass is the least."""
    logprobs = reshape(torch.from_numpy(targets.logprobs), shape).numpy()
    return TopkTargets(targets.ids, logprobs, np.full_like(targets.log_tail_mass, np.log(LEAST_TAIL_MASS)))
