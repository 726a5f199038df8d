"""Updates are counted as the run makes them, and the learning rate depends on the update's index alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.learner import LearnerConfig
from learner.schedule import RunUpdates, count_updates, learning_rate
from tests.unit.test_config import run_config

PLAN = RunUpdates(warmup=2, total=20)


def test_learning_rates():
    shared = {"lr": 1.0, "min_lr": 0.1}
    wsd = LearnerConfig(**shared, lr_schedule="wsd", decay_share=0.5)
    rates = [learning_rate(wsd, u, PLAN) for u in (0, 1, 2, 9, 10, 15, 19)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.55, 0.19])
    constant = LearnerConfig(**shared, lr_schedule="constant")
    assert [learning_rate(constant, u, PLAN) for u in (0, 2, 19)] == [0.5, 1.0, 1.0]
    cosine = LearnerConfig(**shared)
    assert learning_rate(cosine, 11, PLAN) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))


def test_a_short_last_batch_has_its_own_number_of_updates():
    """128 prompts a batch, 8 rows an update: nine batches of 16 updates, and one of 2."""
    config = run_config(rollout={"prompts_per_batch": 128}, learner={"batch_rows": 8})
    updates = count_updates(config, 9 * 128 + 16)
    assert updates == RunUpdates(warmup=80, total=146)
    rates = [learning_rate(config.learner, u, updates) for u in range(146)]
    assert rates[:80] == pytest.approx([1e-5 * (u + 1) / 80 for u in range(80)])
    cosine = [1e-6 + 4.5e-6 * (1 + math.cos(math.pi * u / 66)) for u in range(66)]
    assert rates[80:] == pytest.approx(cosine)
    # the last full batch ends, and the short one begins, where the cosine does
    assert rates[143:] == pytest.approx([1.0458e-6, 1.0204e-6, 1.0051e-6], rel=1e-4)


@given(
    prompts=st.integers(1, 60),
    per_batch=st.integers(1, 17),
    samples=st.integers(1, 4),
    batch_rows=st.integers(2, 9),
    max_batches=st.none() | st.integers(1, 9),
    warmup=st.integers(0, 3),
)
def test_the_count_is_that_of_a_loop_over_the_batches(prompts, per_batch, samples, batch_rows, max_batches, warmup):
    config = run_config(
        rollout={"prompts_per_batch": per_batch, "samples_per_prompt": samples},
        learner={"batch_rows": batch_rows, "warmup_batches": warmup},
        pipeline={"max_batches": max_batches},
    )
    batches = [range(prompts)[i : i + per_batch] for i in range(0, prompts, per_batch)][:max_batches]
    done = sum(len(range(0, len(batch) * samples, batch_rows)) for batch in batches)
    full = len(range(0, per_batch * samples, batch_rows))
    assert count_updates(config, prompts) == RunUpdates(warmup=warmup * full, total=done)
