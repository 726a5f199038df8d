"""Prompt files in every form, the run's order, and what is said of broken ones."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from common.config.run import DataConfig
from common.prompts import PromptError, load_prompts, prompt_ids, read_records
from deploy.demo.tiny_arlm import build_tokenizer

TOKENIZER = build_tokenizer()
ROWS = [{"question": f"What is {i} + 1?", "answer": i + 1, "domain": "math", "tests": ["x"]} for i in range(6)]


class WordTokenizer:
    """One id per word: fast, and answers like a tokenizer with a chat template."""

    def apply_chat_template(self, messages, **_):
        return {"input_ids": [hash(word) % 1000 for word in messages[0]["content"].split()]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        path.write_text(json.dumps(rows))
    return path


def load(path, seed=0, tokenizer=TOKENIZER, **data):
    return load_prompts(DataConfig(prompts=str(path), **data), tokenizer, seed)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_every_form_gives_the_same_prompts(tmp_path, name):
    found = load(write(tmp_path / name, ROWS), seed=None).prompts
    assert [p.question for p in found] == [row["question"] for row in ROWS]
    assert [p.answer for p in found] == [str(row["answer"]) for row in ROWS]
    assert {p.domain for p in found} == {"math"}
    assert [p.ordinal for p in found] == list(range(6))
    assert all(p.ids.dtype == np.int32 for p in found)


def test_a_folder_is_read_in_sorted_order_with_the_folders_in_it(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[2:4])
    write(tmp_path / "a" / "z.parquet", ROWS[:2])
    write(tmp_path / "c.json", ROWS[4:])
    (tmp_path / "README.md").write_text("not prompts")
    assert [record["question"] for _, record in read_records(tmp_path)] == [row["question"] for row in ROWS]


def test_the_releases_form_needs_no_domain_or_answer(tmp_path):
    rows = [
        {"question": "a"},
        {"question": "b", "domain": "code", "test_cases": {"x": [1]}},
        {"question": "c", "domain": None},
    ]
    found = load(write(tmp_path / "opdlm_train.json", rows), seed=None).prompts
    assert [(p.domain, p.answer) for p in found] == [("", None), ("code", None), ("", None)]


def test_ids_are_the_chat_template_with_the_generation_prompt():
    text = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(prompt_ids(TOKENIZER, "What?")) == text


def test_enable_thinking_reaches_the_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking %}T{% endif %}"
    on, off = (tokenizer.decode(prompt_ids(tokenizer, "q", enable_thinking=value)) for value in (True, False))
    assert on == off + "T"


def test_long_prompts_are_dropped_and_counted(tmp_path):
    rows = [{"question": "short one"}, {"question": "w " * 50}, {"question": "x " * 51}]
    found = load(write(tmp_path / "p.json", rows), tokenizer=WordTokenizer(), max_prompt_tokens=50)
    assert sorted(len(p.ids) for p in found.prompts) == [2, 50]
    assert found.dropped == {"longer than 50 tokens": 1}
    with pytest.raises(PromptError, match=r"all 3 prompts are longer than data\.max_prompt_tokens \(1\); raise it"):
        load(tmp_path / "p.json", tokenizer=WordTokenizer(), max_prompt_tokens=1)


@given(
    count=st.integers(1, 30),
    epochs=st.integers(1, 4),
    limit=st.none() | st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_every_epoch_is_an_order_of_the_same_prompts(tmp_path_factory, count, epochs, limit, seed):
    path = write(tmp_path_factory.mktemp("p") / "p.jsonl", [{"question": str(i)} for i in range(count)])
    found = load(path, seed=seed, tokenizer=WordTokenizer(), epochs=epochs, limit=limit).prompts
    size = min(count, limit or count)
    assert [p.ordinal for p in found] == list(range(size * epochs))
    by_epoch = [[p.question for p in found[e * size : (e + 1) * size]] for e in range(epochs)]
    assert all(len(set(questions)) == size for questions in by_epoch)
    assert all(set(questions) == set(by_epoch[0]) for questions in by_epoch)
    again = load(path, seed=seed, tokenizer=WordTokenizer(), epochs=epochs, limit=limit).prompts
    assert [p.question for p in again] == [p.question for p in found]


def test_order_depends_on_seed_and_epoch(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"question": str(i)} for i in range(50)])
    first = [p.question for p in load(path, seed=0, tokenizer=WordTokenizer(), epochs=2).prompts]
    other = [p.question for p in load(path, seed=1, tokenizer=WordTokenizer()).prompts]
    assert first[:50] != first[50:]
    assert first[:50] != other


def test_text_may_hold_any_character(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('\ufeff{"question": "line\u2028separator \u00e9"}\r\n{"question": "b"}\r\n', encoding="utf-8")
    assert [record["question"] for _, record in read_records(path)] == ["line\u2028separator \u00e9", "b"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b'{"question": "a"}\n{"question": \n', "p.jsonl, line 2: not valid JSON"),
        ("p.jsonl", b'{"question": "a"}\n\n["a"]\n', "p.jsonl, line 3: expected an object with fields, found list"),
        ("pipeline.json", b'[\n{"question": "a"},\n{"question" "b"}\n]', "pipeline.json, line 3: not valid JSON"),
        ("p.json", b'{"question": "a"}\n{"question": "b"}\n', "one object a line belongs in a .jsonl file"),
        ("p.json", b'{"question": "a"}', "expected a JSON list of objects, found dict"),
        ("p.json", b'[{"question": "a"}, 3]', "p.json, entry 2: expected an object with fields, found int"),
        ("p.json", b"[]", "p.json' is empty"),
        ("p.jsonl", b"\n\n", "p.jsonl' is empty"),
        ("p.json", b"", "p.json' is empty"),
        ("p.jsonl", b'{"question": "\xff"}', "p.jsonl: not UTF-8 text (byte 14)"),
        ("p.parquet", b"PAR0", "p.parquet: not valid Parquet"),
        ("p.txt", b"a", "p.txt' is none of .json, .jsonl, .parquet"),
        ("p.jsonl", b'{"prompt": "a", "id": 1}', "no text in field 'question'; the record has ['id', 'prompt']"),
        ("p.jsonl", b'{"question": "  "}', "p.jsonl, line 1: no text in field 'question'"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError) as error:
        load(tmp_path / name)
    assert said in str(error.value)


def test_missing_file_and_folder_without_prompts(tmp_path):
    with pytest.raises(PromptError, match=r"nope\.jsonl' does not exist; give a JSON"):
        load(tmp_path / "nope.jsonl")
    with pytest.raises(PromptError, match=r"holds no \.json, \.jsonl, \.parquet file"):
        load(tmp_path)


def test_other_field_names(tmp_path):
    path = write(tmp_path / "p.json", [{"prompt": "a", "solution": "1", "topic": "math"}])
    found = load(path, question_field="prompt", answer_field="solution", domain_field="topic").prompts[0]
    assert (found.question, found.answer, found.domain) == ("a", "1", "math")
