"""Block-aware targets (TCSM): branches scored by the teacher are those of plain forwards, and of enumeration."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from actors.rollout import RolloutActor
from actors.teacher.actor import annotate, build_backend
from actors.teacher.block_aware import block_aware, branch_scores
from actors.teacher.targets import TargetRequest, TopkTargets, log_tail_mass
from common.config.errors import ConfigError
from common.config.file import load_config
from common.config.targets import TeacherTarget
from common.config.unmasking import DynamicUnmasking
from common.prompts import Prompt
from common.student import load_model
from common.trajectory import from_batch
from tests.models import tiny_qwen3
from tests.trajectories import random_trajectory

BLOCK, K = 4, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tiny_qwen3(tmp_path_factory.mktemp("model"), seed=2)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, torch.float64, "sdpa")


def log_p(model, ids) -> torch.Tensor:
    """float64 [n, V]: of each next token."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)


def top(model, x, positions) -> TopkTargets:
    found = [log_p(model, x[:i])[-1].topk(K) for i in positions]
    logprobs = np.array([f.values.numpy() for f in found])
    return TopkTargets(np.array([f.indices.numpy() for f in found], np.int32), logprobs, log_tail_mass(logprobs))


@pytest.mark.parametrize("length", [11, 12, 14])
def test_branches_have_the_scores_of_plain_forwards(model, length, monkeypatch):
    """In float64, with the last block whole and cut, and in several forwards."""
    monkeypatch.setattr("actors.teacher.block_aware._BRANCH_TOKENS", 20)
    x = np.random.default_rng(length).integers(10, 200, length).astype(np.int32)
    positions = np.array([2, 3, 4, 5, 6, 9, length - 1])
    targets = top(model, x, positions)
    found = branch_scores(model, TargetRequest(x, positions), targets.ids, BLOCK)
    for i, own, candidates in zip(positions, found, targets.ids, strict=True):
        end = min((i // BLOCK + 1) * BLOCK, length)
        for c, score in zip(candidates, own, strict=True):
            branch = [*x[:i], int(c), *x[i + 1 : end]]
            after = log_p(model, branch)
            expected = sum(after[j - 1, branch[j]].item() for j in range(i + 1, end))
            assert score == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert end - i > 1 or not own.any()


def test_the_target_is_the_teachers_posterior_given_the_rest_of_the_block(folder):
    """Exactly, by enumeration of all blocks of a model of few tokens: p(x_i | x^{<i}, x^{i+1..e})."""
    model = load_model(folder, torch.float64, "sdpa")
    vocabulary, prefix = 4, [10, 11, 12, 13]
    joint = np.zeros((vocabulary,) * BLOCK)
    for block in product(range(vocabulary), repeat=BLOCK):
        with torch.no_grad():
            of = model(torch.tensor([[*prefix, *block]])).logits[0, :, :vocabulary].log_softmax(-1)
        joint[block] = sum(of[len(prefix) - 1 + k, token].item() for k, token in enumerate(block))
    joint = np.exp(joint - np.logaddexp.reduce(joint, axis=None))
    x = np.array([*prefix, 2, 0, 3, 1], np.int32)
    positions = np.arange(4, 8)
    ids = np.tile(np.arange(vocabulary, dtype=np.int32), (4, 1))
    with torch.no_grad():
        causal = model(torch.from_numpy(x[None].astype(np.int64))).logits[0, 3:7, :vocabulary].log_softmax(-1)
    targets = TopkTargets(ids, causal.numpy(), np.full(4, np.log(1e-12), np.float32))
    found = block_aware(model, TargetRequest(x, positions), targets, BLOCK, 1.0, np.ones(4, bool), vocabulary)
    for k in range(BLOCK):
        at = tuple(x[4:8][:k]), tuple(x[4:8][k + 1 :])
        posterior = joint[(*at[0], slice(None), *at[1])]
        np.testing.assert_allclose(
            np.exp(found.logprobs[k])[np.argsort(found.ids[k])], posterior / posterior.sum(), rtol=1e-5
        )


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_mass_of_the_best_tokens_is_spread_and_the_rest_stays(model, share):
    """In float64 by the formula; at the block's last position it is the teacher's own."""
    x = np.random.default_rng(0).integers(10, 200, 13).astype(np.int32)
    positions = np.array([4, 5, 7, 8, 12])
    targets = top(model, x, positions)
    found = block_aware(model, TargetRequest(x, positions), targets, BLOCK, share, np.ones(5, bool))
    ahead = branch_scores(model, TargetRequest(x, positions), targets.ids, BLOCK)
    for row in range(len(positions)):
        p = np.exp(targets.logprobs[row])
        s = targets.logprobs[row] + ahead[row]
        q = np.exp(s - np.logaddexp.reduce(s))
        expected = dict(zip(targets.ids[row].tolist(), (1 - share) * p + share * p.sum() * q, strict=True))
        for token, value in zip(found.ids[row].tolist(), np.exp(found.logprobs[row]), strict=True):
            assert value == pytest.approx(expected[token], rel=1e-5)
        assert (np.diff(found.logprobs[row]) <= 0).all()
        assert np.exp(found.logprobs[row]).sum() == pytest.approx(p.sum(), rel=1e-6)
    np.testing.assert_array_equal(found.log_tail_mass, targets.log_tail_mass)
    for last in (2, 4):
        np.testing.assert_allclose(found.logprobs[last], targets.logprobs[last], rtol=1e-6)
    assert np.abs(found.logprobs[0] - targets.logprobs[0]).max() > 1e-3


def test_positions_that_are_not_routed_keep_the_teachers_own(model):
    x = np.random.default_rng(0).integers(10, 200, 13).astype(np.int32)
    positions = np.array([4, 5, 8, 9])
    targets, routed = top(model, x, positions), np.array([True, False, False, True])
    request = TargetRequest(x, positions)
    found = block_aware(model, request, targets, BLOCK, 0.7, routed)
    every = block_aware(model, request, targets, BLOCK, 0.7, np.ones(4, bool))
    np.testing.assert_array_equal(found.logprobs[routed], every.logprobs[routed])
    np.testing.assert_array_equal(found.logprobs[~routed], targets.logprobs[~routed])
    np.testing.assert_array_equal(found.ids[~routed], targets.ids[~routed])
    assert block_aware(model, request, targets, BLOCK, 0.7, np.zeros(4, bool)) is targets


def test_routing_is_unbiased(folder):
    """Over trajectories, the mean target is that of all positions; each is a distribution."""
    config = load_config("tiny", ["--teacher.target", "topk", "--teacher.backend", "transformers"]).teacher
    backend = build_backend(config, folder)
    rng = np.random.default_rng(3)
    t = replace(
        random_trajectory(rng, BLOCK, 9),
        prompt_ids=rng.integers(10, 200, BLOCK).astype(np.int32),
        response_ids=rng.integers(10, 200, BLOCK).astype(np.int32),
    )
    rows = [replace(t, ordinal=i, target_offsets=np.arange(2, dtype=np.int32)) for i in range(300)]
    own, routed, whole = ([replace(r) for r in rows] for _ in range(3))
    annotate(backend, own[:1])
    annotate(backend, whole[:1], TeacherTarget(block_aware=0.2), BLOCK)
    annotate(backend, routed, TeacherTarget(block_aware=0.2, routed_share=0.25), BLOCK)

    def probability(row) -> np.ndarray:
        table = np.zeros((2, 300))
        np.put_along_axis(table, row.topk_ids.reshape(2, -1), np.exp(row.topk_logprobs).reshape(2, -1), axis=1)
        return table

    changed = [np.abs(probability(r) - probability(own[0])).max() > 1e-5 for r in routed]
    assert 0.3 < np.mean(changed) < 0.6  # one of two positions or both: 1 - 0.75 ** 2
    mean = np.mean([probability(r) for r in routed], axis=0)
    step = np.abs(probability(whole[0]) - probability(own[0])).max()
    assert np.abs(mean - probability(whole[0])).max() < 0.5 * step


def test_a_teacher_gives_them_in_place_of_its_own(folder):
    options = ["--teacher.target", "topk", "--teacher.backend", "transformers", "--objective.target.block_aware", "1"]
    config = load_config("tiny", ["--model.path", folder, *options])
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, "q", rng.integers(10, 200, 5 + i).astype(np.int32)) for i in range(3)]
    streamed = list(RolloutActor(config, 0).rollout(prompts, 12, BLOCK, DynamicUnmasking(threshold=0.05)))
    rows = [t for batch in streamed[::2] for t in from_batch(batch)[0]]
    backend = build_backend(config.teacher, folder)
    annotate(backend, rows)
    plain = [t.topk_logprobs.copy() for t in rows]
    annotate(backend, rows, config.objective.teacher_shape, BLOCK)
    assert any(np.abs(before - t.topk_logprobs).max() > 1e-3 for before, t in zip(plain, rows, strict=True))
    for before, t in zip(plain, rows, strict=True):
        mass = np.exp(t.topk_logprobs).reshape(-1, 16).sum(1)
        np.testing.assert_allclose(mass, np.exp(before).reshape(-1, 16).sum(1), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--teacher.backend", "transformers"],
            r"block_aware \(1\) scores branches .* teacher.target 'hidden' does not",
        ),
        (
            [
                "--teacher.target",
                "topk",
                "--teacher.backend",
                "transformers",
                "--teacher.reads",
                "state",
                "--evaluation.teacher",
                "false",
            ],
            r"teacher.reads 'state' does not do; set it to 'prefix'",
        ),
        (["--objective.target.routed_share", "0.5"], r"block_aware \(1\) is above routed_share \(0\.5\)"),
        (["--objective.target.top_p", "0.9"], r"block_aware \(1\) is defined on the teacher's own distribution"),
    ],
)
def test_teachers_that_score_no_branches_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", ["--objective.target.block_aware", "1", *options])


def test_top_k_targets_have_one_shape_for_all_losses():
    extra = '[{"target": {"kind": "teacher", "top_k": 4}}]'
    with pytest.raises(ConfigError, match=r"objective.extra: with teacher.target 'topk' the teacher reshapes"):
        load_config("tiny", ["--teacher.target", "topk", "--objective.extra", extra])
    only = load_config(
        "tiny",
        ["--teacher.target", "topk", "--objective.extra", extra, "--objective.target.kind", "hard"],
    )
    assert only.objective.teacher_shape == TeacherTarget(top_k=4)
