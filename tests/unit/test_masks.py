"""The attention rule against its definition in words, position by position."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from common.masks import dense_mask

TOKEN = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3))


@given(st.lists(TOKEN, min_size=1, max_size=12))
def test_rule_in_words(tokens):
    doc, copy, block = (torch.tensor([[t[i] for t in tokens]]) for i in range(3))
    mask = dense_mask(doc, copy, block)
    assert mask.shape == (1, 1, len(tokens), len(tokens))
    for q, (doc_q, copy_q, block_q) in enumerate(tokens):
        for k, (doc_k, copy_k, block_k) in enumerate(tokens):
            if doc_q != doc_k:
                expected = False
            elif copy_k == 0 and block_k < block_q:
                expected = True  # a clean earlier block, from the clean and from every noised copy
            else:
                expected = copy_q == copy_k and block_q == block_k  # its own block, both directions
            assert mask[0, 0, q, k].item() == expected
