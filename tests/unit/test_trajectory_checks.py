"""Checks of record batches: what samplers and teachers make passes, and every change is refused by its column."""

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.objective import ObjectiveConfig
from common.states import select_states
from common.trajectory import Trajectory, TrajectoryMeta, to_batch
from common.trajectory_checks import TrajectoryError, all_finite, check_batch
from tests.trajectories import EOS, annotated, trajectory

VOCABULARY, MASK = 64, 60
META = TrajectoryMeta(block_size=4, mask_token_id=MASK, tokenizer_fingerprint="abc")
TOPK = replace(META, target_kind="topk", target_width=3)
HIDDEN = replace(META, target_kind="hidden", target_width=5, hidden_dtype="bfloat16")


@given(st.lists(trajectory(), max_size=4), st.sampled_from(["per_block", "all_rounds", "random", "complementary"]),
       st.sampled_from([META, TOPK, HIDDEN]))  # fmt: skip
def test_every_state_selection_and_target_passes(rows, kind, meta):
    rng = np.random.default_rng(0)
    for ordinal, t in enumerate(rows):
        t.ordinal = ordinal
        select_states(t, ObjectiveConfig(state={"kind": kind}), 4, EOS, rng)
        annotated(t, meta, VOCABULARY, rng)
    assert check_batch(to_batch(rows, meta), VOCABULARY) == meta


def example(meta: TrajectoryMeta = TOPK) -> list[Trajectory]:
    """Two rows of 3 prompt tokens, a response of 6 and a tail of 3, on the grid of 4."""
    rng = np.random.default_rng(0)
    rows = []
    for ordinal in range(2):
        t = Trajectory(
            ordinal=ordinal,
            sample=0,
            prompt_ids=np.arange(2, 5),
            response_ids=np.array([5, 6, 7, 8, 9, EOS]),
            tail_ids=np.array([11, 12, 13]),
            reveal_round=np.array([0, 1, 0, 0, 2, 1, 0, 0, 1]),
            confidence=np.full(9, 0.5),
            weights_version=3,
            finish_reason="eos",
            denoise_forwards=6,
            commit_forwards=2,
        )
        select_states(t, ObjectiveConfig(state={"kind": "all_rounds"}), 4, EOS, rng)
        annotated(t, meta, VOCABULARY, rng)
        rows.append(t)
    return rows


def put(name: str, at: int, value: float):
    def change(t: Trajectory) -> None:
        values = np.array(getattr(t, name))
        values[at] = value
        setattr(t, name, values)

    return change


def cut(name: str):
    return lambda t: setattr(t, name, getattr(t, name)[:-1])


def assign(name: str, value):
    return lambda t: setattr(t, name, value)


