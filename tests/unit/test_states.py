"""State selection: what is masked, what is trained, and with what weight."""

import math
from dataclasses import replace
from itertools import permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config.objective import ObjectiveConfig
from common.prompts import Prompt
from common.responses import offline_trajectory
from common.states import NoiseTokens, select_states
from common.trajectory import OFFLINE, Trajectory
from tests.trajectories import EOS, random_trajectory, trajectory

BLOCK = 4


def selected(t, seed=0, **objective):
    select_states(t, ObjectiveConfig(**objective), BLOCK, EOS, np.random.default_rng(seed))
    return t


def masks(t) -> np.ndarray:
    """bool [state_count, response + tail]"""
    out = np.zeros((t.state_count, len(t.reveal_round)), bool)
    out[t.masked_state, t.masked_offsets] = True
    return out


def blocks_of(t) -> np.ndarray:
    return (len(t.prompt_ids) + np.arange(len(t.reveal_round))) // BLOCK


@given(trajectory(), st.sampled_from(["per_block", "global", "all_rounds"]), st.integers(0, 99))
def test_every_state_was_visited(t, kind, seed):
    """Inside each block of each copy, the masked positions are those revealed in rounds >= k for one k."""
    selected(t, seed, state={"kind": kind})
    for mask in masks(t):
        for b in np.unique(blocks_of(t)):
            inside = blocks_of(t) == b
            if mask[inside].any():
                k = t.reveal_round[inside][mask[inside]].min()
                assert (mask[inside] == (t.reveal_round[inside] >= k)).all()


@given(trajectory(), st.sampled_from(["per_block", "global", "all_rounds", "random"]), st.integers(0, 99))
def test_tail_is_never_trained_and_every_kept_block_trains(t, kind, seed):
    selected(t, seed, state={"kind": kind})
    trained = t.loss_weight > 0
    assert (t.masked_offsets[trained] < len(t.response_ids)).all()
    assert not trained[t.masked_offsets >= len(t.response_ids)].any()
    assert t.target_offsets.tolist() == sorted(set(t.masked_offsets[trained].tolist()))
    for state in range(t.state_count):
        of_state = t.masked_state == state
        kept = set((blocks_of(t)[t.masked_offsets[of_state]]).tolist())
        training = set((blocks_of(t)[t.masked_offsets[of_state & trained]]).tolist())
        assert kept == training


@given(trajectory())
def test_all_rounds_trains_each_position_once_per_round_up_to_its_own(t):
    selected(t, state={"kind": "all_rounds"})
    counts = np.bincount(t.masked_offsets, minlength=len(t.reveal_round))
    response = len(t.response_ids)
    assert (counts[:response] == t.reveal_round[:response] + 1).all()


@given(trajectory())
def test_per_block_draws_each_round_about_equally(t):
    """Over seeds, the chosen round of the last trained block is uniform over its rounds."""
    block = blocks_of(t)
    inside = np.flatnonzero(block == block[len(t.response_ids) - 1])
    trainable = inside[inside < len(t.response_ids)]
    rounds = t.reveal_round[trainable].max() + 1
    seen = np.zeros(rounds)
    for seed in range(200):
        selected(t, seed)
        mask = masks(t)[0]
        seen[t.reveal_round[inside][mask[inside]].min()] += 1
    assert (seen > 200 / rounds * 0.4).all()


@given(trajectory(), st.integers(0, 99))
def test_exclude_eos_leaves_the_end_token_out_of_the_loss(t, seed):
    selected(t, seed, exclude_eos=True, state={"kind": "all_rounds"})
    trained = t.masked_offsets[t.loss_weight > 0]
    assert not (t.response_ids[trained] == EOS).any()


@given(trajectory(), st.integers(0, 99))
def test_inverse_t_weights_by_the_masked_share_of_the_block(t, seed):
    selected(t, seed, weight="inverse_t")
    mask = masks(t)[0] if t.state_count else None
    for offset, weight in zip(t.masked_offsets, t.loss_weight, strict=True):
        if weight > 0:
            inside = blocks_of(t) == blocks_of(t)[offset]
            assert weight == pytest.approx(1 / mask[inside].mean(), rel=1e-5)


