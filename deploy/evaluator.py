"""Evaluation of a running job: the held-out problems, dealt out over the rollout actors."""

from __future__ import annotations

import time
from typing import Any

from actors.evaluation.evaluation import Evaluation
from common.config.run import DynamicUnmasking, RunConfig, StaticUnmasking, Unmasking
from common.prompts import Prompt
from deploy.cluster import Pools
from deploy.remote_calls import Background, RemoteCalls


class Evaluator:
    """Exact match and tokens per step with the weights that the rollout actors hold now.

    Every evaluation ends at once when the run is asked to stop, with StopRequested.
    """

    def __init__(self, config: RunConfig, problems: list[Prompt], pools: Pools, calls: RemoteCalls) -> None:
        self.config = config
        self.problems = problems
        self.pools = pools
        self.calls = calls

    def before(self) -> dict[str, Any]:
        """The greedy teacher and the converted, untrained student."""
        summary: dict[str, Any] = {}
        if self.config.evaluation.teacher:
            limit = self.config.evaluation.max_new_tokens
            summary["teacher"] = self._over_actors("evaluate_teacher", "evaluating the teacher", limit)
        summary["student_init"] = self.student(StaticUnmasking(), self.config.block_size)
        return summary

    def after(self, block_size: int) -> dict[str, Any]:
        """The student under static and under dynamic decoding."""
        return {"student": {"static": self.student(StaticUnmasking(), block_size), "dynamic": self.dynamic(block_size)}}

    def dynamic(self, block_size: int, background: Background | None = None) -> dict[str, float]:
        return self.student(DynamicUnmasking(threshold=self.config.evaluation.threshold), block_size, background)

    def student(self, unmasking: Unmasking, block_size: int, background: Background | None = None) -> dict[str, float]:
        order = (unmasking, self.config.evaluation.max_new_tokens, block_size)
        return self._over_actors("evaluate", "evaluating the student", *order, background=background)

    def due(self, done: int, last: bool) -> bool:
        """Whether the held-out problems are evaluated after `done` rollout batches."""
        every = self.config.evaluation.every_batches
        return bool(self.problems and every and (done % every == 0 or last))

    def metrics(self, block_size: int, background: Background) -> dict[str, float]:
        """The `eval/` metrics of the registry: greedy dynamic decoding with the weights published last.

        Rollout batches in flight, the `background`, go on meanwhile.
        """
        start = time.perf_counter()
        metrics = self.dynamic(block_size, background)
        return {
            "eval/exact_match": metrics["exact_match"],
            "eval/tokens_per_step": metrics["tokens_per_step"],
            "eval/forwards_per_token": metrics["forwards_per_token"],
            "eval/forwards_per_token_with_commits": metrics["forwards_per_token_with_commits"],
            "eval/response_length": metrics["response_tokens_mean"],
            "eval/share_eos": metrics["share_ended"],
            "eval/tokens_per_second": metrics["tokens_per_second"],
            "seconds/evaluation": time.perf_counter() - start,
        }

    def _over_actors(
        self, method: str, action: str, *arguments: Any, background: Background | None = None
    ) -> dict[str, float]:
        """Metrics over all problems, each rollout actor taking its share."""
        count = len(self.pools.rollouts)
        shares = [self.problems[i::count] for i in range(count)]
        names = self.pools.names()
        calls = {
            getattr(actor, method).remote(share, *arguments): names[actor]
            for actor, share in zip(self.pools.rollouts, shares, strict=True)
            if share
        }
        results = self.calls.wait(calls, action, background=background, until_stop=True)
        return sum(results, Evaluation()).metrics()
