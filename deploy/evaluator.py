"""Evaluation of a running job: the held-out problems, dealt out over the rollout actors."""

from __future__ import annotations

from typing import Any

from actors.evaluation import EvaluationSums
from common.config import DynamicUnmasking, RunConfig, StaticUnmasking, Unmasking
from common.prompts import Prompt
from deploy.cluster import Pools
from deploy.waiting import wait_all


class Evaluator:
    """Exact match and tokens per step with the weights that the rollout actors hold now."""

    def __init__(self, config: RunConfig, problems: list[Prompt], pools: Pools) -> None:
        self.config = config
        self.problems = problems
        self.pools = pools

    def before(self) -> dict[str, Any]:
        """The greedy teacher and the converted, untrained student; empty where there are no problems."""
        if not self.problems:
            return {}
        summary: dict[str, Any] = {}
        if self.config.evaluation.teacher:
            limit = self.config.evaluation.max_new_tokens
            summary["teacher"] = self._over_actors("evaluate_teacher", "evaluating the teacher", limit)
        summary["student_init"] = self.student(StaticUnmasking())
        return summary

    def after(self) -> dict[str, Any]:
        """The student under static and under dynamic decoding; empty where there are no problems."""
        return (
            {"student": {"static": self.student(StaticUnmasking()), "dynamic": self.dynamic()}} if self.problems else {}
        )

    def dynamic(self) -> dict[str, float]:
        return self.student(DynamicUnmasking(threshold=self.config.evaluation.threshold))

    def student(self, unmasking: Unmasking) -> dict[str, float]:
        limit = self.config.evaluation.max_new_tokens
        return self._over_actors("evaluate", "evaluating the student", unmasking, limit)

    def _over_actors(self, method: str, action: str, *arguments: Any) -> dict[str, float]:
        """Figures over all problems, each rollout actor taking its share."""
        count = len(self.pools.rollouts)
        shares = [self.problems[i::count] for i in range(count)]
        names = self.pools.names()
        calls = {
            getattr(actor, method).remote(share, *arguments): names[actor]
            for actor, share in zip(self.pools.rollouts, shares, strict=True)
            if share
        }
        results = wait_all(calls, action, self.config.pipeline.stage_timeout_s)
        return sum(results, EvaluationSums()).figures()
