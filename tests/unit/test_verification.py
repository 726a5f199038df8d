"""Verified decoding: the verifier's own text, whatever is drafted."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding, probabilities
from actors.sampler.verification import acceptance, kept_probability, own_distribution
from common.config.unmasking import SpeculativeUnmasking, StaticUnmasking
from common.student import load_model
from common.trajectory import Trajectory
from tests.models import FAMILIES, tiny_family, tiny_qwen3

MASK, EOS, TOKENS = 262, 7, 256
LENGTHS = [1, 3, 4, 5, 8, 9, 11, 17]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return context_causal(tiny_qwen3(tmp_path_factory.mktemp("model"), seed=2))


def context_causal(path: str):
    model = load_model(path, torch.float32, "sdpa").requires_grad_(False)
    model.config.attention_context = "causal"
    return model


def sampler(model, block_size=4, slots=3, **options) -> Sampler:
    options = {"mask_token_id": MASK, "eos_token_id": EOS, "token_count": TOKENS, "seed": 5} | options
    return Sampler(model, block_size=block_size, slots=slots, **options)


def requests(limit=20, lengths=LENGTHS) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(i, 0, rng.integers(8, TOKENS, size=n), limit) for i, n in enumerate(lengths)]


def greedy(model, prompt: np.ndarray, limit: int) -> list[int]:
    """The verifier's own text: one plain causal forward for each token."""
    ids = prompt.tolist()
    while len(ids) < len(prompt) + limit:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1, :TOKENS].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def check(made: list[Trajectory], expected: dict[int, list[int]], block_size: int, rounds: int = 1) -> None:
    assert sorted(t.ordinal for t in made) == sorted(expected)
    for t in made:
        assert t.response_ids.tolist() == expected[t.ordinal], t.ordinal
        assert len(t.x0) % block_size == 0
        assert MASK not in t.x0
        assert len(t.draft_ids) == len(t.response_ids) + len(t.tail_ids) == len(t.reveal_round)
        # every token is a draft that was kept, or one forward's own
        own = (t.draft_ids[: len(t.response_ids)] != t.response_ids).sum()
        assert own <= t.denoise_forwards <= (rounds + 1) * (len(t.response_ids) + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_every_family_is_the_plain_causal_greedy_text(family, tmp_path):
    path = tiny_family(tmp_path, family, seed=3)
    plain, asked = load_model(path, torch.float32, "sdpa"), requests(14)
    expected = {r.ordinal: greedy(plain, r.prompt_ids, 14) for r in asked}
    student = context_causal(path)
    check(list(sampler(student).generate(asked, Decoding(SpeculativeUnmasking(), 0.0))), expected, 4)


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("rounds", [1, 3])
def test_greedy_text_at_every_block_size(model, tmp_path, block_size, rounds):
    plain = load_model(tiny_qwen3(tmp_path, seed=2), torch.float32, "sdpa")
    asked = requests(21)
    expected = {r.ordinal: greedy(plain, r.prompt_ids, 21) for r in asked}
    decoding = Decoding(SpeculativeUnmasking(draft_rounds=rounds, threshold=0.3), 0.0)
    check(list(sampler(model, block_size).generate(asked, decoding)), expected, block_size, rounds)


def test_it_ends_at_end_tokens_anywhere_in_a_block(model, tmp_path):
    """Each token of a text in turn is an end token."""
    (request,) = requests(16, [6])
    plain = load_model(tiny_qwen3(tmp_path, seed=2), torch.float32, "sdpa")
    text = greedy(plain, request.prompt_ids, 16)
    for end in dict.fromkeys(text):
        length = text.index(end) + 1
        for rounds in (1, 2):
            decoding = Decoding(SpeculativeUnmasking(draft_rounds=rounds), 0.0)
            (t,) = sampler(model, eos_token_id=[end]).generate([request], decoding)
            assert (t.response_ids.tolist(), t.finish_reason) == (text[:length], "eos")
            assert len(t.x0) % 4 == 0 and MASK not in t.x0


class Letters:
    """Decodes each token as one character."""

    def decode(self, ids, skip_special_tokens=True) -> str:
        return "".join(chr(0x4E00 + int(i)) for i in ids)


def test_it_stops_at_stop_strings_anywhere_in_a_block(model, tmp_path):
    (request,) = requests(16, [6])
    plain = load_model(tiny_qwen3(tmp_path, seed=2), torch.float32, "sdpa")
    text = greedy(plain, request.prompt_ids, 16)
    assert len(text) > 8
    for at in range(1, len(text) - 1):  # its last token may be the end token, which is no text
        stop = Letters().decode(text[at - 1 : at + 1])
        first = next(i for i in range(1, 16) if text[i - 1 : i + 1] == text[at - 1 : at + 1])
        asked = Request(0, 0, request.prompt_ids, 16, stop=(stop,))
        (t,) = sampler(model, tokenizer=Letters()).generate([asked], Decoding(SpeculativeUnmasking(), 0.0))
        assert (t.response_ids.tolist(), t.finish_reason) == (text[: first + 1], "stop")


def certain(model):
    """A student that drafts what it would write: one token follows another whatever stands around it."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


def test_a_block_that_is_kept_whole_costs_one_forward(tmp_path):
    """Without attention and MLP a masked position predicts what the mask token's embedding says, which here is what
    every token's says."""
    model = certain(context_causal(tiny_qwen3(tmp_path, seed=4, tied=False)))
    model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0]
    (t,) = sampler(model).generate(requests(33, [7]), Decoding(SpeculativeUnmasking(), 0.0))
    assert len(set(t.response_ids.tolist())) == 1
    # the first draft, one for each of the ten blocks from that of the prompt's end on
    assert (t.denoise_forwards, t.commit_forwards) == (1 + 10 - 1, 9)
    kept, tested = acceptance([t], 4)
    assert kept.tolist() == tested.tolist() and tested[0] == 0


