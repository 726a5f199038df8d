"""Which token becomes the mask token, and what grows for it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.evaluation.generation import load_student, sampler_of
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.unmasking import DynamicUnmasking
from common.conversion import convert, convert_folder, load_converted
from common.mask_token import set_mask_token
from common.model_files import ModelError
from common.student import load_model, load_tokenizer
from common.vocabulary import first_difference
from tests.models import tiny_qwen3, tiny_tokenizer

PLAIN = 262  # tokens of the tiny tokenizer without a mask token


@pytest.mark.parametrize(
    ("special", "rows", "wanted", "token", "number"),
    [
        ((), PLAIN + 1, "auto", "<|mask|>", PLAIN),
        ((), PLAIN + 1, "<|hole|>", "<|hole|>", PLAIN),
        ((), PLAIN + 1, "new", "<|mask|>", PLAIN),
        (("<|mask|>",), PLAIN + 9, "auto", "<|mask|>", PLAIN),  # there, but not declared
        (("<|reserved_special_token_0|>",), PLAIN + 1, "auto", "<|reserved_special_token_0|>", PLAIN),
        (("<a>", "<unused0>", "<unused1>"), PLAIN + 3, "auto", "<unused0>", PLAIN + 1),
        (("<|unused_0|>",), PLAIN + 1, "auto", "<|unused_0|>", PLAIN),
        (("[UNUSED_TOKEN_7]",), PLAIN + 1, "auto", "[UNUSED_TOKEN_7]", PLAIN),
        (("<repo_name>", "<gh_stars>", "<empty_output>"), PLAIN + 3, "auto", "<empty_output>", PLAIN + 2),
        (("<|fim_pad|>",), PLAIN + 1, "auto", "<|fim_pad|>", PLAIN),
        (("<SPECIAL_20>",), PLAIN + 1, "auto", "<SPECIAL_20>", PLAIN),
        (("[control_8]",), PLAIN + 1, "auto", "[control_8]", PLAIN),
        (("<|extra_0|>",), PLAIN + 1, "auto", "<|extra_0|>", PLAIN),
        (("<a>", "<b>"), PLAIN + 2, "<b>", "<b>", PLAIN + 1),
        ((), PLAIN, "<|pad|>", "<|pad|>", 256),
    ],
)
def test_the_mask_token(special, rows, wanted, token, number):
    tokenizer = tiny_tokenizer(*special)
    before = tokenizer.get_vocab()
    mask = set_mask_token(tokenizer, wanted, rows, {tokenizer.eos_token_id})
    assert (mask.token, mask.id, mask.rows) == (token, number, rows)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (token, number)
    assert before.items() <= tokenizer.get_vocab().items()
    assert bool(mask.note) == (wanted in ("auto", "new") or token not in before)


def test_a_mask_token_that_the_tokenizer_declares_is_kept():
    tokenizer = tiny_tokenizer("<hidden>", "<unused0>", mask_token="<hidden>")
    mask = set_mask_token(tokenizer, "auto", 288, set())
    assert (mask.token, mask.id, mask.note) == ("<hidden>", PLAIN, "")
    assert set_mask_token(tokenizer, "<unused0>", 288, set()).id == PLAIN + 1


def test_one_that_has_no_row_is_not():
    tokenizer = tiny_tokenizer("<unused0>", "<hidden>", mask_token="<hidden>")
    assert set_mask_token(tokenizer, "auto", PLAIN + 1, set()).token == "<unused0>"


@pytest.mark.parametrize(
    ("special", "wanted", "message"),
    [
        (("<a>",), "auto", "all 263 rows of the embedding are used, and no token is reserved; name a token"),
        (("<a>",), "<b>", "has no token '<b>' and no spare row for it: all 263 rows"),
        (("<a>",), "<|im_end|>", "cannot have '<|im_end|>' as its mask token: it begins or ends a text"),
        (("<a>",), "<|im_start|>", "the chat template writes it"),
        (("<a>", "<b>"), "<b>", "its id 263 is beyond the 263 rows"),
        (("<|im_start|>x",), "Ġ", "its text is not read as this one token"),
    ],
)
def test_a_mask_token_that_is_refused(special, wanted, message):
    tokenizer = tiny_tokenizer(*special)
    with pytest.raises(ModelError) as error:
        set_mask_token(tokenizer, wanted, PLAIN + 1, {tokenizer.eos_token_id})
    assert message in str(error.value)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def full(request, tmp_path_factory):
    """A model with as many rows as tokens, and no token in reserve."""
    folder = tmp_path_factory.mktemp("full")
    return tiny_qwen3(folder / "model", tokenizer=tiny_tokenizer(), vocab=PLAIN, tied=request.param)


def test_rows_are_added(full, tmp_path):
    """One for the mask, up to a multiple of 64; each the mean of the old, which stay as they are."""
    conversion = convert_folder(full, tmp_path / "student", 4, "new", torch.float32)
    assert conversion.config.mask_token_id == PLAIN
    assert "embedding and LM head grow from 262 to 320 rows" in conversion.notes[0]
    old, new = load_model(full, torch.float32, "sdpa"), load_model(str(tmp_path / "student"), torch.float32, "sdpa")
    for before, after in (
        (old.get_input_embeddings().weight, new.get_input_embeddings().weight),
        (old.get_output_embeddings().weight, new.get_output_embeddings().weight),
    ):
        assert after.shape == (320, 64)
        assert torch.equal(after[:PLAIN], before)
        assert torch.allclose(after[PLAIN:], before.mean(dim=0).expand(320 - PLAIN, -1))
    tied = new.get_input_embeddings().weight is new.get_output_embeddings().weight
    assert (
        tied
        == old.config.tie_word_embeddings
        == ("lm_head.weight" not in load_file(tmp_path / "student/model.safetensors"))
    )
    ids = torch.arange(9)[None]
    assert torch.allclose(new(ids).logits[..., :PLAIN], old(ids).logits, atol=1e-5)
    assert load_tokenizer(str(tmp_path / "student")).mask_token_id == PLAIN


def test_a_student_with_added_rows_decodes_and_is_read_by_transformers(full, tmp_path):
    convert_folder(full, tmp_path / "student", 4, "new", torch.float32)
    model, tokenizer = load_student(str(tmp_path / "student"), "float32", "cpu")
    sampler = sampler_of(model, tokenizer, block_size=None, slots=2)
    requests = [Request(i, 0, np.arange(5 + i, dtype=np.int32), 12) for i in range(4)]
    made = list(sampler.generate(requests, Decoding(DynamicUnmasking(), 1.0)))
    assert len(made) == 4
    assert all(PLAIN not in t.response_ids for t in made)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.vocab_size == 320


def test_a_student_keeps_the_row_that_was_added(full, tmp_path):
    """A run goes on from its checkpoint with the same config."""
    convert_folder(full, tmp_path / "student", 4, "new", torch.float32)
    again = convert(str(tmp_path / "student"), 4, "new")
    assert (again.config.mask_token_id, again.config.vocab_size, again.tokenizer.mask_token) == (PLAIN, 320, "<|mask|>")


def test_rollouts_and_learner_start_from_the_same_rows(full):
    conversion = convert(full, 4, "new")
    a, b = (load_converted(full, conversion, torch.float32, "sdpa") for _ in range(2))
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name
    assert all(p.requires_grad for p in a.parameters())


def test_tokenizers_are_compared_without_the_mask_token_of_either_side():
    plain, other = tiny_tokenizer("<unused0>"), tiny_tokenizer("<unused0>")
    assert first_difference(plain, other) == ""
    set_mask_token(plain, "auto", PLAIN + 1, set())
    assert first_difference(plain, other) == first_difference(other, plain) == ""
    set_mask_token(plain, "<hole>", PLAIN + 9, set())
    assert first_difference(plain, other) == first_difference(other, plain) == ""
    more = tiny_tokenizer("<unused0>", "<more>")
    assert first_difference(other, more) == "'<more>' is no token in the one and 263 in the other"
    swapped = tiny_tokenizer("<b>", "<a>")
    assert first_difference(tiny_tokenizer("<a>", "<b>"), swapped) == "'<a>' is 262 in the one and 263 in the other"
