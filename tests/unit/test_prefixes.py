"""Prefixes that sequences share: the same tokens, fewer computed, bounded memory, nothing of earlier weights."""

import numpy as np
import pytest
import torch

from actors.sampler.cache import SlotCache
from actors.sampler.prefixes import PrefixCache
from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.config.unmasking import DynamicUnmasking, StaticUnmasking
from common.student import load_model
from common.weights.transport import load_weights
from tests.models import tiny_qwen3
from tests.unit.test_sampler import limited

MASK, EOS = 287, 7
STATIC, DRAWN = Decoding(StaticUnmasking(), 0.0), Decoding(DynamicUnmasking(threshold=0.2), 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [tiny_qwen3(folder / f"seed{seed}", seed=seed) for seed in (2, 3)]


@pytest.fixture
def model(folders):
    return load_model(folders[0], torch.float32, "sdpa")


def sampler(model, block_size=4, slots=3, prefix_tokens=0) -> Sampler:
    return Sampler(
        model, block_size=block_size, mask_token_id=MASK, eos_token_id=EOS, slots=slots, seed=5,
        prefix_tokens=prefix_tokens,
    )  # fmt: skip


def chats(of: Sampler, decoding: Decoding, turns: int = 2) -> list[list[int]]:
    """Five chats with one system prompt: each turn's prompt is all that was said before, and something new."""
    rng = np.random.default_rng(0)
    system = rng.integers(0, 256, size=21)
    said = [np.concatenate([system, rng.integers(0, 256, size=n)]) for n in (1, 3, 8, 12, 30)]
    responses = []
    for turn in range(turns):
        requests = [Request(5 * turn + i, 0, prompt, 18) for i, prompt in enumerate(said)]
        for t in sorted(of.generate(requests, decoding), key=lambda t: t.ordinal):
            responses.append(t.response_ids.tolist())
            new = rng.integers(0, 256, size=5)
            said[t.ordinal % 5] = np.concatenate([t.prompt_ids, t.response_ids, new]).astype(np.int64)
    return responses


@pytest.mark.parametrize(
    ("block_size", "decoding", "as_on_cuda"),
    [(4, STATIC, False), (4, DRAWN, True), (3, DRAWN, False), (32, STATIC, True)],
)
def test_the_same_tokens_with_and_without_for_less_work(model, block_size, decoding, as_on_cuda):
    plain, shared = sampler(model, block_size), sampler(model, block_size, prefix_tokens=2048)
    plain.few_shapes = shared.few_shapes = as_on_cuda
    plain.ahead = shared.ahead = int(as_on_cuda)
    assert chats(shared, decoding) == chats(plain, decoding)
    assert shared.known_tokens > 0 and plain.known_tokens == 0
    assert shared.token_rows == plain.token_rows - shared.known_tokens


@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_a_beginning_that_prompts_of_one_pass_share_is_computed_once(model, as_on_cuda):
    rng = np.random.default_rng(1)
    head = rng.integers(0, 256, size=200)
    prompts = [np.concatenate([head, rng.integers(0, 256, size=n)]) for n in (1, 5, 18, 40)]
    requests = [Request(i, 0, ids, 12) for i, ids in enumerate([*prompts, rng.integers(0, 256, size=70)])]
    plain, shared = sampler(model, slots=5), sampler(model, slots=5, prefix_tokens=2048)
    plain.few_shapes = shared.few_shapes = as_on_cuda
    made = [sorted(s.generate(requests, DRAWN), key=lambda t: t.ordinal) for s in (plain, shared)]
    assert [t.response_ids.tolist() for t in made[0]] == [t.response_ids.tolist() for t in made[1]]
    assert shared.known_tokens == 3 * 192, "whole pages of three of them"
    assert shared.token_rows == plain.token_rows - 3 * 192


def test_sequences_wait_for_a_beginning_where_that_saves_a_forward(model):
    prefixes = PrefixCache(SlotCache(model, 5, 512), 4, 512, version=0)
    head, other = np.arange(160), np.arange(200, 240)
    asked = [(0, np.r_[head, 1]), (1, other), (2, np.r_[head, 2, 3]), (3, head[:100]), (4, other[:20])]
    first, later = prefixes.waves(asked)
    assert [slot for slot, _ in first] == [0, 1] and [slot for slot, _ in later] == [2, 3, 4]
    assert [slot for slot, _ in prefixes.waves([*asked[:2], asked[4]])[0]] == [0, 1, 4], "16 tokens are not worth it"
    prefixes.write(SlotCache(model, 5, 512), asked[:1])
    assert len(prefixes.waves(asked)) == 1, "it is known already"


def test_a_chat_is_cached_up_to_the_last_block_that_a_pass_has_committed(model):
    of = sampler(model, prefix_tokens=512)
    prompt = np.arange(10, 43)
    (first,) = of.generate([Request(0, 0, prompt, 40)], STATIC)
    assert first.finish_reason == "length" and of.known_tokens == 0
    said = np.concatenate([prompt, first.response_ids, [5, 6, 7]])
    list(of.generate([Request(1, 0, said, 4)], STATIC))
    assert of.known_tokens == (33 + 40) // 16 * 16, "tokens of the response are among them"
    other = said.copy()
    other[20] += 1
    list(of.generate([Request(2, 0, other, 4)], STATIC))
    assert of.known_tokens == 64 + 16, "up to the page in which it differs"


def test_memory_is_bounded_and_what_was_used_last_stays(model):
    of = sampler(model, slots=2, prefix_tokens=10 * 16)
    prompts = [np.full(40, i) for i in range(12)]
    plain = [list(sampler(model).generate([Request(i, 0, p, 4)], STATIC)) for i, p in enumerate(prompts)]
    for i, prompt in enumerate(prompts):
        (t,) = of.generate([Request(i, 0, prompt, 4)], STATIC)
        assert t.response_ids.tolist() == plain[i][0].response_ids.tolist()
        list(of.generate([Request(0, 0, prompts[0], 4)], STATIC))  # one that all use
    assert of._prefixes.tokens == 160
    before = of.known_tokens
    list(of.generate([Request(0, 0, prompts[0], 4)], STATIC))
    assert of.known_tokens == before + 32
    list(of.generate([Request(1, 0, prompts[1], 4)], STATIC))
    assert of.known_tokens == before + 32, "it made room"


def test_a_sequence_longer_than_the_memory_keeps_its_beginning(model):
    cache = SlotCache(model, 2, 128)
    prefixes = PrefixCache(cache, 4, 48, version=0)
    cache.memory.normal_()
    ids = np.arange(100)
    prefixes.write(cache, [(0, ids)])
    assert prefixes.read(cache, [(1, ids), (1, ids[:40]), (1, ids + 1), (1, ids[:15])]) == [48, 32, 0, 0]
    assert torch.equal(cache.memory[:, :, 1, :, :48], cache.memory[:, :, 0, :, :48])
    assert not torch.equal(cache.memory[:, :, 1, :, 48:52], cache.memory[:, :, 0, :, 48:52])


def test_of_one_prefix_the_end_is_forgotten_first(model):
    cache = SlotCache(model, 1, 128)
    prefixes = PrefixCache(cache, 4, 64, version=0)
    first, second = np.arange(48), np.arange(200, 232)
    prefixes.write(cache, [(0, first)])
    prefixes.write(cache, [(0, second)])
    assert prefixes.read(cache, [(0, first), (0, second)]) == [32, 32]


def test_where_memory_runs_out_fewer_prefixes_are_kept(model):
    plain, of = sampler(model, slots=8), sampler(model, slots=8, prefix_tokens=256)
    expected = chats(plain, STATIC)
    limited(of.cached_model, "decode", lambda ids, *_: ids.numel(), most=16)
    assert chats(of, STATIC) == expected
    assert of.slots < 8
    assert of.prefix_tokens == 256 * of.slots // 8 and of._prefixes.tokens <= of.prefix_tokens


def test_new_weights_forget_prefixes(folders, model):
    of = sampler(model, prefix_tokens=512)
    request = Request(0, 0, np.arange(10, 60), 12)
    list(of.generate([request], STATIC))
    other = load_model(folders[1], torch.float32, "sdpa")
    load_weights(model, other.named_parameters())
    of.weights_version = 1
    (t,) = of.generate([request], STATIC)
    (fresh,) = sampler(other).generate([request], STATIC)
    assert t.response_ids.tolist() == fresh.response_ids.tolist()
    assert of.known_tokens == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_running_sequences_go_on_with_new_weights_as_if_these_were_given_what_is_written(folders, model, ahead):
    decoding = Decoding(StaticUnmasking(), 1.0)
    of = sampler(model, slots=1, prefix_tokens=512)
    of.ahead = ahead
    request = Request(0, 0, np.arange(10, 31), 40, key=9)
    other = load_model(folders[1], torch.float32, "sdpa")
    ended = []
    for number, trajectories in enumerate(of.passes([request], decoding)):
        ended += trajectories
        if number == 14:
            written = int(of._state.block[0]) * 4  # the block at hand is begun by the next pass
            assert of._state.masked[0].all()
            load_weights(model, other.named_parameters())
            of.weights_version = 1
            of.renew()
    (t,) = ended
    assert t.weights_version == 1
    kept = t.response_ids[: written - 21]
    goes_on = Request(1, 0, np.concatenate([request.prompt_ids, kept]), 40 - len(kept), key=9)
    (rest,) = sampler(other).generate([goes_on], decoding)
    (old,) = sampler(load_model(folders[0], torch.float32, "sdpa")).generate([request], decoding)
    assert kept.tolist() == old.response_ids[: len(kept)].tolist() and len(kept) > 8
    assert t.response_ids[len(kept) :].tolist() == rest.response_ids.tolist()
    assert t.response_ids.tolist() != old.response_ids.tolist()
    # what is kept of it is of the new weights
    longer = Request(2, 0, np.concatenate([t.prompt_ids, t.response_ids]), 20)
    ((shared,), (fresh,)) = (s.generate([longer], decoding) for s in (of, sampler(other)))
    assert shared.response_ids.tolist() == fresh.response_ids.tolist()
    assert of.known_tokens == (21 + len(t.response_ids) - 1) // 16 * 16 > 0
