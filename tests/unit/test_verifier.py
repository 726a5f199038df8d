"""Verified decoding by the original, a model of its own beside the student: the text is the original's."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding, probabilities
from actors.sampler.verification import acceptance
from common.config.adapter import AdapterConfig
from common.config.unmasking import SpeculativeUnmasking, StaticUnmasking
from common.lora import MergedWeights, adapter_parameters
from common.student import load_model
from tests.adapters import with_adapters
from tests.models import FAMILIES, tiny_family, tiny_qwen3
from tests.unit.test_verification import EOS, MASK, TOKENS, Letters, check, greedy, requests

BASE = SpeculativeUnmasking(verify="base")
GREEDY = Decoding(BASE, 0.0)


def loaded(path: str):
    return load_model(path, torch.float32, "sdpa").requires_grad_(False)


def near(path: str, context: str = "block"):
    """A student near the original at `path`, as if it had been trained a little."""
    student = loaded(path)
    student.config.attention_context = context
    torch.manual_seed(7)
    for parameter in student.parameters():
        parameter += 0.05 * torch.randn(parameter.shape) * parameter.abs().mean()
    return student


def sampler(student, original, block_size=4, slots=3, **options) -> Sampler:
    options = {"mask_token_id": MASK, "eos_token_id": EOS, "token_count": TOKENS, "seed": 5} | options
    return Sampler(student, block_size=block_size, slots=slots, verifier=original, **options)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("original"), seed=2)


@pytest.mark.parametrize("context", ["block", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_every_family_is_the_originals(family, context, tmp_path):
    path = tiny_family(tmp_path, family, seed=3)
    original, asked = loaded(path), requests(14)
    expected = {r.ordinal: greedy(original, r.prompt_ids, 14) for r in asked}
    check(list(sampler(near(path, context), loaded(path)).generate(asked, GREEDY)), expected, 4, rounds=2)


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("rounds", [1, 3])
def test_greedy_text_at_every_block_size(path, block_size, rounds):
    asked, original = requests(21), loaded(path)
    expected = {r.ordinal: greedy(original, r.prompt_ids, 21) for r in asked}
    decoding = Decoding(BASE.model_copy(update={"draft_rounds": rounds, "threshold": 0.3}), 0.0)
    made = list(sampler(near(path), loaded(path), block_size).generate(asked, decoding))
    check(made, expected, block_size, rounds + 1)


def test_it_ends_at_end_tokens_and_stop_strings_anywhere_in_a_block(path):
    (request,) = requests(16, [6])
    student, text = near(path), greedy(loaded(path), request.prompt_ids, 16)
    for end in dict.fromkeys(text):
        (t,) = sampler(student, loaded(path), eos_token_id=[end]).generate([request], GREEDY)
        assert (t.response_ids.tolist(), t.finish_reason) == (text[: text.index(end) + 1], "eos")
    for at in range(1, len(text) - 1):
        stop = text[at - 1 : at + 1]
        first = next(i for i in range(1, 16) if text[i - 1 : i + 1] == stop)
        asked = replace(request, stop=(Letters().decode(stop),))
        (t,) = sampler(student, loaded(path), tokenizer=Letters()).generate([asked], GREEDY)
        assert (t.response_ids.tolist(), t.finish_reason) == (text[: first + 1], "stop")


def test_an_adapter_without_a_gate_is_verified_by_its_base(path):
    """Merged into the student's weights, as rollouts and folders have it; the original stays as it was."""
    asked, original = requests(21), loaded(path)
    expected = {r.ordinal: greedy(original, r.prompt_ids, 21) for r in asked}
    student = loaded(path)
    tensors = {name: p.detach() for name, p in adapter_parameters(with_adapters(loaded(path), "none")).items()}
    MergedWeights(student, AdapterConfig(rank=3, alpha=6, gate="none")).load(student, tensors.items())
    assert greedy(student, asked[3].prompt_ids, 21) != expected[3], "the adapter acts"
    check(list(sampler(student, loaded(path)).generate(asked, GREEDY)), expected, 4, rounds=2)


