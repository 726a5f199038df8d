"""Unmasking rules against a loop over rows, on random inputs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.sampler.unmasking import choose
from common.config.unmasking import (
    AdaptiveUnmasking,
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    StaticUnmasking,
)
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
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(
        lambda p: (
            AdaptiveUnmasking(lower=min(p), upper=max(p)),
            {"rule": "adaptive", "lower": min(p), "threshold": max(p)},
        )
    ),
)


@given(RULES, st.integers(0, 2**32 - 1))
def test_equal_to_the_reference(rule, seed):
    unmasking, reference = rule
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(5, 8, generator=generator) < 0.6
    masked[0] = False
    confidence = torch.rand(5, 8, generator=generator).double()
    entropy = 2 * torch.rand(5, 8, generator=generator).double()
    seen = (torch.rand(5, 8, generator=generator) < 0.5) & ~masked & (torch.arange(5) > 1)[:, None]
    revealed = torch.where(seen, torch.rand(5, 8, generator=generator).double(), torch.nan)
    reveal = choose(unmasking, masked, confidence, entropy, revealed)
    for row in range(5):
        candidates = {j: (0, confidence[row, j].item(), entropy[row, j].item()) for j in range(8) if masked[row, j]}
        defaults = {"threshold": 0.9, "per_step": 1, "bound": 0.1, "lower": 0.6}
        defaults["seen"] = revealed[row][seen[row]].tolist()
        expected = chosen_positions(candidates, **{**defaults, **reference}) if candidates else []
        assert reveal[row].nonzero()[:, 0].tolist() == sorted(expected)


def test_threshold_is_strict():
    confidence = torch.tensor([[0.9, 0.95, 0.1]])
    reveal = choose(
        DynamicUnmasking(threshold=0.9), torch.ones(1, 3, dtype=torch.bool), confidence, confidence, confidence
    )
    assert reveal.tolist() == [[False, True, False]]


def test_the_adaptive_threshold_is_the_highest_confidence_then_the_mean_of_those_revealed_within_its_bounds():
    rule, nan = AdaptiveUnmasking(lower=0.6, upper=0.9), torch.nan

    def revealed(confidence: list[float], before: list[float]) -> list[int]:
        seen = torch.tensor([before])
        return choose(rule, seen.isnan(), *[torch.tensor([confidence])] * 2, seen)[0].nonzero()[:, 0].tolist()

    first = [nan] * 4
    assert revealed([0.95, 0.91, 0.89, 0.3], first) == [0, 1]  # the highest is above 0.9
    assert revealed([0.7, 0.65, 0.69, 0.3], first) == [0]  # the highest itself
    assert revealed([0.5, 0.4, 0.3, 0.2], first) == [0]  # all are below 0.6, but one is always revealed
    assert revealed([0.75, 0.8, 0.7, 0.3], [nan, nan, 0.7, 0.8]) == [0, 1]  # the mean, 0.75, reached
    assert revealed([0.61, 0.8, 0.7, 0.3], [nan, nan, 0.1, 0.2]) == [0, 1]
    assert revealed([0.9, 0.85, 0.7, 0.3], [nan, nan, 1.0, 1.0]) == [0]
