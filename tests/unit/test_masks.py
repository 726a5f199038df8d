"""The attention rule against its definition in words, and FlexAttention's tiles against the rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from common.masks import TILE, allowed, block_numbers, dense_mask, flex_mask, key_runs, within
from tests.trajectories import packed_rows

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


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 11)), min_size=1, max_size=12))
def test_the_context_causal_case_in_words(tokens):
    doc, copy, position = (torch.tensor([[t[i] for t in tokens]]) for i in range(3))
    mask = dense_mask(doc, copy, block_numbers(position, copy, 4, "causal"))
    for q, (doc_q, copy_q, at_q) in enumerate(tokens):
        for k, (doc_k, copy_k, at_k) in enumerate(tokens):
            if copy_q == 0:
                expected = copy_k == 0 and at_k <= at_q  # clean: causal
            elif copy_k == 0:
                expected = at_k // 4 < at_q // 4  # noised: the clean tokens of earlier blocks
            else:
                expected = copy_q == copy_k and at_q // 4 == at_k // 4  # its own block, both directions
            assert mask[0, 0, q, k].item() == (expected and doc_q == doc_k)


def layout(seed: int, **size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """doc, copy, block and positions of packed rows."""
    batch = packed_rows(seed, **size)
    doc, copy, block, positions = (torch.from_numpy(a) for a in (batch.doc, batch.copy, batch.block, batch.positions))
    return doc, copy, block, positions


LAYOUTS = {
    "block_size": st.sampled_from([1, 3, 4, 8]),
    "longest": st.sampled_from([3, 30, 90]),
    "count": st.integers(1, 8),
    "width": st.sampled_from([128, 300]),
    "rows": st.integers(1, 2),
    "context": st.sampled_from(["block", "causal"]),
}
WINDOWS = st.sampled_from([None, 1, 2, 7, 130])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), window=WINDOWS, size=st.fixed_dictionaries(LAYOUTS))
def test_the_keys_of_a_query_are_two_runs(seed, window, size):
    doc, copy, block, positions = layout(seed, **size)
    begin, end = key_runs(doc, copy, block, positions, window)
    key = torch.arange(doc.shape[1])
    of_run = (begin[..., None] <= key) & (key < end[..., None])
    assert not (of_run[0] & of_run[1]).any()
    assert torch.equal(of_run[0] | of_run[1], dense_mask(doc, copy, block, positions, window)[:, 0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), window=WINDOWS, size=st.fixed_dictionaries(LAYOUTS))
def test_the_tiles_are_those_of_create_block_mask(seed, window, size):
    """Which asks the rule for every pair: slow, but it takes rows of any layout."""
    doc, copy, block, positions = layout(seed, **size)

    def rule(b, h, q, k):
        near = within(window, positions[b, q], positions[b, k])
        return allowed(doc[b, q], copy[b, q], block[b, q], doc[b, k], copy[b, k], block[b, k]) & near

    rows, length = doc.shape
    slow = create_block_mask(rule, B=rows, H=None, Q_LEN=length, KV_LEN=length, device="cpu")
    fast = flex_mask(doc, copy, block, positions if window else None, window)
    assert fast.shape == slow.shape
    assert fast.seq_lengths == slow.seq_lengths
    assert fast.BLOCK_SIZE == slow.BLOCK_SIZE
    for part in ("kv", "full_kv", "q", "full_q"):
        count = getattr(fast, f"{part}_num_blocks")
        assert torch.equal(count, getattr(slow, f"{part}_num_blocks")), part
        a, b = getattr(fast, f"{part}_indices"), getattr(slow, f"{part}_indices")
        chosen = torch.arange(a.shape[-1]) < count[..., None]
        assert torch.equal(a[chosen], b[chosen]), part
    assert torch.equal(pairs_of(fast), dense_mask(doc, copy, block, positions, window)[:, 0])


def pairs_of(mask) -> Tensor:
    """bool [R, N, N]: what FlexAttention sees: all pairs of full tiles, those that the rule allows in other tiles."""
    rows, _, length, _ = mask.shape
    index = torch.arange(length)
    rule = mask.mask_mod(torch.arange(rows)[:, None, None], None, index[:, None], index[None, :])
    tiles = -(-length // TILE)
    chosen = {}
    for part in ("kv", "full_kv"):
        chosen[part] = torch.zeros(rows, tiles, tiles, dtype=torch.bool)
        for r in range(rows):
            for q in range(tiles):
                n = getattr(mask, f"{part}_num_blocks")[r, 0, q]
                chosen[part][r, q, getattr(mask, f"{part}_indices")[r, 0, q, :n].long()] = True
    spread = {
        part: tile.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)[:, :length, :length]
        for part, tile in chosen.items()
    }
    return spread["full_kv"] | (spread["kv"] & rule)


def test_full_tiles_are_found():
    """A long clean prefix in one document: most tiles before a query are full, and need no rule."""
    doc, copy, block, _ = layout(1, block_size=4, longest=2000, count=1, width=4096, rows=1)
    mask = flex_mask(doc, copy, block)
    assert mask.full_kv_num_blocks.sum() > mask.kv_num_blocks.sum()


@pytest.mark.parametrize("window", [None, 6])
def test_a_row_of_padding_only_has_a_key_for_each_query(window):
    zeros = torch.zeros(1, 16, dtype=torch.int64)
    begin, end = key_runs(zeros - 1, zeros, zeros, zeros, window)
    assert ((end - begin).sum(0) == 16).all()
