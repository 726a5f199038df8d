"""Truncation with exact ties: one rule, and sampling follows it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.sampler.sampling import Decoding, sample_tokens
from common.config.targets import TeacherTarget
from common.reshaping import reshape, truncate

TIED = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]).log()  # by rank: tokens 1, 3; then 2, 4, 5; then 0; 6 never


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 4}, [1, 2, 3, 4]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.2}, [1]),
        ({"top_p": 0.6}, [1, 2, 3]),  # 3 + 3 + 2 of 13
        ({"top_p": 0.7}, [1, 2, 3, 4]),
        ({"min_p": 0.6}, [1, 2, 3, 4, 5]),
        ({"top_k": 4, "top_p": 0.7}, [1, 2, 3]),  # 3 + 3 + 2 of the 10 that top-k left
        ({"top_k": 4, "min_p": 0.9}, [1, 3]),
    ],
    ids=str,
)
def test_among_equal_tokens_the_lower_id_stays(options, expected):
    assert kept(truncate(TIED, **options)) == expected
    rows = TIED.repeat(3, 2, 1)
    torch.testing.assert_close(truncate(rows, **options), truncate(TIED, **options).expand_as(rows))
    assert kept(reshape(TIED[None], TeacherTarget(**options))[0]) == expected


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.integers(0, 13),
    st.sampled_from([0.137, 0.531, 0.813, 1.0]),
)
def test_equal_to_a_loop_over_ranked_tokens(values, top_k, top_p):
    logits = torch.tensor(values, dtype=torch.float64)
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))[: top_k or None]
    p = logits[ranked].softmax(0).tolist()
    nucleus = [i for n, i in enumerate(ranked) if top_p == 1 or sum(p[:n]) < top_p]
    assert kept(truncate(logits, top_k, top_p)) == sorted(nucleus)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.7}], ids=str)
def test_sampling_reaches_exactly_what_the_teacher_would_keep(options):
    count, mask = 1000, 6
    noise = (torch.arange(count) + 0.5) / count
    tokens, _, _ = sample_tokens(TIED.expand(count, -1), noise, Decoding(temperature=1.0, **options), mask)
    assert tokens.unique().tolist() == kept(reshape(TIED[None], TeacherTarget(**options))[0])
