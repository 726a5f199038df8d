"""Responses of the autoregressive model: stop strings, limits and seeds, batched as one by one."""

import numpy as np
import pytest
import torch

from actors.evaluation.autoregressive import autoregressive_responses, load_autoregressive
from actors.sampler.request import Request
from common.trajectory import until_end
from tests.models import tiny_qwen3, tiny_tokenizer

LENGTHS = [3, 9, 5, 12, 7]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_autoregressive(tiny_qwen3(tmp_path_factory.mktemp("arlm"), tokenizer=tiny_tokenizer()), "cpu")


def requests(limit: int = 30, stop: tuple[str, ...] = ()) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(i, 0, rng.integers(0, 256, n).astype(np.int32), limit, stop=stop) for i, n in enumerate(LENGTHS)]


def greedy(model, prompt: np.ndarray, limit: int, tokens: int) -> np.ndarray:
    """The LM head has more rows than there are `tokens`."""
    assert tokens < model.config.vocab_size
    ids = prompt.astype(np.int64)
    for _ in range(limit):
        with torch.no_grad():
            ids = np.append(ids, model(torch.from_numpy(ids)[None]).logits[0, -1, :tokens].argmax().item())
    return until_end(ids[len(prompt) :], model.generation_config.eos_token_id)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_responses_are_those_of_one_token_a_forward(loaded, batch_size):
    model, tokenizer = loaded
    found = list(autoregressive_responses(model, tokenizer, requests(), batch_size=batch_size))
    assert [r.ordinal for r in found] == list(range(len(LENGTHS)))
    for request, response in zip(requests(), found, strict=True):
        assert response.ids.tolist() == greedy(model, request.prompt_ids, 30, len(tokenizer)).tolist()
        assert (response.denoise_forwards, response.commit_forwards) == (len(response.ids), 0)


def test_each_request_has_its_own_limit_and_stop_strings(loaded):
    model, tokenizer = loaded
    free = list(autoregressive_responses(model, tokenizer, requests()))
    pairs = ((i, r.text[a : a + 2]) for i, r in enumerate(free) for a in range(4, len(r.text) - 2))
    stop = next((i, pair) for i, pair in pairs if "�" not in pair)
    mixed = requests()
    mixed[stop[0]] = requests(30, (stop[1],))[stop[0]]
    other = (stop[0] + 1) % len(LENGTHS)
    mixed[other] = requests(5)[other]
    found = list(autoregressive_responses(model, tokenizer, mixed))
    whole, cut = free[stop[0]], found[stop[0]]
    assert cut.finish_reason == "stop" and cut.ended
    assert cut.text == whole.text[: whole.text.index(stop[1])]
    assert cut.ids.tolist() == whole.ids[: len(cut.ids)].tolist()
    assert stop[1] in tokenizer.decode(cut.ids) and stop[1] not in tokenizer.decode(cut.ids[:-1])
    assert found[other].ids.tolist() == free[other].ids[:5].tolist()
    assert {r.ordinal for r in found if r.ids.tolist() != free[r.ordinal].ids.tolist()} == {stop[0], other}


def test_decoding_ends_when_all_rows_have_stopped(loaded, monkeypatch):
    model, tokenizer = loaded
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    (free,) = autoregressive_responses(model, tokenizer, requests()[3:4])
    whole = len(forwards)
    at = next(i for i, c in enumerate(free.text) if c != "�")
    list(autoregressive_responses(model, tokenizer, requests(30, (free.text[at],))[3:4]))
    handle.remove()
    assert len(forwards) - whole < whole


def test_samples_depend_on_the_seed_and_the_batch_not_on_what_came_before(loaded):
    model, tokenizer = loaded

    def ids(of: list[Request], seed: int) -> list[list[int]]:
        sampled = autoregressive_responses(model, tokenizer, of, temperature=1.0, seed=seed, batch_size=2)
        return [r.ids.tolist() for r in sampled]

    every = ids(requests(), 1)
    assert ids(requests(), 1) == every
    assert ids(requests(), 2) != every
    assert ids(requests()[2:4], 1) == every[2:4]
