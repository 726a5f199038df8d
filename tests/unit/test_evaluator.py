"""When the held-out problems are evaluated during training, and under which names the metrics are logged."""

from typing import Any

import numpy as np
import pytest

from actors.evaluation.evaluation import Evaluation
from actors.evaluation.responses import Response
from common.config.file import load_config
from common.prompts import Prompt
from deploy.cluster import Pools
from deploy.evaluator import Evaluator
from deploy.monitoring.metrics import METRICS
from deploy.remote_calls import RemoteCalls
from deploy.rollout_batch import RolloutsInFlight

PROBLEMS = [Prompt(0, "1 + 1?", np.zeros(3, dtype=np.int32), answer="2")]


def evaluator(every: int, problems: list[Prompt] = PROBLEMS) -> Evaluator:
    return Evaluator(
        load_config("tiny", ["--evaluation.every_batches", str(every)]), problems, Pools([], [], []), RemoteCalls(1.0)
    )


@pytest.mark.parametrize(
    ("every", "problems", "due"),
    [(0, PROBLEMS, []), (3, PROBLEMS, [3, 6, 7]), (1, PROBLEMS, [1, 2, 3, 4, 5, 6, 7]), (3, [], [])],
)
def test_due_every_n_batches_and_after_the_last(every, problems, due):
    asked = evaluator(every, problems)
    assert [done for done in range(1, 8) if asked.due(done, last=done == 7)] == due


def test_metrics_are_the_optional_metrics_of_the_registry(monkeypatch):
    sums = Evaluation()
    for row in range(4):
        reason = "eos" if row % 2 == 0 else "length"
        sums.add(Response(row, 0, np.zeros(10, np.int32), "", 5, row // 2 * 5, reason), row < 3)
    waited: list[Any] = []

    def answers(self: Any, calls: Any, action: str, **options: Any) -> list[Evaluation]:
        waited.append(options)
        return [sums]

    monkeypatch.setattr(RemoteCalls, "wait", answers)
    in_flight = RolloutsInFlight()
    metrics = evaluator(1).metrics(4, in_flight)
    assert metrics.keys() == {name for name, spec in METRICS.items() if spec.optional}
    assert waited == [{"background": in_flight, "until_stop": True}]  # rollouts in flight go on meanwhile
    assert metrics["eval/exact_match"] == 0.75
    assert metrics["eval/tokens_per_step"] == 2
    assert metrics["eval/forwards_per_token_with_commits"] == 0.75
    assert metrics["eval/response_length"] == 10
    assert metrics["eval/share_eos"] == 0.5
