"""Reading record batches: in order, refused where they do not fit, and never at the price of the vocabulary."""

from dataclasses import replace

import pytest

from actors.rollout import RolloutActor
from common.config.run import RunConfig, StaticUnmasking
from common.conversion import convert
from common.prompts import Prompt
from common.trajectory import TrajectoryMeta, from_batch, to_batch
from common.vocabulary import tokenizer_fingerprint
from learner.records import RecordReader
from tests.models import tiny_qwen3
from tests.unit.test_trajectory import make


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny_qwen3(tmp_path_factory.mktemp("model"))


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
    mask, tokenizer = student.config.mask_token_id, student.tokenizer
    meta = TrajectoryMeta(4, mask, tokenizer_fingerprint(tokenizer))
    batches = [to_batch([replace(t, ordinal=-b) for t in make()], meta) for b in range(16)]
    vocabulary_reads.clear()
    reader = RecordReader(config(path), mask, tokenizer)
    assert len(vocabulary_reads) == 1
    for _ in range(3):
        rows, read = reader.read(batches)
        assert read == meta
        assert [t.ordinal for t in rows] == sorted(-b for b in range(16) for _ in range(2))
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
    mask, tokenizer = student.config.mask_token_id, student.tokenizer
    meta = TrajectoryMeta(4, mask, tokenizer_fingerprint(tokenizer))
    reader = RecordReader(config(path), mask, tokenizer)
    with pytest.raises(ValueError, match=message):
        reader.read([to_batch(make(), replace(meta, **change))])


def test_record_batches_of_two_block_sizes_are_refused(path):
    student = convert(path, 4, "auto")
    mask, tokenizer = student.config.mask_token_id, student.tokenizer
    meta = TrajectoryMeta(4, mask, tokenizer_fingerprint(tokenizer))
    growing = config(path, block_growth={"kind": "steps", "sizes": [8], "at_batches": [1]})
    reader = RecordReader(growing, mask, tokenizer)
    with pytest.raises(ValueError, match="has block_size 8, this run needs 4"):
        reader.read([to_batch(make(), meta), to_batch(make(), replace(meta, block_size=8))])