CASES = [
    (assign("ordinal", -1), "'ordinal' is -1, below 0"),
    (assign("sample", -5), "'sample' is -5, below 0"),
    (assign("weights_version", -3), "'weights_version' is -3, below -2"),
    (assign("state_count", 1), "'masked_state' holds 1, not below state_count"),
    (assign("state_count", 2**31 - 1), "'state_count' is 2147483647, and 3 have masked positions"),
    (assign("finish_reason", "end"), "'finish_reason' is 'end'; eos, stop, length are known"),
    (put("prompt_ids", 0, -1), "'prompt_ids' holds -1, outside 0 to 63"),
    (put("response_ids", 2, 64), "'response_ids' holds 64, outside 0 to 63"),
    (put("response_ids", 2, MASK), "'response_ids' holds the mask token 60"),
    (put("tail_ids", 2, MASK), "'tail_ids' holds 60; only offline responses are filled"),
    (cut("prompt_ids"), "'tail_ids' ends at 11, off the grid of 4 tokens"),
    (cut("reveal_round"), "'reveal_round' has 8 values, expected 9"),
    (put("reveal_round", 3, 4), "'reveal_round' holds 4, no round of a block of 4"),
    (put("reveal_round", 3, -1), "'reveal_round' holds -1, no round"),
    (put("reveal_round", 4, 3), "'reveal_round' leaves out a round of a block"),
    (cut("confidence"), "'confidence' has 8 values, expected 9"),
    (put("confidence", 3, 1.5), "'confidence' holds 1.5, no probability"),
    (put("confidence", 3, np.nan), "'confidence' holds nan, no probability"),
    (put("masked_offsets", 0, 9), "'masked_offsets' holds 9, outside response and tail"),
    (put("masked_offsets", 1, 0), "'masked_offsets' holds 0 out of order"),
    (cut("masked_state"), "'masked_state' has"),
    (assign("shown_ids", np.array([3], np.int32)), "'shown_ids' has 1 values, expected"),
    (put("masked_state", 0, -1), "'masked_state' holds -1, not below"),
    (put("loss_weight", 1, np.inf), "'loss_weight' holds inf; a weight is finite"),
    (put("loss_weight", 1, -1), "'loss_weight' holds -1.0; a weight"),
    (put("loss_weight", 7, 1), "'loss_weight' holds 1.0 for the tail"),
    (put("target_offsets", -1, 6), "'target_offsets' holds 6, outside the response"),
    (put("target_offsets", 1, 0), "'target_offsets' holds 0 out of order"),
    (put("topk_ids", 4, 64), "'topk_ids' holds 64, outside 0 to 63"),
    (put("topk_logprobs", 4, np.nan), "'topk_logprobs' holds nan, no log-probability"),
    (put("topk_logprobs", 4, 0.5), "'topk_logprobs' holds 0.5, no log-probability"),
    (put("log_tail_mass", 1, -np.inf), "'log_tail_mass' holds -inf, no finite log-probability"),
    (put("log_tail_mass", 1, -0.01), "the mass is not 1"),
    (cut("log_tail_mass"), "'log_tail_mass' has"),
    (cut("topk_ids"), "'topk_ids' has"),
    (assign("hidden", np.zeros(5, np.float32)), "'hidden' has 5 values, expected 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), CASES, ids=[said for _, said in CASES])
def test_what_cannot_be_is_refused_by_column_row_and_key(change, said):
    rows = example()
    check_batch(to_batch(rows, TOPK), VOCABULARY)
    change(rows[1])
    with pytest.raises(TrajectoryError) as refused:
        check_batch(to_batch(rows, TOPK), VOCABULARY)
    assert said in str(refused.value)
    assert f"(row 1, ordinal {rows[1].ordinal}, sample {rows[1].sample})" in str(refused.value)


def test_a_trained_position_without_target_is_refused():
    rows = example()
    rows[1].target_offsets = rows[1].target_offsets[1:]
    for name, width in (("topk_ids", 3), ("topk_logprobs", 3), ("log_tail_mass", 1)):
        setattr(rows[1], name, getattr(rows[1], name)[width:])
    with pytest.raises(TrajectoryError, match="'target_offsets' lacks 0, which is trained"):
        check_batch(to_batch(rows, TOPK), VOCABULARY)


def test_hidden_states_that_are_not_finite_are_refused():
    rows = example(HIDDEN)
    check_batch(to_batch(rows, HIDDEN), VOCABULARY)
    rows[1].hidden[7] = 0xFF80  # -inf in bfloat16
    with pytest.raises(TrajectoryError, match=r"'hidden' holds values that are not finite \(row 1,"):
        check_batch(to_batch(rows, HIDDEN), VOCABULARY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_size": 0}, "has block_size 0"),
        ({"mask_token_id": 64}, "has mask_token_id 64, outside 0 to 63"),
        ({"target_kind": "logits"}, "has target_kind 'logits'"),
        ({"target_kind": "none"}, "has target_width 3 and target 'none'"),
        ({"target_width": 2}, "'topk_ids' has 18 values, expected 12"),
        ({"block_size": 8}, "'tail_ids' ends at 12, off the grid of 8"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(change, said):
    with pytest.raises(TrajectoryError, match=said):
        check_batch(to_batch(example(), replace(TOPK, **change)), VOCABULARY)


def test_damaged_arrow_is_refused_by_column():
    batch = to_batch(example(), TOPK)
    at = batch.schema.get_field_index("response_ids")
    values = batch.column(at).values
    with_null = pa.array([5, None, *range(2, 12)], pa.int32())
    for broken, flat in (([0, 6, 900], values), ([6, 3, 12], values), ([-6, 6, 12], values), ([0, 6, 12], with_null)):
        offsets = np.array([0, 6, 12], np.int32)
        column = pa.ListArray.from_buffers(batch.column(at).type, 2, [None, pa.py_buffer(offsets)], children=[flat])
        columns = [column if i == at else c for i, c in enumerate(batch.columns)]
        damaged = pa.RecordBatch.from_arrays(columns, schema=batch.schema)
        offsets[:] = broken  # Arrow makes no such array, a file or a network may
        with pytest.raises(TrajectoryError, match=r"column 'response_ids' (is damaged|has missing values)"):
            check_batch(damaged, VOCABULARY)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_all_finite_sees_every_place(dtype):
    finite = np.linspace(-3e38, 3e38, 70_001, dtype=np.float32)
    finite[:4] = 0.0, -0.0, 1e-45, np.finfo(np.float32).max
    bad: list[float] = [np.inf, -np.inf, np.nan]
    if dtype == np.uint16:
        finite, bad = (finite.view(np.uint32) >> 16).astype(np.uint16), [0x7F80, 0xFF80, 0x7FC1]
    assert all_finite(finite) and all_finite(finite[:0])
    for i, place in enumerate((0, 1, 2, 3, 40_000, 69_999, 70_000)):
        values = finite.copy()
        values[place] = bad[i % 3]
        assert not all_finite(values), place


def test_sixteen_rows_of_a_thousand_tokens_take_two_milliseconds():
    """Five times as long is allowed here: other tests run on the same cores."""
    rng = np.random.default_rng(0)
    rows = []
    for ordinal in range(16):
        written = 1000
        t = replace(
            example(META)[0],
            ordinal=ordinal,
            prompt_ids=np.arange(2, 42),
            response_ids=rng.integers(2, 50, written),
            tail_ids=np.empty(0),
            reveal_round=np.tile([0, 2, 1, 0], written // 4),
            confidence=np.full(written, 0.5),
        )
        select_states(t, ObjectiveConfig(), 4, EOS, rng)
        annotated(t, replace(TOPK, target_width=16), VOCABULARY, rng)
        rows.append(t)
    batch = to_batch(rows, replace(TOPK, target_width=16))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        check_batch(batch, VOCABULARY)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01
