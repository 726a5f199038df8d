"""The rollout actor in this process: its trajectories are whole blocks, whatever the limit, and it can be replaced."""

import numpy as np

from actors.rollout import RolloutActor
from common.config.file import load_config
from common.config.unmasking import DynamicUnmasking
from common.prompts import Prompt
from common.trajectory import from_batch
from deploy.preflight import read_prompts

BLOCK = 8


def test_a_rollout_runs_to_the_end_of_the_block_in_which_it_reaches_its_limit():
    actor = RolloutActor(load_config("tiny", ["--data.domain_max_tokens", "{math: 3}"]), 0)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(i, "q", rng.integers(10, 200, length).astype(np.int32), domain=domain)
        for i, (length, domain) in enumerate([(5, ""), (8, ""), (15, ""), (21, "math"), (16, "math")])
    ]
    body = rng.integers(10, 200, 40).astype(np.int32)
    prompts += [Prompt(5, "q", prompts[0].ids, responses=(body,))]
    streamed = list(actor.rollout(prompts, 8, BLOCK, DynamicUnmasking()))
    rows = [t for batch in streamed[::2] for t in from_batch(batch)[0]]
    assert [key for info in streamed[1::2] for key in info.keys] == [(t.ordinal, t.sample) for t in rows]
    ends = {0: 16, 1: 16, 2: 24, 3: 24, 4: 24, 5: 16}
    assert {t.ordinal: len(t.x0) for t in rows if t.finish_reason == "length"}.items() <= ends.items()
    for t in rows:
        assert len(t.x0) % BLOCK == 0 and len(t.x0) <= ends[t.ordinal]
        assert (len(t.tail_ids) == 0) or t.finish_reason == "eos"
    assert sum(t.finish_reason == "length" for t in rows) >= 4
    assert next(t for t in rows if t.ordinal == 5).response_ids.tolist() == body[:11].tolist()


def test_of_a_share_only_what_is_missing_is_made_and_equals_what_was_lost():
    config = load_config("tiny", ["--rollout.samples_per_prompt", "2"])
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, "q", rng.integers(10, 200, 9).astype(np.int32)) for i in range(3)]
    prompts += [Prompt(3, "q", prompts[0].ids, responses=(prompts[1].ids, prompts[2].ids))]
    missing = {(0, 1), (2, 0), (3, 1)}

    def responses(keys):
        streamed = list(RolloutActor(config, 0).rollout(prompts, 8, 4, DynamicUnmasking(), keys=keys))
        return {(t.ordinal, t.sample): t.response_ids.tolist() for b in streamed[::2] for t in from_batch(b)[0]}

    whole, again = responses(None), responses(missing)
    assert len(whole) == 8
    assert again == {key: whole[key] for key in missing}


def test_an_actor_that_takes_anothers_place_has_the_same_held_out_kl():
    config = load_config("tiny", ["--evaluation.held_out_prompts", "6"])
    first, second = RolloutActor(config, 0), RolloutActor(config, 0)
    prompts = read_prompts(config, first.tokenizer)[0].held_out
    responses = first.answer_held_out(prompts, 12, [config.teacher_path])
    assert [len(response) for response in responses] == [12] * 6
    whole = first.held_out_kl(prompts, responses, [config.teacher_path], 8)
    other = second.held_out_kl(prompts, responses, [config.teacher_path], 8)
    np.testing.assert_allclose(other.kl, whole.kl, rtol=1e-5)
    share = second.held_out_kl(prompts[1::2], responses[1::2], [config.teacher_path], 8)  # as one of two actors
    np.testing.assert_allclose(share.kl, whole.kl[1::2], rtol=1e-5)
    assert whole.kl.sum() > whole.tokens.sum()  # more than a nat a token: the student is not trained