@given(trajectory(), st.integers(0, 99), st.sampled_from(["block", "sequence"]))
def test_random_masks_keep_their_ratio_band(t, seed, scope):
    selected(t, seed, state={"kind": "random", "scope": scope, "min_ratio": 1.0, "max_ratio": 1.0})
    assert masks(t).all()
    selected(t, seed, state={"kind": "random", "scope": scope, "min_ratio": 0.0, "max_ratio": 0.0})
    per_block = [masks(t)[0][blocks_of(t) == b].sum() for b in np.unique(blocks_of(t))] if t.state_count else []
    assert max(per_block, default=1) == 1


@given(trajectory(), st.integers(0, 99), st.sampled_from(["block", "sequence"]))
def test_complementary_masks_train_every_position_once(t, seed, scope):
    masks_of = {"scope": scope, "at_least_one": False}
    selected(t, seed, state={"kind": "complementary", "masks": masks_of}, weight="inverse_t")
    trained = t.loss_weight > 0
    assert sorted(t.masked_offsets[trained].tolist()) == list(range(len(t.response_ids)))
    weight = dict(zip(t.masked_offsets[trained].tolist(), t.loss_weight[trained].tolist(), strict=True))
    for b in np.unique(blocks_of(t)):
        inside = [o for o in np.flatnonzero(blocks_of(t) == b) if o < len(t.response_ids)]
        ratios = {round(1 / weight[o], 4) for o in inside}  # t and 1 - t, as far as both copies train here
        assert len(ratios) <= 1 or sum(ratios) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("way", ["trajectory_share", "random_share", "complementary_share"])
@given(t=trajectory(), seed=st.integers(0, 99))
def test_a_mixture_of_one_is_that_way(way, t, seed):
    shares = {"trajectory_share": 0, "random_share": 0, "complementary_share": 0, way: 2}
    mixed = selected(t, seed, state={"kind": "mixture", **shares})
    copies, offsets = mixed.state_count, mixed.masked_offsets.tolist()
    kind = {"trajectory_share": "per_block", "random_share": "random", "complementary_share": "complementary"}[way]
    rng = np.random.default_rng(seed)
    rng.choice(3, p=[1, 0, 0])  # the mixture's own draw comes first
    select_states(t, ObjectiveConfig(state={"kind": kind}), BLOCK, EOS, rng)
    assert (copies, offsets) == (t.state_count, t.masked_offsets.tolist())


def test_a_mixture_draws_in_proportion():
    full = {"min_ratio": 1.0, "max_ratio": 1.0}
    state = {"kind": "mixture", "trajectory_share": 3, "complementary_share": 1, "visited": "all_rounds", "masks": full}
    t = offline_trajectory(
        Prompt(0, "", np.zeros(4, np.int32), responses=(np.full(8, 7, np.int32),)), 0, 8, BLOCK, 9, 1
    )
    t.reveal_round = np.tile(np.arange(4, dtype=np.int16), 2)
    # a full mask's complement is empty: one copy; all_rounds: four
    copies = [selected(t, seed, state=state).state_count for seed in range(400)]
    assert set(copies) == {1, 4}
    assert copies.count(1) / 400 == pytest.approx(0.25, abs=0.07)


def response_of_one_block() -> Trajectory:
    prompt = Prompt(0, "q", np.zeros(BLOCK, np.int32), responses=(np.arange(BLOCK, dtype=np.int32),))
    return offline_trajectory(prompt, 0, BLOCK, BLOCK, 99, EOS)


