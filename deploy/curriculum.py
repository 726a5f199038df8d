"""What changes over the run: response length, block size and confidence threshold of each rollout batch.

All are functions of the rollout batch and of the few counters in `Feedback`, which checkpoints keep, so that a resumed
run goes on with the same values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from common.annealing import annealed
from common.config.objective import ObjectiveConfig
from common.config.rollout import RolloutConfig
from common.config.run import RunConfig
from common.config.schedule import AcceptanceGrowth, CurriculumConfig, PlateauGrowth, StepGrowth
from common.config.unmasking import DynamicUnmasking, Unmasking
from common.grid import grid_floor


@dataclass
class Feedback:
    """What training has told the schedules: steps of the gated length, whether it has stopped growing, block size
    growths, and since the last growth the divergences, nats, of the last rollout batches, and the shares of held-out
    drafts that were kept, from the best one on."""

    gates: int = 0
    stopped: bool = False
    growths: int = 0
    divergences: list[float] = field(default_factory=list)
    acceptances: list[float] = field(default_factory=list)

    def after_batch(self, config: RunConfig, divergence: float, entropy: float) -> None:
        """Take in the mean divergence and student entropy, nats per trained position, of a rollout batch."""
        growth = config.block_growth
        if config.curriculum.gate_on == "training":
            self._pass_gate(config.curriculum, divergence, entropy)
        if isinstance(growth, PlateauGrowth) and self.growths < len(growth.sizes):
            self.divergences = [*self.divergences[1 - 2 * growth.window :], divergence]  # no more are looked at
            if _plateau(self.divergences, growth):
                self.growths, self.divergences = self.growths + 1, []

    def after_evaluation(
        self, config: RunConfig, block_size: int, divergence: float, entropy: float, accepted: float | None
    ) -> None:
        """Take in the held-out KL and the student's held-out entropy, nats per token, and the share of held-out drafts
        that are kept with this block size."""
        if config.curriculum.gate_on == "held_out":
            self._pass_gate(config.curriculum, divergence, entropy)
        growth = config.block_growth
        if not isinstance(growth, AcceptanceGrowth) or accepted is None or self.growths == len(growth.sizes):
            return
        if block_size != config.block_sizes[self.growths]:  # of a batch that was in flight when the blocks grew
            return
        since_best = [*self.acceptances, accepted]
        since_best = since_best[since_best.index(max(since_best)) :]
        if accepted >= growth.accepted or len(since_best) > growth.patience > 0:
            self.growths, self.acceptances = self.growths + 1, []
        else:
            self.acceptances = since_best[: max(growth.patience, 1)]

    def _pass_gate(self, config: CurriculumConfig, divergence: float, entropy: float) -> None:
        """One step on where the gate is open; where it is closed and that stops the ladder, back to the step before,
        the last one at which it was open."""
        if not config.gated or self.stopped:
            return
        if config.gate_is_open(entropy if config.schedule == "entropy_gated" else divergence):
            self.gates += 1
        elif config.stops_when_closed:
            self.gates, self.stopped = max(self.gates - 1, 0), True


def _plateau(divergences: list[float], growth: PlateauGrowth) -> bool:
    if len(divergences) < 2 * growth.window:
        return False
    before, now = sum(divergences[-2 * growth.window : -growth.window]), sum(divergences[-growth.window :])
    return now >= (1 - growth.min_improvement) * before


def block_size_at(config: RunConfig, batch: int, feedback: Feedback) -> int:
    """Tokens per block in rollout batch `batch` (from 0)."""
    growth = config.block_growth
    growths = sum(batch >= at for at in growth.at_batches) if isinstance(growth, StepGrowth) else feedback.growths
    return (config.block_size, *growth.later_sizes)[growths]


def unmasking_at(config: RolloutConfig, batch: int) -> Unmasking:
    """The unmasking rule of rollout batch `batch` (from 0), its threshold in steps of 0.01 along the ramp."""
    ramp, rule = config.threshold_ramp, config.unmasking
    if ramp.end is None or not isinstance(rule, DynamicUnmasking):
        return rule
    p = min(max(batch - ramp.hold_batches, 0) / ramp.ramp_batches, 1.0)
    threshold = rule.threshold if p == 0 else round(rule.threshold + p * (ramp.end - rule.threshold), 2)
    return rule.model_copy(update={"threshold": threshold})


def extra_weights(objective: ObjectiveConfig, batch: int) -> tuple[float, ...]:
    """The weights of the extra losses in rollout batch `batch` (from 0)."""
    return tuple(annealed(e.schedule, e.weight, e.end, e.batches, batch) for e in objective.extra)


def response_limit(config: CurriculumConfig, batch: int, block_size: int, gates: int = 0) -> int:
    """Longest response, in tokens, of rollout batch `batch` (from 0); a multiple of `block_size`.

    With p = min(1, batch / batches): `linear` grows with p, `cos` with 1 - cos(pi p / 2), from min_tokens to
    max_tokens (section 7 of the method's specification). A gated limit is `gates` times step_tokens longer.
    """
    if config.gated:
        tokens: float = min(config.min_tokens + gates * config.step_tokens, config.max_tokens)
    else:
        p = min(1.0, batch / config.batches)
        share = {"constant": 1.0, "linear": p, "cos": 1 - math.cos(math.pi * p / 2)}[config.schedule]
        tokens = config.min_tokens + share * (config.max_tokens - config.min_tokens)
    return max(block_size, grid_floor(int(tokens + 1e-9), block_size))
