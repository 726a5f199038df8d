"""The rollouts that the trajectory viewer shows: texts, rounds and the divergence of each token."""

import json

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config.divergences import ForwardKL
from common.student import load_tokenizer
from common.trajectory import OFFLINE
from learner import rollout_samples
from learner.objective import ChunkedDivergence, HiddenTarget, empty_sums
from learner.rollout_samples import rollout_sample, token_texts
from tests.trajectories import trajectory


class Letters:
    """A tokenizer of 50 letters."""

    def decode(self, ids, **_):
        return "".join(chr(48 + i) for i in ids)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


UNTRAINED = {"target_rows": np.empty(0, np.int64), "kl": np.empty(0), "tokenizer": Letters(), "block_size": 4}


@given(trajectory(), st.data())
def test_divergence_stands_at_its_token(rollout, data):
    count = len(rollout.response_ids)
    rollout.target_offsets = np.arange(0, count, 2, dtype=np.int32)
    rows = np.array(data.draw(st.lists(st.integers(0, len(rollout.target_offsets) - 1), max_size=8)), dtype=np.int64)
    kl = np.arange(len(rows), dtype=np.float32)
    sample = rollout_sample(rollout, target_rows=rows, kl=kl, tokenizer=Letters(), block_size=4)
    json.dumps(sample)
    written = count + len(rollout.tail_ids)
    assert [len(sample[name]) for name in ("tokens", "rounds", "confidence", "kl")] == [written] * 4
    assert sample["tail"] == len(rollout.tail_ids)
    assert "".join(sample["tokens"]) == Letters().decode([*rollout.response_ids, *rollout.tail_ids])
    for offset in range(written):
        values = [float(v) for r, v in zip(rows, kl, strict=True) if rollout.target_offsets[r] == offset]
        expected = round(sum(values) / len(values), 5) if values else None
        assert sample["kl"][offset] == expected


@given(trajectory())
def test_an_offline_response_has_no_rounds_and_no_tail(rollout):
    rollout.weights_version = OFFLINE
    rollout.reveal_round = np.full_like(rollout.reveal_round, -1)
    sample = rollout_sample(rollout, **UNTRAINED)
    assert sample["offline"] and sample["tail"] == 0
    assert sample["rounds"] == [0] * len(rollout.response_ids)
    assert len(sample["tokens"]) == len(rollout.response_ids)


@given(trajectory())
def test_long_rollouts_are_cut(rollout):
    whole = len(rollout.response_ids) + len(rollout.tail_ids)
    before, rollout_samples.MAX_TOKENS = rollout_samples.MAX_TOKENS, 3
    sample = rollout_sample(rollout, **UNTRAINED)
    rollout_samples.MAX_TOKENS = before
    assert len(sample["tokens"]) == len(sample["kl"]) == min(whole, 3)
    assert sample["cut"] == max(whole - 3, 0)


@given(st.text(max_size=12))
def test_a_character_of_several_tokens_stands_at_its_last(text):
    ids = np.array(list(text.encode(errors="replace")), dtype=np.int64)
    texts = token_texts(ids, Bytes())
    assert len(texts) == len(ids)
    assert "".join(texts) == text.encode(errors="replace").decode()


def test_bytes_that_are_no_character_do_not_hold_up_the_rest():
    texts = token_texts(np.array([0xFF, 0xFF, 0xFF, 0xFF, 65, 66]), Bytes())
    assert texts[-2:] == ["A", "B"]


def test_texts_of_the_shipped_tokenizer():
    tokenizer = load_tokenizer("deploy/models/tiny-arlm")
    ids = np.array(tokenizer("Tom has 5 apples.\n")["input_ids"])
    assert "".join(token_texts(ids, tokenizer)) == "Tom has 5 apples.\n"


def test_the_loss_hands_out_the_divergence_of_every_position():
    torch.manual_seed(0)
    hidden, head, teacher = torch.randn(7, 8), torch.randn(11, 8), torch.randn(7, 8)
    sums = empty_sums(torch.device("cpu"))
    sums.per_position = []
    loss = ChunkedDivergence.apply(hidden, head, HiddenTarget(teacher, head), torch.ones(7), ForwardKL(), 3, sums)
    per_position = torch.cat(sums.per_position)
    log_t, log_s = (teacher @ head.T).log_softmax(-1), (hidden @ head.T).log_softmax(-1)
    direct = torch.stack([sum(log_t[i, c].exp() * (log_t[i, c] - log_s[i, c]) for c in range(11)) for i in range(7)])
    assert torch.allclose(per_position, direct, atol=1e-5)
    assert torch.allclose(per_position.sum(), loss, atol=1e-5)