def test_acceptance_counts_what_was_tested():
    t = Trajectory(
        0, 0, np.arange(5), np.array([10, 11, 12, 13, 14, 15, 16]), np.array([17]), np.zeros(8), np.zeros(8), 0,
        "length", 5, 1, draft_ids=np.array([10, 9, -1, -1, 14, 15, 8, 17]),
    )  # fmt: skip
    kept, tested = acceptance([t], 4)  # offsets 1, 2, 3, then 0, 1, 2, 3; the tail does not count
    assert kept.tolist() == [0, 2, 1, 0] and tested.tolist() == [0, 2, 2, 1]


DECODINGS = [Decoding(SpeculativeUnmasking(), 0.7), Decoding(SpeculativeUnmasking(), 1.0, top_k=3, top_p=0.8)]


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("greedy_drafts", [False, True])
def test_by_enumeration_the_text_has_the_verifiers_distribution(decoding, greedy_drafts):
    """Four tokens, three positions: every draft times what becomes of it, against p; drafts are given all at once, the
    verifier's distribution depends on what stands before."""
    torch.manual_seed(0)
    tokens, size, mask = 4, 3, 4
    of_draft = torch.randn(size, tokens + 1) * 2
    table = {prefix: torch.randn(tokens + 1) * 2 for n in range(size) for prefix in product(range(tokens), repeat=n)}
    p = {prefix: probabilities(logits, decoding, mask).double() for prefix, logits in table.items()}
    q = probabilities(of_draft, decoding, mask).double()
    if greedy_drafts:
        q = torch.nn.functional.one_hot(q.argmax(-1), tokens + 1).double()
    made: dict[tuple[int, ...], float] = {}
    for draft in product(range(tokens), repeat=size):
        share = float(torch.stack([q[j, x] for j, x in enumerate(draft)]).prod())
        if not share:
            continue
        for first in range(size + 1):  # the first that is rejected; size: none is
            chance = share
            for j in range(min(first + 1, size)):
                keep = float(kept_probability(p[draft[:j]], q[j], torch.tensor(draft[j])))
                chance *= keep if j < first else 1 - keep
            if first == size:
                made[draft] = made.get(draft, 0) + chance
                continue
            for own, weight in enumerate(own_distribution(p[draft[:first]], q[first]).tolist()[:tokens]):
                rest = (*draft[:first], own)
                for behind in product(range(tokens), repeat=size - first - 1):  # then the verifier's own
                    text, later = rest + behind, chance * weight
                    for j in range(first + 1, size):
                        later *= float(p[text[:j]][text[j]])
                    made[text] = made.get(text, 0) + later
    for text in product(range(tokens), repeat=size):
        expected = float(torch.stack([p[text[:j]][text[j]] for j in range(size)]).prod())
        assert made.get(text, 0.0) == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def four_tokens(tmp_path_factory):
    torch.manual_seed(1)
    path = tiny_qwen3(tmp_path_factory.mktemp("four"), seed=6, hidden=32, head_dim=16)
    model = context_causal(path)
    model.model.embed_tokens.weight *= 0.3
    return model


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("decoding", [{"temperature": 0.8}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}])
def test_samples_have_the_verifiers_distribution(four_tokens, rounds, decoding):
    """Chi-square over all texts of three tokens out of four, from a prompt that ends inside a block."""
    prompt, count = np.array([1, 2]), 3000
    settings = Decoding(SpeculativeUnmasking(draft_rounds=rounds, threshold=0.3), **decoding)
    options = {"mask_token_id": 4, "eos_token_id": 200, "token_count": 4, "slots": 500}
    asked = [Request(i, 0, prompt, 3) for i in range(count)]
    made = list(sampler(four_tokens, 4, **options).generate(asked, settings))
    observed: dict[tuple[int, ...], int] = {}
    for t in made:
        observed[tuple(t.response_ids.tolist())] = observed.get(tuple(t.response_ids.tolist()), 0) + 1
    statistic = expected_cells = 0.0
    seen = 0
    for text in product(range(4), repeat=3):
        ids, p = [*prompt.tolist(), *text], 1.0
        with torch.no_grad():
            logits = four_tokens(input_ids=torch.tensor([ids[:-1]])).logits[0, 1:, :5]
        share = probabilities(logits, settings, 4)
        for j, token in enumerate(text):
            p *= float(share[j, token])
        if p * count < 5:
            continue
        found = observed.get(text, 0)
        seen += found
        expected_cells += p
        statistic += (found - p * count) ** 2 / (p * count)
    degrees = sum(1 for _ in observed)  # cells, about
    assert seen / count == pytest.approx(expected_cells, abs=0.03)
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5
    kept, tested = acceptance(made, 4)
    assert 0 < kept.sum() < tested.sum()