@pytest.mark.parametrize("bias", [0.0, math.log(10)])
def test_later_positions_are_masked_more_often_as_far_as_the_block_is_clean(bias):
    """With n of 4 masked at ratio t, all ordered draws without replacement in proportion to exp(bias (1 - t) i / B)
    (Efficient-DLM, equation 2), against 4000 masks."""
    ratio = 0.3
    state = {"kind": "random", "min_ratio": ratio, "max_ratio": ratio, "position_bias": bias}
    rng = np.random.default_rng(0)
    found, counts = np.zeros(BLOCK), np.zeros(BLOCK + 1)
    expected = {n: np.zeros(BLOCK) for n in range(1, BLOCK + 1)}
    weight = np.exp(bias * (1 - ratio) * np.arange(BLOCK) / BLOCK)
    for n, share in expected.items():
        for order in permutations(range(BLOCK), n):
            left, probability = weight.sum(), 1.0
            for i in order:
                probability *= weight[i] / left
                left -= weight[i]
            share[list(order)] += probability
    for _ in range(4000):
        t = response_of_one_block()
        select_states(t, ObjectiveConfig(state=state), BLOCK, EOS, rng)
        found[t.masked_offsets] += 1
        counts[len(t.masked_offsets)] += 1
    at_least_one = [0.7**4 + 4 * 0.3 * 0.7**3, *(comb(4, n) * 0.3**n * 0.7 ** (4 - n) for n in (2, 3, 4))]
    np.testing.assert_allclose(counts[1:] / 4000, at_least_one, atol=0.025)  # the bias leaves the number as it is
    of_n = sum(share * counts[n] for n, share in expected.items())
    np.testing.assert_allclose(found, of_n, atol=3 * 4000**0.5 / 2)
    assert (of_n[-1] / of_n[0] > 2) == bool(bias)


@given(trajectory(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]))
def test_suffix_masks_reach_from_a_token_of_the_response_to_the_blocks_end(t, seed, whole_share):
    selected(t, seed, state={"kind": "suffix", "whole_share": whole_share})
    masked = np.zeros(len(t.response_ids) + len(t.tail_ids), bool)
    masked[t.masked_offsets] = True
    block = blocks_of(t)
    for b in np.unique(block):
        of_block = masked[block == b]
        assert of_block[-1] and (np.diff(of_block.astype(int)) >= 0).all()
        assert masked[: len(t.response_ids)][block[: len(t.response_ids)] == b].any()
        assert of_block.all() or whole_share < 1


