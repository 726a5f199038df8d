"""Packing: nothing lost, nothing seen across documents, equal work on every rank."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config.objective import ObjectiveConfig
from common.masks import dense_mask
from common.states import select_states
from common.trajectory import TrajectoryMeta
from learner.batches import BatchBuilder
from learner.packing import (
    PAD_DOCUMENT,
    Document,
    assign_ranks,
    causal_document,
    coefficients,
    document,
    fill_rows,
    joined,
    microbatch,
    plan_microbatches,
)
from tests.trajectories import EOS, trajectory

BLOCK, MASK = 4, 60


def selected(t, kind, seed=0):
    select_states(t, ObjectiveConfig(state={"kind": kind}), BLOCK, EOS, np.random.default_rng(seed))
    return t


@given(trajectory(), st.sampled_from(["per_block", "global", "all_rounds", "random"]), st.integers(0, 9))
def test_document_holds_the_states(t, kind, seed):
    selected(t, kind, seed)
    d = document(t, BLOCK, MASK)
    x0, prompt = t.x0, len(t.prompt_ids)
    clean = d.copy == 0
    assert (d.ids[clean] == x0[d.positions[clean]]).all()
    assert (d.positions[clean] == np.arange(clean.sum())).all()
    for state in range(t.state_count):
        masked = set((prompt + t.masked_offsets[t.masked_state == state]).tolist())
        noised = d.copy == state + 1
        for token, position in zip(d.ids[noised], d.positions[noised], strict=True):
            assert token == (MASK if position in masked else x0[position])
        assert clean.sum() >= (d.block[noised].max(initial=0)) * BLOCK
    trained = t.loss_weight > 0
    assert len(d.loss_index) == trained.sum()
    assert (d.ids[d.loss_index] == MASK).all()
    offsets = t.target_offsets[d.loss_target]
    assert (d.positions[d.loss_index] == prompt + offsets).all()
    assert d.loss_weight.tolist() == t.loss_weight[trained].tolist()


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 50), min_size=1), st.integers(8, 120), st.booleans())
def test_plans_hold_every_document_once_within_the_budget(lengths, max_tokens, flexible):
    plan = plan_microbatches(lengths, max_tokens, flexible)
    placed = [i for batch in plan for row in batch for i in row]
    assert sorted(placed) == sorted(lengths)
    for batch in plan:
        width = max(sum(lengths[i] for i in row) for row in batch)
        assert width * len(batch) <= max(max_tokens, max(lengths.values()))


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 4))
def test_ranks_share_the_work(lengths, ranks):
    shares = assign_ranks(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_first_fit_decreasing():
    assert fill_rows({0: 5, 1: 3, 2: 4, 3: 2}, 7) == [[0, 3], [2, 1]]


@given(st.lists(trajectory(), min_size=1, max_size=5))
def test_normalisations(rows):
    documents = [document(selected(t, "per_block"), BLOCK, MASK) for t in rows]
    trained = [len(d.loss_index) for d in documents]
    if sum(trained):
        assert sum(c.sum() for c in coefficients(documents, "row_mean")) == pytest.approx(1, rel=1e-5)
        assert sum(c.sum() for c in coefficients(documents, "token_mean")) == pytest.approx(1, rel=1e-5)
        assert sum(c.sum() for c in coefficients(documents, "sum")) == sum(trained)
        for c in coefficients(documents, "row_mean"):
            assert not len(c) or c.sum() == pytest.approx(1 / sum(n > 0 for n in trained), rel=1e-5)


@given(st.lists(trajectory(), min_size=1, max_size=5), st.integers(20, 200))
def test_microbatches_place_documents_side_by_side(rows, width):
    documents = {i: document(selected(t, "all_rounds"), BLOCK, MASK) for i, t in enumerate(rows)}
    coefficient = dict(enumerate(coefficients(list(documents.values()), "sum")))
    lengths = {i: len(d) for i, d in documents.items()}
    for plan in plan_microbatches(lengths, width, True):
        batch = microbatch(plan, documents, coefficient)
        assert batch.ids.shape[1] % 8 == 0
        for i in {i for row in plan for i in row}:
            assert (batch.ids[batch.doc == i] == documents[i].ids).all()
            assert (batch.copy[batch.doc == i] == documents[i].copy).all()
        assert batch.tokens == sum(lengths[i] for row in plan for i in row)
        assert (batch.doc.ravel()[batch.loss_index] == batch.loss_doc).all()
        assert (batch.ids.ravel()[batch.loss_index] == MASK).all()
        mask = dense_mask(*(torch.from_numpy(a) for a in (batch.doc, batch.copy, batch.block)))[:, 0]
        assert mask.any(-1).all(), "a row without keys would give NaN"
        for r in range(len(mask)):
            q, k = mask[r].nonzero(as_tuple=True)
            assert (batch.doc[r][q] == batch.doc[r][k]).all()
    assert PAD_DOCUMENT not in documents


@given(st.lists(trajectory(), min_size=1, max_size=5), st.integers(20, 200))
def test_every_field_of_a_document_arrives_in_its_microbatch(rows, width):
    """Read back document by document: each index points at its own token, each value stands beside its index."""
    masked = [document(selected(t, "all_rounds"), BLOCK, MASK) for t in rows]
    causal = [causal_document(t) for t in rows]
    documents = dict(enumerate(masked + causal))
    coefficient = dict(enumerate(coefficients(masked, "row_sum") + coefficients(causal, "token_mean")))
    for plan in plan_microbatches({i: len(d) for i, d in documents.items()}, width, False):
        batch = microbatch(plan, documents, coefficient)
        flat_doc, first_token, groups = batch.doc.ravel(), {}, []
        for i in [i for row in plan for i in row]:
            d, of_loss = documents[i], batch.loss_doc == i
            first_token[i] = np.flatnonzero(flat_doc == i)[0]
            for name in ("ids", "positions", "copy", "block"):
                assert (getattr(batch, name).ravel()[flat_doc == i] == getattr(d, name)).all(), name
            assert (batch.loss_index[of_loss] - first_token[i] == d.loss_index).all()
            for name in ("loss_target", "loss_weight", "loss_label", "loss_round"):
                assert (getattr(batch, name)[of_loss] == getattr(d, name)).all(), name
            of_next = flat_doc[batch.next_index] == i
            assert (batch.next_index[of_next] - first_token[i] == d.next_index).all()
            assert (batch.next_label[of_next] == d.next_label).all()
            both = [batch.loss_coefficient[of_loss], batch.next_coefficient[of_next]]
            assert (np.concatenate(both) == coefficient[i]).all()
            groups += [(i, g) for g in d.loss_group]
        # groups are numbered through: equal numbers where document and group are equal, and nowhere else
        same = [[a == b for a in groups] for b in groups]
        assert np.equal.outer(batch.loss_group, batch.loss_group).tolist() == same


def test_joined_moves_indices_and_groups_on():
    def part(n: int, **loss) -> Document:
        zeros = np.zeros(n, np.int64)
        return Document(ids=zeros + n, positions=np.arange(n), copy=zeros, block=zeros, **loss)

    first = part(3, loss_index=np.array([0, 2]), loss_group=np.array([0, 1]), loss_label=np.array([7, 8]))
    last = part(4, loss_index=np.array([1]), loss_group=np.array([0]), loss_label=np.array([9]))
    whole = joined([first, part(2, next_index=np.array([1])), last])
    assert whole.ids.tolist() == [3, 3, 3, 2, 2, 4, 4, 4, 4]
    assert whole.loss_index.tolist() == [0, 2, 6]
    assert whole.loss_group.tolist() == [0, 1, 2]
    assert whole.loss_label.tolist() == [7, 8, 9]
    assert whole.next_index.tolist() == [4]
    assert (whole.loss_weight.dtype, len(whole.loss_weight)) == (np.float32, 0)


@pytest.mark.parametrize(("kind", "width"), [("none", 0), ("topk", 4), ("hidden", 8)])
def test_a_row_that_trains_nothing_is_as_long_as_asked(kind, width):
    meta = TrajectoryMeta(4, 9, "", kind, width)
    builder = BatchBuilder(meta, "row_mean", "bucket", 64, "sdpa", torch.device("cpu"), torch.zeros(10, 8))
    row = builder.untrained(50)
    batch = builder.tensors(row, [])
    assert batch.ids.shape == (1, 56) and batch.tokens == 4
    assert len(batch.loss_index) == len(batch.coefficient) == 0
    assert builder.untrained().ids.shape == (1, 8)
