"""Stop strings across the borders of tokens and blocks, against a search in the whole text."""

from itertools import product

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from actors.sampler.stop_strings import StopStrings, before_stop, reach
from common.config.unmasking import DynamicUnmasking
from common.grid import grid_ceil
from common.student import load_model
from tests.models import tiny_qwen3, tiny_tokenizer

MASK, EOS, LIMIT = 99, 98, 40
LENGTHS = [1, 4, 6, 11]


@pytest.fixture(scope="module")
def tokenizer():
    """98 pieces of one to three characters over five, so that strings begin and end within tokens."""
    pieces = ["".join(piece) for n in (1, 2, 3) for piece in product("abc\n ", repeat=n)][:EOS]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<98>", "<99>"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<99>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<98>")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tiny_qwen3(tmp_path_factory.mktemp("model"), seed=2, tokenizer=tokenizer, vocab=100)
    return load_model(folder, torch.float32, "sdpa")


def sampler(model, tokenizer, block_size: int = 4) -> Sampler:
    return Sampler(
        model, block_size=block_size, mask_token_id=MASK, eos_token_id=EOS, slots=3, seed=5, tokenizer=tokenizer
    )


def requests(*stop: str) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(i, 0, rng.integers(0, EOS, n).astype(np.int32), LIMIT, stop=stop) for i, n in enumerate(LENGTHS)]


def shortest(tokenizer, ids: np.ndarray, stops: tuple[str, ...]) -> int:
    """Tokens until the text has a stop string, token by token; 0: never."""
    for count in range(1, len(ids) + 1):
        if any(stop in tokenizer.decode(ids[:count], skip_special_tokens=True) for stop in stops):
            return count
    return 0


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("ahead", [0, 1])
def test_responses_end_with_the_token_that_completes_a_stop_string(model, tokenizer, block_size, ahead):
    decoding = Decoding(DynamicUnmasking(threshold=0.3), 1.0)
    free = {t.ordinal: t for t in sampler(model, tokenizer, block_size).generate(requests(), decoding)}
    text = tokenizer.decode(free[3].response_ids, skip_special_tokens=True)
    stops = [(text[at : at + n],) for at, n in ((0, 1), (3, 4), (7, 7), (12, 12), (20, 6), (30, 3))]
    stops += [(text[25:31], text[9:12], "never there"), ("never there",)]
    ends: set[str] = set()
    watched = sampler(model, tokenizer, block_size)
    watched.ahead = ahead
    inside_a_token = crossing_blocks = 0
    for stop in stops:
        done = {t.ordinal: t for t in watched.generate(requests(*stop), decoding)}
        assert sorted(done) == sorted(free)
        for ordinal, t in done.items():
            whole = free[ordinal]
            count = shortest(tokenizer, whole.response_ids, stop)
            ends.add(t.finish_reason)
            assert t.finish_reason == ("stop" if count else whole.finish_reason)
            assert t.response_ids.tolist() == whole.response_ids[: count or None].tolist()
            assert len(t.x0) == grid_ceil(len(t.causal_ids), block_size)  # not a block further
            assert t.x0.tolist() == whole.x0[: len(t.x0)].tolist()
            if count:
                said = tokenizer.decode(t.response_ids, skip_special_tokens=True)
                assert not any(s in before_stop(said, stop) for s in stop) and before_stop(said, stop) != said
                inside_a_token += not said.endswith(stop)
                assert t.denoise_forwards <= whole.denoise_forwards
                before = len(before_stop(said, stop))
                begin = next(n for n in range(count) if len(tokenizer.decode(t.response_ids[: n + 1])) > before)
                prompt = len(t.prompt_ids)
                crossing_blocks += (prompt + begin) // block_size != (prompt + count - 1) // block_size
    assert "stop" in ends and len(ends) > 1
    assert inside_a_token and crossing_blocks


def test_each_request_has_its_own_stop_strings(model, tokenizer):
    decoding = Decoding(DynamicUnmasking(threshold=0.3), 1.0)
    free = {t.ordinal: t for t in sampler(model, tokenizer).generate(requests(), decoding)}
    text = tokenizer.decode(free[2].response_ids, skip_special_tokens=True)
    mixed = [*requests()[:2], *requests(text[5:9])[2:3], *requests()[3:]]
    done = {t.ordinal: t for t in sampler(model, tokenizer).generate(mixed, decoding)}
    assert done[2].finish_reason == "stop"
    for ordinal in (0, 1, 3):
        assert done[ordinal].response_ids.tolist() == free[ordinal].response_ids.tolist()


def test_without_stop_strings_nothing_is_decoded_and_with_them_a_tokenizer_is_needed(model):
    class Refusing:
        def decode(self, *_, **__):
            raise AssertionError("decoded")

    decoding = Decoding(DynamicUnmasking(threshold=0.3), 1.0)
    assert len(list(sampler(model, Refusing()).generate(requests(), decoding))) == len(LENGTHS)
    with pytest.raises(ValueError, match="need a sampler with a tokenizer"):
        list(sampler(model, None).generate(requests("a"), decoding))


def test_characters_of_several_tokens():
    tokenizer = tiny_tokenizer()  # one token a byte
    stops = StopStrings(tokenizer)
    ids = np.asarray(tokenizer("wait é\n\nnext")["input_ids"])
    assert stops.completed(ids, ["é"]) == 7  # its second byte
    assert stops.completed(ids, ["\n\n", "next"]) == 9
    assert stops.completed(ids, ["missing"]) == 0
    assert stops.completed(ids[:6], ["é"]) == 0
    assert reach(["é", "\n"], 4) >= 2 + 3  # it may end with the first of four new tokens


def test_the_text_before_the_first_of_the_stop_strings():
    assert before_stop("one. two\n\nthree", ["\n\n", "two"]) == "one. "
    assert before_stop("one", ["x"]) == "one"
    assert before_stop("one", []) == "one"