def test_trajectories_do_not_depend_on_the_batch(model):
    decoding = Decoding(SpeculativeUnmasking(), 1.0)
    together = {t.ordinal: t for t in sampler(model, slots=8).generate(requests(), decoding)}
    for request in requests():
        (alone,) = sampler(model, slots=1).generate([request], decoding)
        assert alone.response_ids.tolist() == together[request.ordinal].response_ids.tolist()
        assert alone.denoise_forwards == together[request.ordinal].denoise_forwards


def test_sequences_with_different_settings_run_together(model):
    settings = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 3, 0.9), (1.0, 0, 1.0)]
    for rounds in (1, 2):
        rule = SpeculativeUnmasking(draft_rounds=rounds, threshold=0.3)
        decodings = [Decoding(rule, *values) for values in settings]
        asked = [replace(r, decoding=decodings[i % 4]) for i, r in enumerate(requests())]
        together = {t.ordinal: t for t in sampler(model, slots=8).generate(asked, decodings[0])}
        for request in asked:
            (alone,) = sampler(model, slots=1).generate([request], decodings[0])
            assert alone.response_ids.tolist() == together[request.ordinal].response_ids.tolist()
            assert alone.draft_ids.tolist() == together[request.ordinal].draft_ids.tolist()


def test_what_it_cannot_do_is_refused_by_name(model, tmp_path):
    plain = load_model(tiny_qwen3(tmp_path), torch.float32, "sdpa")
    decoding = Decoding(SpeculativeUnmasking(), 0.0)
    with pytest.raises(ValueError, match="needs a student with attention_context 'causal'"):
        list(sampler(plain).generate(requests(), decoding))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        list(sampler(model).generate(requests(4, [0]), decoding))
    asked = requests(4)
    other = Request(99, 0, asked[0].prompt_ids, 4, decoding=Decoding(StaticUnmasking(), 0.0))
    with pytest.raises(ValueError, match="do not run beside those of other rules"):
        list(sampler(model).generate([asked[0], other], decoding))
    other = replace(other, decoding=Decoding(SpeculativeUnmasking(draft_rounds=2), 0.0))
    with pytest.raises(ValueError, match="need equal draft_rounds"):
        list(sampler(model).generate([asked[0], other], decoding))
