"""The response length limit: ends, shape, and the block grid."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import CurriculumConfig
from common.curriculum import response_limit


def test_linear_grows_evenly_from_least_to_greatest():
    config = CurriculumConfig(schedule="linear", min_tokens=100, max_tokens=4000, batches=10)
    assert [response_limit(config, s, 4) for s in (0, 1, 5, 10, 99)] == [100, 488, 2048, 4000, 4000]


def test_cos_starts_slowly_and_follows_its_formula():
    config = CurriculumConfig(schedule="cos", min_tokens=100, max_tokens=4000, batches=100)
    for s in range(0, 130, 7):
        exact = 100 + (1 - math.cos(math.pi * min(1, s / 100) / 2)) * 3900
        limit = response_limit(config, s, 4)
        assert limit % 4 == 0
        assert exact - 4 < limit <= exact + 1e-6
    assert response_limit(config, 10, 4) < 100 + 0.1 * 3900
    assert response_limit(config, 100, 4) == 4000


def test_constant_is_the_greatest_from_the_start():
    config = CurriculumConfig(schedule="constant", min_tokens=100, max_tokens=400)
    assert {response_limit(config, s, 4) for s in (0, 1, 1000)} == {400}


@given(
    schedule=st.sampled_from(["constant", "linear", "cos"]),
    block=st.sampled_from([1, 4, 8, 32]),
    least=st.integers(1, 50),
    more=st.integers(0, 200),
    batches=st.integers(1, 300),
)
def test_limit_lies_on_the_grid_never_shrinks_and_reaches_both_ends(schedule, block, least, more, batches):
    config = CurriculumConfig(
        schedule=schedule, min_tokens=least * block, max_tokens=(least + more) * block, batches=batches
    )
    limits = [response_limit(config, s, block) for s in range(batches + 2)]
    assert all(limit % block == 0 for limit in limits)
    assert limits == sorted(limits)
    assert limits[-1] == limits[-2] == config.max_tokens
    assert schedule == "constant" or limits[0] == config.min_tokens


@pytest.mark.parametrize("schedule", ["linear", "cos"])
def test_never_below_one_block(schedule):
    config = CurriculumConfig(schedule=schedule, min_tokens=1, max_tokens=64, batches=10)
    assert response_limit(config, 0, 16) == 16
