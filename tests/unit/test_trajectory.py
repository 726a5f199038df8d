"""The Arrow form: round trips without copies, and refusal of what does not fit, by name."""

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.trajectory import (
    Trajectory,
    TrajectoryMeta,
    batch_info,
    from_batch,
    read_spool,
    to_batch,
    write_spool,
)
from tests.trajectories import trajectory

META = TrajectoryMeta(block_size=4, mask_token_id=9, tokenizer_fingerprint="abc")


def equal(a: Trajectory, b: Trajectory) -> None:
    for f in fields(Trajectory):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, np.ndarray):
            assert x.tolist() == y.tolist(), f.name
        else:
            assert x == y, f.name


@given(st.lists(trajectory(), min_size=0, max_size=4))
def test_round_trip(rows):
    back, meta = from_batch(to_batch(rows, META))
    assert meta == META
    for a, b in zip(rows, back, strict=True):
        equal(a, b)


@given(st.lists(trajectory(), min_size=2, max_size=4))
def test_sliced_batches_and_ipc(rows):
    batch = to_batch(rows, META)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch.slice(1))
    received = pa.ipc.open_stream(sink.getvalue()).read_next_batch()
    back, _ = from_batch(received)
    for a, b in zip(rows[1:], back, strict=True):
        equal(a, b)


def make(n: int = 2) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    return [
        Trajectory(
            ordinal=i,
            sample=0,
            prompt_ids=np.arange(3),
            response_ids=np.arange(5),
            tail_ids=np.empty(0),
            reveal_round=np.zeros(5),
            confidence=rng.random(5),
            weights_version=i,
            finish_reason="length",
            denoise_forwards=2,
            commit_forwards=1,
            hidden=np.arange(10) * 7,
        )
        for i in range(n)
    ]


def test_views_share_the_batch_memory():
    batch = to_batch(make(), META)
    rows, _ = from_batch(batch)
    flat = batch.column("response_ids").values.to_numpy()
    assert np.shares_memory(rows[0].response_ids, flat)
    assert not rows[0].response_ids.flags.writeable


def test_bfloat16_hidden_bits_survive():
    meta = replace(META, target_kind="hidden", target_width=5, hidden_dtype="bfloat16")
    rows, read = from_batch(to_batch(make(), meta))
    assert read == meta
    assert rows[0].hidden.dtype == np.uint16
    assert rows[0].hidden.tolist() == (np.arange(10) * 7).tolist()


def test_info_counts():
    info = batch_info(to_batch(make(3), META))
    assert info.keys == [(0, 0), (1, 0), (2, 0)]
    assert (info.rows, info.oldest_version, info.response_tokens, info.denoise_forwards) == (3, 0, 15, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.remove_metadata(), "lacks"),
        (lambda s: s.with_metadata({**s.metadata, b"schema_version": b"1"}), "schema_version is 1, this code reads 3"),
        (lambda s: s.with_metadata({**s.metadata, b"schema_version": b"99"}), "schema_version is 99"),
        (
            lambda s: pa.schema([f.with_name(f.name.replace("tail_mass", "rest")) for f in s], s.metadata),
            "'log_tail_mass'",
        ),
        (lambda s: s.remove(s.get_field_index("reveal_round")), "'reveal_round'"),
        (lambda s: s.append(pa.field("extra", pa.int8())), "'extra'"),
        (lambda s: s.set(0, pa.field("ordinal", pa.int8())), "'ordinal' has type int8"),
    ],
)
def test_unknown_schemas_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryMeta.of(change(META.schema()))


def test_require_names_the_field():
    with pytest.raises(ValueError, match=r"block_size 4, this run needs 8"):
        META.require(mask_token_id=9, block_size=8)


def test_spool_round_trip(tmp_path):
    batches = [to_batch(make(2), META), to_batch(make(1), META)]
    write_spool(tmp_path / "deep" / "x.arrow", batches)
    assert [b.equals(c) for b, c in zip(batches, read_spool(tmp_path / "deep" / "x.arrow"), strict=True)] == [
        True,
        True,
    ]


def test_record_batches_of_teachers_of_several_widths_are_spooled_together(tmp_path):
    """An Arrow file has one schema: what does not fit lies beside it, and comes back with it."""
    metas = [replace(META, target_kind="hidden", target_width=width) for width in (5, 2, 5)]
    batches = [to_batch(make(), meta) for meta in metas]
    write_spool(tmp_path / "batch-000001.arrow", batches)
    found = read_spool(tmp_path / "batch-000001.arrow")
    assert [from_batch(batch)[1].target_width for batch in found] == [5, 5, 2]
    assert found[0].equals(batches[0]) and found[1].equals(batches[2]) and found[2].equals(batches[1])
