"""The shipped tiny model and its tokenizer, and a short training from scratch."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from deploy.demo.tiny_arlm import (
    DATA_SEED,
    IGNORED,
    MAX_RESPONSE,
    build_tokenizer,
    collate,
    exact_match,
    make_tiny_arlm,
    prompt_text,
    write_problems,
)
from deploy.demo.word_problems import generate, split_of

DEPLOY = Path(__file__).parents[2] / "deploy"
SHIPPED = DEPLOY / "models" / "tiny-arlm"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(SHIPPED)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def test_shipped_tokenizer_is_the_built_one(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.mask_token == "<|mask|>"
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}) == 3


@pytest.mark.parametrize("text", ["7+5=12. Answer: 9", " two  spaces \n", "déjà vu 你好", "a user's <|im_end|>"])
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_is_the_training_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    question = generate(0, 1)[0].question
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == prompt_text(question)
    assert len(tokenizer(text)["input_ids"]) == len(question) + 8


def test_collate_labels_only_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    problems = generate(0, 3)
    ids, labels = collate(tokenizer, problems)
    assert ids.shape == labels.shape
    for row, problem in enumerate(problems):
        counted = labels[row] != IGNORED
        assert torch.equal(ids[row][counted], labels[row][counted])
        assert tokenizer.decode(labels[row][counted]) == problem.response + "<|im_end|>"
        assert counted.sum() < MAX_RESPONSE


def test_shipped_model_is_a_small_bfloat16_folder() -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() < 1_000_000
    assert model.config.tie_word_embeddings
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 4_000_000


def test_shipped_model_solves_heldout_problems(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    assert isinstance(model, Qwen3ForCausalLM)
    assert exact_match(model, tokenizer, generate(DATA_SEED, 50, "heldout")) >= 0.9


def test_shipped_problem_files_are_the_generated_ones(tmp_path: Path) -> None:
    write_problems(tmp_path)
    for split in ("train", "heldout"):
        name = f"word_problems_{split}.jsonl"
        assert (tmp_path / name).read_text() == (DEPLOY / "data" / name).read_text()
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert all(set(row) == {"question", "answer", "domain"} for row in rows)
        assert all(split_of(row["question"]) == split for row in rows)


def test_short_training_lowers_the_loss_and_is_deterministic(tmp_path: Path) -> None:
    first, again = (make_tiny_arlm(tmp_path / name, seed=7, steps=12, batch_size=8, heldout=4) for name in ("a", "b"))
    assert first["last_loss"] < first["first_loss"] - 0.5
    assert first["last_loss"] == again["last_loss"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
