"""Responses of the autoregressive model: stop strings, limits and seeds, many at once as one by one."""

import numpy as np
import pytest
import torch

from actors.evaluation.autoregressive import autoregressive_responses, autoregressive_sampler, load_autoregressive
from actors.sampler.autoregressive import token_by_token
from actors.sampler.request import Request
from common.trajectory import until_end
from tests.models import FAMILIES, tiny_family, tiny_qwen3, tiny_tokenizer

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


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_greedy_responses_are_those_of_one_token_a_forward(loaded, slots):
    model, tokenizer = loaded
    found = autoregressive_responses(model, tokenizer, requests(), slots=slots)
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


def test_a_sequence_that_has_stopped_takes_part_in_no_further_pass(loaded):
    model, tokenizer = loaded
    (free,) = autoregressive_responses(model, tokenizer, requests()[3:4])
    at = next(i for i, c in enumerate(free.text) if c != "�")
    sampler = autoregressive_sampler(model, tokenizer, slots=1)
    (cut,) = sampler.generate(requests(30, (free.text[at],))[3:4], token_by_token(0.0))
    assert sampler.forwards == len(cut.response_ids) < len(free.ids)


def test_samples_depend_on_the_seed_and_the_request_alone(loaded):
    model, tokenizer = loaded

    def ids(of: list[Request], seed: int, slots: int = 2) -> list[list[int]]:
        sampled = autoregressive_responses(model, tokenizer, of, temperature=1.0, seed=seed, slots=slots)
        return [r.ids.tolist() for r in sampled]

    every = ids(requests(), 1)
    assert ids(requests(), 1, slots=5) == every
    assert ids(requests(), 2) != every
    assert ids(requests()[2:4], 1) == every[2:4]


def test_samples_have_the_models_distribution(loaded):
    """Of 4,000 first tokens, at a temperature and with a nucleus: chi-square against the softmax of one forward."""
    model, tokenizer = loaded
    request = requests(1)[0]
    with torch.no_grad():
        logits = model(torch.from_numpy(request.prompt_ids.astype(np.int64))[None]).logits[0, -1, : len(tokenizer)]
    p, order = (logits / 0.7).softmax(0).sort(descending=True)
    kept = int((p.cumsum(0) - p < 0.9).sum())
    p = p[:kept] / p[:kept].sum()
    sampler = autoregressive_sampler(model, tokenizer, slots=100, seed=3)
    same = [Request(i, 0, request.prompt_ids, 1) for i in range(4000)]
    drawn = torch.tensor([int(t.response_ids[0]) for t in sampler.generate(same, token_by_token(0.7, top_p=0.9))])
    counts = torch.stack([(drawn == token).sum() for token in order[:kept]])
    assert counts.sum() == 4000, "nothing outside the nucleus"
    often = p * 4000 >= 5
    square = ((counts - p * 4000) ** 2 / (p * 4000))[often].sum()
    assert often.sum() > 5 and square < often.sum() + 4 * (2 * often.sum()) ** 0.5


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3-moe"])
def test_every_family_with_the_passes_of_a_gpu(tmp_path, family):
    """Padded to few shapes and read a pass late; the model still gives its own causal forward."""
    model, tokenizer = load_autoregressive(tiny_family(tmp_path / "arlm", family), "cpu")
    expected = [greedy(model, r.prompt_ids, 20, len(tokenizer)).tolist() for r in requests(20)]
    sampler = autoregressive_sampler(model, tokenizer, slots=3)
    sampler.few_shapes, sampler.ahead = True, 1
    found = {t.ordinal: t.response_ids.tolist() for t in sampler.generate(requests(20), token_by_token(0.0))}
    assert [found[i] for i in range(len(LENGTHS))] == expected
    assert [greedy(model, r.prompt_ids, 20, len(tokenizer)).tolist() for r in requests(20)] == expected