def test_the_forwards_of_both_models_are_counted(path):
    of, counts = sampler(near(path), loaded(path), slots=1), [0, 0]

    def counting(number, part):
        whole = part.decode

        def call(*arguments):
            counts[number] += 1
            return whole(*arguments)

        part.decode = call

    counting(0, of.cached_model)
    counting(1, of.verifier.model)
    (t,) = of.generate(requests(30, [9]), GREEDY)
    assert 0 < counts[1] == t.commit_forwards
    assert sum(counts) == t.denoise_forwards
    assert of.token_rows == 8 + 4 * (counts[0] + 2 * counts[1]), "the prompt, drafts, and commits in both caches"


def test_neither_other_sequences_nor_padded_shapes_change_the_text(path):
    """Padded as CUDA does, on CPU: passes of few shapes, launched ahead. Prompts are cached once for all samples."""
    asked = [*requests(20), *(replace(r, sample=1) for r in requests(20))]
    for decoding in (GREEDY, Decoding(BASE, 0.9)):
        plain, padded, few = (sampler(near(path), loaded(path), slots=n) for n in (16, 16, 2))
        padded.few_shapes, padded.ahead = True, 1
        texts = [
            {(t.ordinal, t.sample): [*t.response_ids, *t.draft_ids] for t in of.generate(asked, decoding)}
            for of in (plain, padded, few)
        ]
        assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("decoding", [{"temperature": 0.8}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}])
def test_samples_have_the_originals_distribution(tmp_path, rounds, decoding):
    """Chi-square over all texts of three tokens out of four, from a prompt that ends inside a block; drafts are those
    of another model, with other weights and block-causal."""
    prompt, count = np.array([1, 2]), 3000
    path = tiny_qwen3(tmp_path, seed=6, hidden=32, head_dim=16)
    student, original, reference = near(path), loaded(path), loaded(path)
    for model in (student, original, reference):
        model.model.embed_tokens.weight *= 0.3
    settings = Decoding(BASE.model_copy(update={"draft_rounds": rounds, "threshold": 0.3}), **decoding)
    options = {"mask_token_id": 4, "eos_token_id": 200, "token_count": 4, "slots": 500}
    asked = [Request(i, 0, prompt, 3) for i in range(count)]
    made = list(sampler(student, original, 4, **options).generate(asked, settings))
    statistic = expected = 0.0
    seen = cells = 0
    for text in product(range(4), repeat=3):
        ids, p = [*prompt.tolist(), *text], 1.0
        share = probabilities(reference(input_ids=torch.tensor([ids[:-1]])).logits[0, 1:, :5], settings, 4)
        for j, token in enumerate(text):
            p *= float(share[j, token])
        if p * count < 5:
            continue
        found = sum(t.response_ids.tolist() == list(text) for t in made)
        seen, cells, expected = seen + found, cells + 1, expected + p
        statistic += (found - p * count) ** 2 / (p * count)
    assert seen / count == pytest.approx(expected, abs=0.03)
    assert statistic < cells + 4 * (2 * cells) ** 0.5
    kept, tested = acceptance(made, 4)
    assert 0 < kept.sum() < tested.sum()


def test_an_original_with_fewer_rows_than_the_student_or_more(path):
    """A student's embedding may have grown by a row for the mask token; rows beyond the student's are no tokens."""
    asked, original = requests(14, [5, 8]), loaded(path)
    expected = {r.ordinal: greedy(original, r.prompt_ids, 14) for r in asked}
    for rows in (296, 272):
        student = near(path)
        student.resize_token_embeddings(rows)
        check(list(sampler(student, loaded(path)).generate(asked, GREEDY)), expected, 4, rounds=2)
        assert len(list(sampler(student, loaded(path)).generate(asked, Decoding(BASE, 0.7)))) == len(asked)


def test_what_it_cannot_do_is_refused_by_name(path):
    alone = Sampler(near(path), block_size=4, mask_token_id=MASK, eos_token_id=EOS, slots=2, seed=0)
    with pytest.raises(ValueError, match="needs a sampler that was given the original as its verifier"):
        list(alone.generate(requests(4), GREEDY))
    both = sampler(near(path), loaded(path))
    with pytest.raises(ValueError, match="needs a student with attention_context 'causal'"):
        list(both.generate(requests(4), Decoding(SpeculativeUnmasking(), 0.0)))
    assert len(list(both.generate(requests(4), Decoding(StaticUnmasking(), 0.0)))) == len(requests()), "as without one"
    weights = sum(p.nbytes for p in both.verifier.model.model.parameters())
    assert both.verifier.memory_bytes == weights + both.verifier.cache.memory.nbytes > weights
