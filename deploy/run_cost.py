"""What a run has cost: floating-point operations by role, counted as papers count them, and GPU hours.

A forward takes 2 operations for each parameter and token, a backward twice as much (Kaplan et al., 2020, arXiv
2001.08361); of experts those count that a token is routed to, and attention over the context is left out. With T
response tokens trained on:

| role | FLOPs |
| --- | --- |
| teacher | 2 · N_teacher · T, of several each with its own N and T; 0 with hard labels and `teacher.backend` self |
| learner | 6 · N_student · T; with adapters of n parameters (4 · N_student + 6 · n) · T: the base has no gradient |
| rollout | 2 · N_student · (token rows of prefills, denoising forwards and commits) |

Teacher and learner are counted as in OPDLM's paper, so that runs can be compared with it: its count has neither
prompts nor the noised copies. Rollouts are not in the paper's count.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config.run import RunConfig
from deploy.checkpoints import RunState
from deploy.placement import Placement, trained_parameters


@dataclass(frozen=True)
class RunCost:
    """Sizes that the cost follows from: parameters, 0 where a role is missing, and reserved GPUs (shares add up)."""

    student_parameters: int
    teacher_parameters: tuple[int, ...]
    gpus: float
    adapter_parameters: int = 0  # 0: all weights are trained

    @classmethod
    def of(cls, config: RunConfig, placement: Placement) -> RunCost:
        teachers = [
            shape.active_parameters if config.target_kind != "none" else 0 for shape in placement.teacher_shapes
        ]
        adapters = trained_parameters(config, placement.shape) if config.adapter.rank else 0
        return cls(placement.shape.active_parameters, tuple(teachers), placement.gpus, adapters)

    def metrics(self, state: RunState) -> dict[str, float]:
        """The metrics of the registry, cumulative."""
        tokens, others = state.response_tokens, state.other_teachers_tokens
        read = [tokens - sum(others.values()), *(others.get(str(i), 0) for i in range(1, len(self.teacher_parameters)))]
        return {
            "flops/rollout": 2.0 * self.student_parameters * state.rollout_token_rows,
            "flops/teacher": sum(2.0 * n * t for n, t in zip(self.teacher_parameters, read, strict=True)),
            "flops/learner": self._learner_flops_per_token * tokens,
            "gpu_hours": self.gpus * state.seconds / 3600,
        }

    @property
    def _learner_flops_per_token(self) -> float:
        """Forward, gradients of what layers are given, and gradients of what is trained."""
        adapters = self.adapter_parameters
        return 4.0 * self.student_parameters + (6.0 * adapters if adapters else 2.0 * self.student_parameters)
