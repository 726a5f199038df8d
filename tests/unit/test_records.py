"""Reading record batches: in order, refused where they do not fit, and never at the price of the vocabulary."""

from dataclasses import replace

import numpy as np
import pytest

from actors.rollout import RolloutActor
from common.config.run import RunConfig
from common.config.unmasking import StaticUnmasking
from common.conversion import Conversion, convert
from common.prompts import Prompt
from common.trajectory import Trajectory, TrajectoryMeta, from_batch, to_batch
from common.vocabulary import tokenizer_fingerprint
from learner.records import RecordReader
from tests.models import tiny_qwen3
from tests.unit.test_trajectory import make


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny_qwen3(tmp_path_factory.mktemp("model"))


def rows() -> list[Trajectory]:
    return [replace(t, hidden=np.empty(0, np.float32)) for t in make()]


def meta_of(student: Conversion) -> TrajectoryMeta:
    return TrajectoryMeta(4, student.config.mask_token_id, tokenizer_fingerprint(student.tokenizer))


def config(path: str, **changes) -> RunConfig:
    return RunConfig(
        model={"path": path},
        data={"prompts": "p"},
        rollout={"dtype": "float32", "stream_rows": 1, "slots": 2},
        objective={"target": {"kind": "hard"}},
        **changes,
    )


@pytest.fixture
def vocabulary_reads(monkeypatch) -> list[str]:
    """One entry for each time that any tokenizer was asked for its whole vocabulary."""
    from transformers import PreTrainedTokenizerFast

    reads: list[str] = []
    get_vocab = PreTrainedTokenizerFast.get_vocab

    def counted(tokenizer):
        reads.append("read")
        return get_vocab(tokenizer)

    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", counted)
    return reads


def test_the_vocabulary_is_read_once_however_many_record_batches_come(path, vocabulary_reads):
    student = convert(path, 4, "auto")
    meta = meta_of(student)
    batches = [to_batch([replace(t, ordinal=16 * t.ordinal - b + 15) for t in rows()], meta) for b in range(16)]
    vocabulary_reads.clear()
    reader = RecordReader(config(path), student)
    assert len(vocabulary_reads) == 1
    for _ in range(3):
        trajectories, read = reader.read(batches)
        assert read == meta
        assert [t.ordinal for t in trajectories] == list(range(32))
    assert len(vocabulary_reads) == 1


def test_a_rollout_reads_no_vocabulary(path, vocabulary_reads):
    actor = RolloutActor(config(path), 0)
    prompts = [Prompt(i, "q", make()[0].prompt_ids) for i in range(6)]
    vocabulary_reads.clear()
    streamed = list(actor.rollout(prompts, 8, 4, StaticUnmasking()))
    assert len(streamed) == 12, "six record batches, each with its counts"
    assert {from_batch(b)[1].tokenizer_fingerprint for b in streamed[::2]} == {actor.meta.tokenizer_fingerprint}
    assert vocabulary_reads == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_fingerprint": "other"}, "tokenizer_fingerprint 'other'"),
        ({"block_size": 8}, "has block_size 8, not one of"),
        ({"mask_token_id": 3}, "mask_token_id 3"),
        ({"target_kind": "topk"}, "target_kind 'topk', this run needs 'none'"),
    ],
)
def test_record_batches_of_another_run_are_refused(path, change, message):
    student = convert(path, 4, "auto")
    meta = meta_of(student)
    reader = RecordReader(config(path), student)
    with pytest.raises(ValueError, match=message):
        reader.read([to_batch(rows(), replace(meta, **change))])


def test_record_batches_of_two_block_sizes_are_refused(path):
    student = convert(path, 4, "auto")
    meta = meta_of(student)
    growing = config(path, block_growth={"kind": "steps", "sizes": [8], "at_batches": [1]})
    reader = RecordReader(growing, student)
    with pytest.raises(ValueError, match="has block_size 8, this run needs 4"):
        reader.read([to_batch(rows(), meta), to_batch(rows(), replace(meta, block_size=8))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_ids": np.array([0, 1, 288, 3, 4])}, "column 'response_ids' holds 288, outside 0 to 287"),
        ({"ordinal": 1}, "hold ordinal 1, sample 0 twice"),
        ({"target_offsets": np.array([7])}, "column 'target_offsets' holds 7, outside the response"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_trained_on(path, change, message):
    student = convert(path, 4, "auto")
    reader = RecordReader(config(path), student)
    first, second = rows()
    with pytest.raises(ValueError, match=message):
        reader.read([to_batch([replace(first, **change), second], meta_of(student))])
