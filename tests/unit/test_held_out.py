"""The held-out KL: equal to a direct one, by offset, whoever computes which prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from actors.evaluation.autoregressive import load_autoregressive
from actors.evaluation.held_out import HeldOutSums, HeldOutTargets, greedy_responses
from common.prompts import Prompt, prompt_ids
from common.student import load_model, load_tokenizer
from tests.models import tiny_qwen3
from tests.reference import block_causal_logits

MASK = 262
# (prompt, response) tokens: on and off the grid, within one block, ending inside a block, at its end, across many
LENGTHS = [(8, 8), (5, 3), (3, 1), (1, 13), (7, 9), (12, 20), (10, 6)]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> PreTrainedModel:
    return load_model(tiny_qwen3(tmp_path_factory.mktemp("student"), seed=1), torch.float64, "sdpa")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> PreTrainedModel:
    return load_model(tiny_qwen3(tmp_path_factory.mktemp("original"), seed=2), torch.float64, "sdpa")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, 256, n, dtype=np.int32) for n in lengths) for lengths in LENGTHS]


def direct(student, original, pairs, block_size: int, tokens: int | None = None) -> HeldOutSums:
    """One forward for every block, masks written out, the definition of the KL as a sum over the vocabulary."""
    sums = HeldOutSums.zeros(len(pairs), block_size)
    for index, (prompt, response) in enumerate(pairs):
        x = [*prompt.tolist(), *response.tolist()]
        with torch.no_grad():
            predicted = original(input_ids=torch.tensor([x])).logits[0][:, :tokens].softmax(-1)
        for begin in range(0, len(x), block_size):
            state = x[:begin]
            state += [x[i] if i < len(prompt) else MASK for i in range(begin, begin + block_size)]
            q = block_causal_logits(student, state, block_size).log_softmax(-1)
            for i in range(max(begin, len(prompt)), min(begin + block_size, len(x))):
                p = predicted[i - 1]
                sums.kl[index, i - begin] += float((p * (p.log() - q[i, : len(p)])).sum())
                sums.entropy[index, i - begin] -= float((q[i].exp() * q[i]).sum())
                sums.tokens[index, i - begin] += 1
            best = q[:, [v for v in range(q.shape[1]) if v != MASK]].argmax(-1)  # numbers below MASK stay as they are
            for i in range(max(begin + 1, len(prompt)), min(begin + block_size, len(x))):
                if int(best[i]) != x[i]:
                    break
                sums.accepted[index, i - begin] += 1
    return sums


def assert_equal(found: HeldOutSums, expected: HeldOutSums) -> None:
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.accepted.tolist() == expected.accepted.tolist()
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-9)
    np.testing.assert_allclose(found.entropy, expected.entropy, rtol=1e-9)


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_it_equals_the_direct_sum(student, original, pairs, block_size):
    targets = HeldOutTargets(original, pairs, rows=288)
    found = targets.sums(student, block_size=block_size, mask_token_id=MASK)
    assert_equal(found, direct(student, original, pairs, block_size))
    assert found.tokens.sum() == sum(response for _, response in LENGTHS)  # neither prompts nor what is behind the end


def test_batches_and_rows_of_any_size_and_processes_with_any_share_give_the_same(student, original, pairs):
    whole = HeldOutTargets(original, pairs, rows=288).sums(student, block_size=4, mask_token_id=MASK)
    for budget in (8, 30, 64):  # a sequence's blocks in many rows; a sequence a row; some together
        targets = HeldOutTargets(original, pairs, rows=288, token_budget=budget)
        assert_equal(targets.sums(student, block_size=4, mask_token_id=MASK), whole)
    for processes in (2, 3):
        parts = HeldOutSums.zeros(len(pairs), 4)
        for i in range(processes):
            share = HeldOutTargets(original, pairs[i::processes], rows=288)
            part = share.sums(student, block_size=4, mask_token_id=MASK)
            for name, column in vars(part).items():
                getattr(parts, name)[i::processes] = column
        found, expected = parts.metrics(), whole.metrics()
        for name in ("by_offset", "accepted_by_offset"):
            assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-12)
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_offset_is_the_place_in_the_block_of_the_grid(student, original):
    prompt, response = np.arange(6, dtype=np.int32), np.arange(3, dtype=np.int32)  # at positions 6, 7 and 8
    sums = HeldOutTargets(original, [(prompt, response)], rows=288).sums(student, block_size=4, mask_token_id=MASK)
    assert sums.tokens.tolist() == [[1, 0, 1, 1]]
    first, _, third, fourth = sums.kl[0].tolist()
    mean = (first + third + fourth) / 3
    by_offset = [first, None, third, fourth]
    assert sums.metrics() == {
        "mean": pytest.approx(mean),
        "entropy": pytest.approx(sums.entropy.sum() / 3),
        "by_offset": by_offset,
        "accepted": sums.accepted.sum() / 2,
        "accepted_by_offset": [None, *sums.accepted[0, 2:].tolist()],
        "prompts": 1,
        "tokens": 3,
    }


def test_it_is_zero_where_both_predict_the_same_and_known_where_one_is_uniform(student, original, pairs, tmp_path):
    """With an LM head of zeros a model predicts every token alike."""
    uniform = load_model(tiny_qwen3(tmp_path / "uniform", seed=3, tied=False), torch.float64, "sdpa")
    uniform.get_output_embeddings().weight.data.zero_()
    nothing = HeldOutTargets(uniform, pairs, rows=288).sums(uniform, block_size=4, mask_token_id=MASK)
    np.testing.assert_allclose(nothing.kl, 0, atol=1e-12)
    assert nothing.metrics()["entropy"] == pytest.approx(np.log(288), rel=1e-12)
    sums = HeldOutTargets(original, pairs, rows=288).sums(uniform, block_size=4, mask_token_id=MASK)
    entropy = 0.0  # KL(p || uniform) = log V - H(p)
    for prompt, response in pairs:
        with torch.no_grad():
            log_p = original(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        entropy -= float((log_p.exp() * log_p)[len(prompt) - 1 : -1].sum())
    assert sums.kl.sum() == pytest.approx(sums.tokens.sum() * np.log(288) - entropy, rel=1e-9)


def test_an_original_with_other_rows_counts_with_its_tokens(student, pairs, tmp_path):
    original = load_model(tiny_qwen3(tmp_path / "original", seed=2, vocab=320), torch.float64, "sdpa")
    targets = HeldOutTargets(original, pairs, rows=288, tokens=263)
    assert_equal(targets.sums(student, block_size=4, mask_token_id=MASK), direct(student, original, pairs, 4, 263))


def test_the_originals_responses_are_greedy_and_end_with_the_end_token():
    folder = "deploy/models/tiny-arlm"
    model, tokenizer = load_autoregressive(folder, "cpu", "float32")
    questions = ["Tom has 5 apples and buys 4 more. How many now?", "Ann has 9 pens and loses 2. How many now?"]
    prompts = [Prompt(i, q, prompt_ids(load_tokenizer(folder), q)) for i, q in enumerate(questions)]
    for prompt, response in zip(prompts, greedy_responses(model, tokenizer, prompts, 72), strict=True):
        ids = prompt.ids.tolist()
        for token in response.tolist():
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
        assert response[-1] == tokenizer.eos_token_id
    assert [len(r) for r in greedy_responses(model, tokenizer, prompts, 5)] == [5, 5]


def test_accepted_drafts_reach_to_the_first_that_differs_and_begin_behind_the_first_token(student, original):
    """Each response is what the student drafts of its blocks, but for some tokens."""

    def sums(prompt: list[int], wrong: list[int]) -> np.ndarray:
        x = list(prompt)
        while len(x) < len(prompt) + 8:
            begin = len(x) // 4 * 4
            q = block_causal_logits(student, x + [MASK] * (begin + 4 - len(x)), 4)
            q[:, MASK] = -torch.inf
            known = len(x)
            x += q.argmax(-1)[known:].tolist()
            for i in wrong:
                if known <= i < len(x):
                    x[i] = (x[i] + 1) % 256
        pair = np.array(prompt, np.int32), np.array(x[len(prompt) : len(prompt) + 8], np.int32)
        targets = HeldOutTargets(original, [pair], rows=288)
        return targets.sums(student, block_size=4, mask_token_id=MASK).accepted[0]

    assert sums([1, 2, 3, 4], []).tolist() == [0, 2, 2, 2]
    assert sums([1, 2, 3, 4], [4]).tolist() == [0, 2, 2, 2]  # the verifier's own
    assert sums([1, 2, 3, 4], [6]).tolist() == [0, 2, 1, 1]
    assert sums([1, 2, 3, 4], [5, 11]).tolist() == [0, 1, 1, 0]
    assert sums([1, 2], []).tolist() == [0, 2, 2, 2]
    assert sums([1, 2], [2]).tolist() == [0, 2, 1, 1]  # behind a prompt that ends inside a block all are drafted
