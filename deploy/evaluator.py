"""Evaluation of a running job: held-out problems and held-out prompts, dealt out over the rollout actors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from actors.evaluation.evaluation import Evaluation
from actors.evaluation.held_out import HeldOutSums
from common.config.run import RunConfig
from common.config.unmasking import DynamicUnmasking, StaticUnmasking, Unmasking
from common.prompts import Prompt
from deploy.cluster import Pools
from deploy.held_out import HeldOutPrompts
from deploy.remote_calls import Background, RemoteCalls

OFFSETS = (1, 2, 3, 4)  # have metrics of their own, so that runs with different block sizes compare


class Evaluator:
    """Exact match, tokens per step and held-out KL with the weights that the rollout actors hold now.

    Life cycle: `hold_out` once, then the others in any order. Every evaluation ends at once when the run is asked to
    stop, with StopRequested.
    """

    def __init__(
        self,
        config: RunConfig,
        problems: list[Prompt],
        pools: Pools,
        calls: RemoteCalls,
        held_out: HeldOutPrompts | None = None,
    ) -> None:
        self.config = config
        self.problems = problems
        self.pools = pools
        self.calls = calls
        self.held_out = held_out

    def hold_out(self) -> None:
        """Have the original answer the held-out prompts, unless its responses are there already."""
        if not self.held_out or self.held_out.responses():
            return
        prompts, count = self.held_out.prompts, len(self.pools.rollouts)
        order = self.held_out.max_new_tokens, list(self.config.teacher_paths.values())

        def ask(actor: Any, part: slice) -> ray.ObjectRef:
            return actor.answer_held_out.remote(prompts[part], *order)

        parts = self._of_all(prompts, "answering held-out prompts with the original", ask)
        self.held_out.keep([parts[i % count][i // count] for i in range(len(prompts))])

    def before(self) -> dict[str, Any]:
        """The greedy teacher and the converted, untrained student."""
        summary: dict[str, Any] = {}
        if self.problems:
            if self.config.evaluation.teacher:
                limit = self.config.evaluation.max_new_tokens
                summary["teacher"] = self._over_actors("evaluate_teacher", "evaluating the teacher", limit)
            summary["student_init"] = self.student(StaticUnmasking(), self.config.block_size)
        if self.held_out:
            summary["held_out_kl_init"] = self.held_out_kl(self.config.block_size)
        return summary

    def after(self, block_size: int) -> dict[str, Any]:
        """The student under static and under dynamic decoding, and its held-out KL."""
        summary: dict[str, Any] = {}
        if self.problems:
            static = self.student(StaticUnmasking(), block_size)
            summary["student"] = {"static": static, "dynamic": self.dynamic(block_size)}
        if self.held_out:
            summary["held_out_kl"] = self.held_out_kl(block_size)
        return summary

    def dynamic(self, block_size: int, background: Background | None = None) -> dict[str, float]:
        return self.student(DynamicUnmasking(threshold=self.config.evaluation.threshold), block_size, background)

    def student(self, unmasking: Unmasking, block_size: int, background: Background | None = None) -> dict[str, float]:
        order = (unmasking, self.config.evaluation.max_new_tokens, block_size)
        return self._over_actors("evaluate", "evaluating the student", *order, background=background)

    def due(self, done: int, last: bool) -> bool:
        """Whether there is an evaluation after `done` rollout batches."""
        every = self.config.evaluation.every_batches
        return bool((self.problems or self.held_out) and every and (done % every == 0 or last))

    def metrics(self, block_size: int, background: Background) -> dict[str, float]:
        """The `eval/` metrics of the registry: greedy dynamic decoding, and the held-out KL, with the weights published
        last.

        Rollout batches in flight, the `background`, go on meanwhile.
        """
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        if self.problems:
            metrics |= self._decoding_metrics(block_size, background)
        if self.held_out:
            kl = self.held_out_kl(block_size, background)
            shown = zip(OFFSETS, kl["by_offset"], strict=False)  # there are as many as the block is long
            metrics |= {f"eval/held_out_kl_{offset}": value for offset, value in shown if value is not None}
            metrics["eval/held_out_kl"] = kl["mean"]
            metrics["eval/held_out_entropy"] = kl["entropy"]
            if kl["accepted"] is not None:
                metrics["eval/held_out_accepted"] = kl["accepted"]
        return {**metrics, "seconds/evaluation": time.perf_counter() - start}

    def held_out_kl(self, block_size: int, background: Background | None = None) -> dict[str, Any]:
        """The student's, as `summary.json` has it."""
        assert self.held_out
        prompts, responses = self.held_out.prompts, self.held_out.responses()
        assert responses
        count, teachers = len(self.pools.rollouts), list(self.config.teacher_paths.values())

        def ask(actor: Any, part: slice) -> ray.ObjectRef:
            return actor.held_out_kl.remote(prompts[part], responses[part], teachers, block_size)

        parts = self._of_all(prompts, "reading held-out prompts", ask, background)
        sums = HeldOutSums.zeros(len(prompts), block_size)
        for i, part in enumerate(parts):  # in the order of the prompts, so that the sum depends on nothing else
            sums.put(slice(i, None, count), part)
        return sums.metrics()

    def _decoding_metrics(self, block_size: int, background: Background) -> dict[str, float]:
        metrics = self.dynamic(block_size, background)
        return {
            "eval/exact_match": metrics["exact_match"],
            "eval/tokens_per_step": metrics["tokens_per_step"],
            "eval/forwards_per_token": metrics["forwards_per_token"],
            "eval/forwards_per_token_with_commits": metrics["forwards_per_token_with_commits"],
            "eval/response_length": metrics["response_tokens_mean"],
            "eval/share_eos": metrics["share_ended"],
            "eval/tokens_per_second": metrics["tokens_per_second"],
        }

    def _over_actors(
        self, method: str, action: str, *arguments: Any, background: Background | None = None
    ) -> dict[str, float]:
        """Metrics over all problems, each rollout actor taking its share."""

        def ask(actor: Any, part: slice) -> ray.ObjectRef:
            return getattr(actor, method).remote(self.problems[part], *arguments)

        return sum(self._of_all(self.problems, action, ask, background), Evaluation()).metrics()

    def _of_all(
        self,
        rows: list[Prompt],
        action: str,
        ask: Callable[[Any, slice], ray.ObjectRef],
        background: Background | None = None,
    ) -> list[Any]:
        """The answers of all rollout actors that have any of the rows, each asked for its part: actor i of n has the
        rows i, i + n, .... A replacement is asked for the part of the actor before it."""
        count, names = len(self.pools.rollouts), self.pools.names()
        parts = {names[actor]: slice(i, None, count) for i, actor in enumerate(self.pools.rollouts[: len(rows)])}

        def again(name: str) -> ray.ObjectRef:
            return ask(self.pools.actor(name), parts[name])

        calls = {again(name): name for name in parts}
        return self.calls.wait(calls, action, background=background, until_stop=True, again=again)
