"""What a run has cost, against counts by hand."""

import numpy as np
import pytest

from actors.rollout import RolloutActor
from common.config.file import load_config
from common.config.unmasking import StaticUnmasking
from common.prompts import Prompt
from common.trajectory import from_batch
from deploy import batch_metrics
from deploy.checkpoints import RunState
from deploy.monitoring.metrics import METRICS
from deploy.placement import plan
from deploy.run_cost import RunCost


def test_flops_and_gpu_hours_by_formula():
    state = RunState(response_tokens=1_000, rollout_token_rows=7_000, seconds=1_800.0)
    costs = RunCost(student_parameters=10**6, teacher_parameters=(4 * 10**6,), gpus=2.5).metrics(state)
    assert costs == {
        "flops/rollout": 2 * 10**6 * 7_000,
        "flops/teacher": 2 * 4 * 10**6 * 1_000,
        "flops/learner": 6 * 10**6 * 1_000,
        "gpu_hours": 1.25,
    }
    assert costs.keys() <= METRICS.keys()


def test_a_frozen_base_has_no_gradients():
    config = load_config("tiny", ["--adapter.rank", "8", "--adapter.targets", "[q_proj]"])
    shape = plan(config).shape
    cost = RunCost.of(config, plan(config))
    n = shape.layers * 8 * (shape.hidden_size + shape.heads * shape.head_dim)
    assert cost.metrics(RunState(response_tokens=10))["flops/learner"] == 10 * (4 * shape.parameters + 6 * n)


def test_published_flops_are_met():
    """OPDLM-0.6B with its teacher of the same size: 0.048B response tokens, 0.23e18 FLOPs."""
    costs = RunCost(596 * 10**6, (596 * 10**6,), 8).metrics(RunState(response_tokens=48 * 10**6))
    assert costs["flops/teacher"] + costs["flops/learner"] == pytest.approx(0.23e18, rel=0.01)


def test_hard_labels_have_no_teacher_to_pay_for():
    config = load_config("tiny", [])
    sizes = RunCost.of(config, plan(config))
    assert (sizes.student_parameters, *sizes.teacher_parameters) == (plan(config).shape.parameters,) * 2
    hard = load_config("tiny", ["--objective.target.kind", "hard"])
    assert RunCost.of(hard, plan(hard)).teacher_parameters == (0,)


def test_token_rows_are_those_of_prefills_steps_and_commits_without_evaluations():
    actor = RolloutActor(load_config("tiny", ["--rollout.samples_per_prompt", "2", "--rollout.slots", "4"]), 0)
    lengths = (5, 8, 15)
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, "q", rng.integers(10, 200, n).astype(np.int32), answer="1") for i, n in enumerate(lengths)]
    for batch in (1, 2):
        actor.evaluate(prompts, StaticUnmasking(), 8, 4)
        rows = [t for b in list(actor.rollout(prompts, 8, 4, StaticUnmasking()))[::2] for t in from_batch(b)[0]]
        assert len(rows) == 6
        forwards = sum(t.denoise_forwards + t.commit_forwards for t in rows)
        prefilled = 4 + 8 + 12  # complete prompt blocks, once for both samples, which are admitted together
        assert actor.stats()["token_rows"] == batch * (4 * forwards + prefilled)


def test_a_restarted_actor_counts_from_zero():
    assert batch_metrics._grown(100, 150) == 50
    assert batch_metrics._grown(100, 30) == 30
