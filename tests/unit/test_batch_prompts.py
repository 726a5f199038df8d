"""The prompts of a rollout batch: which have responses, which begin with one, and those of the extra losses."""

import numpy as np
import pytest

from common.prompts import Prompt, PromptSet
from deploy.batch_prompts import prompts_of_batch
from tests.unit.test_config import run_config

OFFLINE = {"source": {"kind": "offline"}, "state": {"kind": "random"}, "target": {"kind": "hard"}}
DATA = {"prompts": "p", "responses": "r"}


def of_batch(**objective):
    batch = [Prompt(i, f"q{i}", np.arange(8, dtype=np.int32)) for i in range(20)]
    known = PromptSet(batch, 20, {}, responses={p.question: [np.arange(30, dtype=np.int32)] for p in batch})
    config = run_config(objective=objective, data=DATA if objective else {"prompts": "p"})
    made = prompts_of_batch(config, known, batch, index=0, limit=40, block_size=4)
    assert len(batch) == 20 and not any(p.responses or p.begun for p in batch), "the run's own prompts stay as they are"
    return made


def test_the_students_own_rollouts_have_nothing_before_them():
    made = of_batch()
    assert [(p.ordinal, len(p.ids), len(p.responses), p.begun) for p in made] == [(i, 8, 0, 0) for i in range(20)]


def test_offline_responses_are_those_of_the_question():
    made = of_batch(**OFFLINE)
    assert [[r.tolist() for r in p.responses] for p in made] == [[list(range(30))]] * 20


def test_a_continued_source_begins_with_a_share_of_a_response():
    made = of_batch(source={"kind": "continued", "max_share": 0.8})
    assert all(len(p.ids) == 8 + p.begun and p.ids[8:].tolist() == list(range(p.begun)) for p in made)
    assert 0 < max(p.begun for p in made) <= 0.8 * 30


@pytest.mark.parametrize(("weight", "more"), [(0.5, 20), (0.0, 0)])
def test_the_prompts_of_an_extra_loss_come_behind_with_samples_of_their_own(weight, more):
    made = of_batch(extra=[{**OFFLINE, "weight": weight}])
    assert [p.ordinal for p in made] == [*range(20), *range(more)]
    assert all(p.first_sample == 1 and p.responses for p in made[20:])
