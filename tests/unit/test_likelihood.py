"""Likelihoods against brute force: every continuation, and every decoding order, of a tiny vocabulary."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.evaluation.likelihood import Estimate, block_states, log_likelihoods
from tests.reference import block_causal_logits

VOCABULARY, MASK = 4, 4  # four tokens and the mask
CONTEXTS = [[0], [3, 1], [0, 1, 2], [2, 0, 1, 3, 3]]


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.5,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def chain(model: Qwen3ForCausalLM, context: list[int], x: list[int], order: tuple[int, ...], block_size: int) -> float:
    """Direct: reveal one position a step, blocks from left to right, `order` sorting the offsets within a block."""
    ids, total = list(context), 0.0
    grid = -(-(len(context) + len(x)) // block_size) * block_size
    state = [*context, *[MASK] * (grid - len(context))]
    for block in range(len(context) // block_size, grid // block_size):
        offsets = [block * block_size + o for o in order]
        for position in [p for p in offsets if len(context) <= p < len(context) + len(x)]:
            logits = block_causal_logits(model, state[: (block + 1) * block_size], block_size)[position]
            logits[MASK] = -torch.inf
            token = x[position - len(ids)]
            total += torch.log_softmax(logits, 0)[token].item()
            state[position] = token
    return total


def scores(model, pairs, estimate, block_size=3, **options):
    found = log_likelihoods(model, pairs, block_size=block_size, mask_token_id=MASK, estimate=estimate, **options)
    return np.array([likelihood.log_prob for likelihood in found])


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_sequential_sums_to_one_over_all_continuations(model, context, n):
    pairs = [(context, list(x)) for x in product(range(VOCABULARY), repeat=n)]
    log_p = scores(model, pairs, Estimate("sequential"))
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-5)
    for (_, x), value in list(zip(pairs, log_p, strict=True))[:: 4 ** (n - 1)]:
        assert value == pytest.approx(chain(model, context, x, (0, 1, 2), 3), abs=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
def test_enumerated_bound_is_the_mean_over_all_orders_and_below_the_likelihood(model, context):
    x = [2, 0, 3, 1]  # crosses a block's edge for every context
    orders = [chain(model, context, x, order, 3) for order in permutations(range(3))]
    bound = scores(model, [(context, x)], Estimate("bound", samples=7))[0]
    assert bound == pytest.approx(np.mean(orders), abs=1e-4)


def test_the_likelihood_that_the_bound_is_of_sums_to_one(model):
    mixture, bounds = [], []
    for x in product(range(VOCABULARY), repeat=2):
        mixture.append(np.mean([np.exp(chain(model, [3], list(x), order, 3)) for order in permutations(range(3))]))
        bounds.append(scores(model, [([3], list(x))], Estimate("bound"))[0])
    assert sum(mixture) == pytest.approx(1, abs=1e-5)
    assert all(bound <= np.log(p) + 1e-5 for bound, p in zip(bounds, mixture, strict=True))
    assert any(bound < np.log(p) - 1e-3 for bound, p in zip(bounds, mixture, strict=True))


def test_sampled_bound_has_the_enumerated_one_as_its_mean(model):
    pair = ([3], [2, 0, 3, 1, 1])
    exact = scores(model, [pair], Estimate("bound", samples=31), block_size=6)[0]
    draws = [scores(model, [pair], Estimate("bound", samples=16, seed=s), block_size=6)[0] for s in range(60)]
    error = np.std(draws, ddof=1) / np.sqrt(len(draws))
    assert error > 0
    assert abs(np.mean(draws) - exact) < 4 * error


@pytest.mark.parametrize("method", ["sequential", "bound"])
def test_batching_and_splitting_change_nothing(model, method):
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 4, 1 + i).tolist(), rng.integers(0, 4, 1 + 3 * i % 8).tolist()) for i in range(9)]
    together = scores(model, pairs, Estimate(method))
    alone = np.concatenate([scores(model, [pair], Estimate(method)) for pair in pairs])
    split = scores(model, pairs, Estimate(method), token_budget=8)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, split, atol=1e-5)


@pytest.mark.parametrize("method", ["sequential", "bound"])
def test_greedy_is_what_left_to_right_decoding_writes(model, method):
    context, best = [1, 2], []
    for position in range(2, 6):
        end = (position // 3 + 1) * 3
        state = [*context, *best, *[MASK] * (end - 2 - len(best))]
        logits = block_causal_logits(model, state, 3)[position]
        logits[MASK] = -torch.inf
        best.append(int(logits.argmax()))
    other = [*best[:3], (best[3] + 1) % 4]
    options = {"block_size": 3, "mask_token_id": MASK, "estimate": Estimate(method, samples=4)}
    found = log_likelihoods(model, [(context, best), (context, other), (context, [])], **options)
    assert [likelihood.greedy for likelihood in found] == [True, False, True]
    assert found[2].log_prob == 0


def test_weights_of_the_bound_give_each_position_one():
    for samples in (15, 10_000):  # enumerated exactly; of the sampled ones the mean
        n = 4 if samples == 15 else 14
        weights = sum(state.weight for state in block_states(n, 0, Estimate("bound", samples=samples)))
        np.testing.assert_allclose(weights, 1, atol=1e-12 if n == 4 else 0.1)
