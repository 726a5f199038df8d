"""Unmasking rules against a loop over rows, on random inputs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.sampler.unmasking import choose
from common.config.run import DynamicUnmasking, EntropyBoundUnmasking, SequentialUnmasking, StaticUnmasking
from tests.reference import chosen_positions

RULES = st.one_of(
    st.sampled_from([1, 2, 4, 8]).map(
        lambda n: (StaticUnmasking(steps_per_block=n), {"rule": "static", "per_step": 8 // n})
    ),
    st.tuples(st.floats(0, 1), st.integers(1, 4)).map(
        lambda p: (
            DynamicUnmasking(threshold=p[0], min_tokens=p[1]),
            {"rule": "dynamic", "threshold": p[0], "per_step": p[1]},
        )
    ),
    st.integers(1, 4).map(lambda n: (SequentialUnmasking(tokens_per_step=n), {"rule": "sequential", "per_step": n})),
    st.floats(0, 6).map(lambda b: (EntropyBoundUnmasking(bound_nats=b), {"rule": "entropy_bound", "bound": b})),
)


@given(RULES, st.integers(0, 2**32 - 1))
def test_equal_to_the_reference(rule, seed):
    unmasking, reference = rule
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(5, 8, generator=generator) < 0.6
    masked[0] = False
    confidence = torch.rand(5, 8, generator=generator).double()
    entropy = 2 * torch.rand(5, 8, generator=generator).double()
    reveal = choose(unmasking, masked, confidence, entropy)
    for row in range(5):
        candidates = {j: (0, confidence[row, j].item(), entropy[row, j].item()) for j in range(8) if masked[row, j]}
        defaults = {"threshold": 0.9, "per_step": 1, "bound": 0.1}
        expected = chosen_positions(candidates, **{**defaults, **reference}) if candidates else []
        assert reveal[row].nonzero()[:, 0].tolist() == sorted(expected)


def test_threshold_is_strict():
    confidence = torch.tensor([[0.9, 0.95, 0.1]])
    reveal = choose(DynamicUnmasking(threshold=0.9), torch.ones(1, 3, dtype=torch.bool), confidence, confidence)
    assert reveal.tolist() == [[False, True, False]]
