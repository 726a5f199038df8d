"""When there is an evaluation during training, under which names its metrics are logged, and how held-out prompts are
dealt out over the rollout actors."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.evaluation.evaluation import Evaluation
from actors.evaluation.held_out import HeldOutSums
from actors.evaluation.responses import Response
from common.config.file import load_config
from common.prompts import Prompt
from deploy.cluster import Pools
from deploy.evaluator import Evaluator
from deploy.held_out import HeldOutPrompts
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
        waited.append((options["background"], options["until_stop"]))
        return [sums]

    monkeypatch.setattr(RemoteCalls, "wait", answers)
    in_flight = RolloutsInFlight()
    metrics = evaluator(1).metrics(4, in_flight)
    optional = {name for name, spec in METRICS.items() if spec.optional}
    measured = {name for name in optional if name.startswith(("eval/", "seconds/")) and "held_out" not in name}
    assert metrics.keys() == measured
    assert waited == [(in_flight, True)]  # rollouts in flight go on meanwhile
    assert metrics["eval/exact_match"] == 0.75
    assert metrics["eval/tokens_per_step"] == 2
    assert metrics["eval/forwards_per_token_with_commits"] == 0.75
    assert metrics["eval/response_length"] == 10
    assert metrics["eval/share_eos"] == 0.5


class Actor:
    """A rollout actor without Ray: the original answers prompt n with n tokens, and the KL of each is given."""

    def __init__(self, kl: dict[bytes, np.ndarray]) -> None:
        self.kl = kl
        self.answers = 0

    def answer_held_out(self, prompts, limit, teacher):
        self.answers += 1
        assert (limit, teacher) == (72, ["deploy/models/tiny-arlm"])
        return [np.arange(p.ordinal + 1, dtype=np.int32) for p in prompts]

    def held_out_kl(self, prompts, responses, teacher, block_size):
        assert [len(response) for response in responses] == [p.ordinal + 1 for p in prompts]
        kl = np.array([self.kl[p.ids.tobytes()][:block_size] for p in prompts])
        tokens = np.ones_like(kl, dtype=np.int64)
        return HeldOutSums(kl, 2 * kl, tokens, tokens * (np.arange(kl.shape[1]) == 1))


class Remote:
    """`actor.method.remote(...)`, which is called when its result is waited for."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        call = type("Method", (), {})()
        call.remote = lambda *arguments: partial(getattr(self.actor, method), *arguments)
        return call


@pytest.fixture
def local_calls(monkeypatch) -> None:
    monkeypatch.setattr(RemoteCalls, "wait", lambda self, calls, action, **options: [call() for call in calls])


@pytest.mark.parametrize("actors", [1, 2, 3, 9])
def test_held_out_prompts_give_the_same_whatever_the_number_of_actors(local_calls, tmp_path, actors):
    prompts = [Prompt(i, f"q{i}", np.array([i, 7], dtype=np.int32)) for i in range(7)]
    table = np.random.default_rng(0).exponential(size=(7, 8))
    kl = dict(zip((p.ids.tobytes() for p in prompts), table, strict=True))
    held_out = HeldOutPrompts(prompts, tmp_path, "fingerprint", 72)
    pool = [Actor(kl) for _ in range(actors)]
    config = load_config("tiny", ["--evaluation.every_batches", "3"])
    asked = Evaluator(config, [], Pools([Remote(a) for a in pool], [], []), RemoteCalls(1.0), held_out)
    asked.hold_out()
    assert [len(response) for response in held_out.responses()] == [1, 2, 3, 4, 5, 6, 7]  # in the order of the prompts
    assert asked.due(3, last=False) and not asked.due(4, last=False)

    metrics = asked.metrics(8, RolloutsInFlight())
    assert [metrics[f"eval/held_out_kl_{offset}"] for offset in range(1, 5)] == (table.sum(0) / 7)[:4].tolist()
    assert metrics["eval/held_out_kl"] == (table.sum(0) / 7).mean()
    assert metrics["eval/held_out_entropy"] == (2 * table.sum(0) / 7).mean()
    assert metrics["eval/held_out_accepted"] == 1 / 7
    assert asked.metrics(2, RolloutsInFlight()).keys() == {
        "eval/held_out_kl", "eval/held_out_kl_1", "eval/held_out_kl_2", "eval/held_out_entropy",
        "eval/held_out_accepted", "seconds/evaluation",
    }  # fmt: skip
    assert "eval/held_out_accepted" not in asked.metrics(1, RolloutsInFlight())  # nothing is drafted
    assert asked.before().keys() == {"held_out_kl_init"}
    assert asked.after(4)["held_out_kl"]["by_offset"] == (table.sum(0) / 7)[:4].tolist()
    assert asked.after(4)["held_out_kl"]["accepted_by_offset"] == [1, 0, 0]


def test_responses_are_made_once_by_each_original_and_limit(local_calls, tmp_path):
    prompts = [Prompt(i, f"q{i}", np.array([i, 7], dtype=np.int32)) for i in range(3)]

    def answers(held_out: HeldOutPrompts) -> int:
        pool = [Actor({}) for _ in range(2)]
        config = load_config("tiny")
        Evaluator(config, [], Pools([Remote(a) for a in pool], [], []), RemoteCalls(1.0), held_out).hold_out()
        return sum(actor.answers for actor in pool)

    assert answers(HeldOutPrompts(prompts, tmp_path, "one", 72)) == 2
    assert answers(HeldOutPrompts(prompts, tmp_path, "one", 72)) == 0
    assert answers(HeldOutPrompts(prompts, tmp_path, "another", 72)) == 2
    assert answers(HeldOutPrompts(prompts[::-1], tmp_path, "another", 72)) == 2
    assert HeldOutPrompts(prompts[::-1], tmp_path, "another", 8).responses() is None
    assert HeldOutPrompts(prompts[::-1], Path(tmp_path / "elsewhere"), "another", 72).responses() is None
