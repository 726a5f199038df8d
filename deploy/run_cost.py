"""What a run has cost: floating-point operations by role, counted as papers count them, and GPU hours.

A forward takes 2 operations for each parameter and token, a backward twice as much (Kaplan et al., 2020, arXiv
2001.08361); attention over the context is left out. With T response tokens trained on:

| role | FLOPs |
| --- | --- |
| teacher | 2 · N_teacher · T; hard labels have no teacher |
| learner | 6 · N_student · T |
| rollout | 2 · N_student · (token rows of prefills, denoising forwards and commits) |

Teacher and learner are counted as in OPDLM's paper, so that runs can be compared with it: its count has neither
prompts nor the noised copies. Rollouts are not in the paper's count.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config.run import RunConfig
from deploy.checkpoints import RunState
from deploy.placement import Placement


@dataclass(frozen=True)
class RunCost:
    """Sizes that the cost follows from: parameters, 0 where a role is missing, and reserved GPUs (shares add up)."""

    student_parameters: int
    teacher_parameters: int
    gpus: float

    @classmethod
    def of(cls, config: RunConfig, placement: Placement) -> RunCost:
        teacher = placement.teacher_shape.parameters if config.target_kind != "none" else 0
        return cls(placement.shape.parameters, teacher, placement.gpus)

    def metrics(self, state: RunState) -> dict[str, float]:
        """The metrics of the registry, cumulative."""
        tokens = state.response_tokens
        return {
            "flops/rollout": 2.0 * self.student_parameters * state.rollout_token_rows,
            "flops/teacher": 2.0 * self.teacher_parameters * tokens,
            "flops/learner": 6.0 * self.student_parameters * tokens,
            "gpu_hours": self.gpus * state.seconds / 3600,
        }