def test_suffix_masks_begin_everywhere_alike():
    t = Trajectory(
        0,
        0,
        np.arange(8),
        np.arange(4 * 4000),
        np.empty(0, np.int32),
        np.zeros(16000),
        np.zeros(16000),
        0,
        "length",
        1,
        1,
    )
    for whole_share in (0.0, 0.5):
        selected(t, 3, state={"kind": "suffix", "whole_share": whole_share})
        begins = 4 - np.bincount(t.masked_offsets // 4, minlength=4000)
        found = np.bincount(begins, minlength=4) / 4000
        expected = np.full(4, (1 - whole_share) / 4) + np.eye(4)[0] * whole_share
        np.testing.assert_allclose(found, expected, atol=0.03)


def test_the_drafter_method_is_the_originals_responses_at_suffix_states():
    objective = ObjectiveConfig(method="drafter")
    assert (objective.source.kind, objective.state.kind, objective.target.kind) == ("offline", "suffix", "teacher")
    with pytest.raises(ValidationError, match=r"means state\.kind suffix, but it is 'random'"):
        ObjectiveConfig(method="drafter", state={"kind": "random"})


def test_a_drafter_may_mix_rollouts_in_with_the_same_states():
    mixed = {"kind": "mixture", "schedule": "constant", "start": 0.8}
    objective = ObjectiveConfig(method="drafter", source=mixed)
    assert objective.state.kind == "suffix"
    rng = np.random.default_rng(5)
    rollout = random_trajectory(rng, BLOCK, 40)
    offline = replace(rollout, weights_version=OFFLINE)
    found = []
    for t in (rollout, offline):
        select_states(t, objective, BLOCK, EOS, np.random.default_rng(0))
        found.append((t.masked_offsets.tolist(), t.loss_weight.tolist()))
        for b in np.unique(blocks_of(t)):  # masked from a position on
            assert (np.diff(masks(t)[0][blocks_of(t) == b].astype(int)) >= 0).all()
    assert found[0] == found[1]
    with pytest.raises(ValidationError, match=r"source\.offline_state\.min_ratio \(0\.5\) is not used: state\.kind"):
        ObjectiveConfig(method="drafter", source={**mixed, "offline_state": {"min_ratio": 0.5}})
    with pytest.raises(ValidationError, match=r"means source\.kind offline or mixture, but it is 'student'"):
        ObjectiveConfig(method="drafter", source={"kind": "student"})


@given(trajectory(), st.integers(0, 99), st.sampled_from(["one", "inverse_t"]))
def test_later_drafts_of_a_block_have_less_weight(t, seed, weight):
    selected(t, seed, state={"kind": "suffix"}, weight=weight)
    plain = t.masked_offsets.tolist(), t.loss_weight
    selected(t, seed, state={"kind": "suffix", "decay": 0.5}, weight=weight)
    assert t.masked_offsets.tolist() == plain[0]
    before: dict[int, int] = {}
    for offset, w, of_plain in zip(t.masked_offsets, t.loss_weight, plain[1], strict=True):
        b = int(blocks_of(t)[offset])
        assert w == np.float32(of_plain * 0.5 ** before.get(b, 0))
        before[b] = before.get(b, 0) + 1


def noised(t, seed=0, **masks):
    objective = ObjectiveConfig(state={"kind": "random", **masks})
    select_states(t, objective, BLOCK, EOS, np.random.default_rng(seed), NoiseTokens(60, 50))
    return t


@given(trajectory(), st.integers(0, 99))
def test_mixed_noise_shows_masks_and_uniform_tokens_at_the_same_positions(t, seed):
    before = selected(t, seed, state={"kind": "random"}).masked_offsets.tolist()
    assert not len(t.shown_ids)
    noised(t, seed, uniform_share=1.0)
    assert t.masked_offsets.tolist() == before and len(t.shown_ids) == len(before)
    assert set(t.shown_ids.tolist()) <= set(range(60)) - {50}
    noised(t, seed, uniform_share=1e-9)
    assert t.shown_ids.tolist() == [50] * len(before)


@given(trajectory(), st.integers(0, 99))
def test_all_positions_of_a_noised_block_are_trained_and_the_others_are_shown_as_they_are(t, seed):
    masked = set(selected(t, seed, state={"kind": "random", "max_ratio": 0.5}).masked_offsets.tolist())
    noised(t, seed, max_ratio=0.5, all_positions=True)
    blocks = {int(blocks_of(t)[o]) for o in masked}
    assert t.masked_offsets.tolist() == [o for o, b in enumerate(blocks_of(t)) if int(b) in blocks]
    clean = np.concatenate([t.response_ids, t.tail_ids])
    for offset, shown, weight in zip(t.masked_offsets, t.shown_ids, t.loss_weight, strict=True):
        assert shown == (50 if int(offset) in masked else clean[offset])
        assert (weight > 0) == (offset < len(t.response_ids))


def test_uniform_tokens_are_uniform_over_all_but_the_mask_token():
    counts = np.bincount(NoiseTokens(6, 3).drawn(60_000, np.random.default_rng(0)), minlength=6)
    assert counts[3] == 0 and (np.abs(np.delete(counts, 3) / 12_000 - 1) < 0.05).all()
    assert set(NoiseTokens(3, 7).drawn(1000, np.random.default_rng(0)).tolist()) == {0, 1, 2}


def test_the_share_of_uniform_tokens_is_the_one_asked_for():
    rng = np.random.default_rng(0)
    t = random_trajectory(rng, BLOCK, 4000)
    noised(t, uniform_share=0.25, min_ratio=1.0, max_ratio=1.0)
    assert (t.shown_ids != 50).mean() == pytest.approx(0.25, abs=0.03)


def test_lift_refuses_mixed_noise():
    with pytest.raises(ValidationError, match=r"do not go with kind 'lift', which chooses among masked tokens"):
        ObjectiveConfig(state={"kind": "lift", "masks": {"uniform_share": 0.1}})
