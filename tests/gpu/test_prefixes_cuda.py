"""Kept prefixes and swapped weights under captured graphs.

Needs torch, transformers, pydantic, pyarrow and a CUDA device.
"""

import numpy as np
import pytest
import torch

from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.config.unmasking import StaticUnmasking
from common.student import load_model
from common.weights.transport import load_weights
from tests.models import tiny_qwen3
from tests.unit.test_prefixes import chats

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STATIC = Decoding(StaticUnmasking(), 0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = tmp_path_factory.mktemp("models")
    return [tiny_qwen3(folder / f"seed{s}", seed=s, hidden=128, heads=4, kv_heads=2) for s in (2, 3)]


def sampler(path: str, prefix_tokens: int = 0) -> Sampler:
    model = load_model(path, torch.float32, "sdpa").to(DEVICE)
    return Sampler(
        model, block_size=4, mask_token_id=287, eos_token_id=7, slots=16, seed=5, prefix_tokens=prefix_tokens
    )


def test_the_same_tokens_with_and_without(folders):
    plain, shared = sampler(folders[0]), sampler(folders[0], prefix_tokens=4096)
    for _ in range(2):  # the second time from graphs, and all prompts are known
        expected, responses = chats(plain, STATIC), chats(shared, STATIC)
        assert len(expected) == 10
        # a tie within rounding may fall either way, and later turns of that chat follow
        assert sum(a == b for a, b in zip(expected, responses, strict=True)) >= len(expected) - 2
    assert shared.known_tokens > shared.token_rows / 4


def test_a_beginning_that_prompts_of_one_pass_share_is_computed_once(folders):
    rng = np.random.default_rng(1)
    head = rng.integers(0, 256, size=200)
    requests = [Request(i, 0, np.concatenate([head, rng.integers(0, 256, size=5 * i + 1)]), 12) for i in range(16)]
    plain, shared = sampler(folders[0]), sampler(folders[0], prefix_tokens=8192)
    made = [{t.ordinal: t.response_ids.tolist() for t in s.generate(requests, STATIC)} for s in (plain, shared)]
    assert sum(made[0][i] == made[1][i] for i in range(16)) >= 14  # a tie within rounding may fall either way
    assert shared.known_tokens == 15 * 192


def test_running_sequences_go_on_with_new_weights(folders):
    of = sampler(folders[0], prefix_tokens=512)
    request = Request(0, 0, np.arange(10, 31), 40)
    for _ in range(2):  # graphs are captured
        list(of.generate([request], STATIC))
    other = load_model(folders[1], torch.float32, "sdpa")
    ended, written = [], 0
    for number, trajectories in enumerate(of.passes([request], STATIC)):
        ended += trajectories
        if number == 14:
            written = int(of._state.block[of._state.running][0]) * 4
            load_weights(of.model, other.named_parameters())
            of.weights_version = 1
            of.renew()
    (t,) = ended
    kept = t.response_ids[: written - 21]
    goes_on = Request(1, 0, np.concatenate([request.prompt_ids, kept]), 40 - len(kept))
    (rest,) = sampler(folders[1]).generate([goes_on], STATIC)
    assert len(kept) > 8
    assert t.response_ids[len(kept) :].tolist() == rest.response_ids.tolist()
