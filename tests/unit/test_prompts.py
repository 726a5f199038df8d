"""Prompts in the run's order, what is left out and said of them, and what identifies them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.data import DataConfig
from common.config.file import load_config, preset_names
from common.datasets.errors import PromptError
from common.prompts import load_problems, load_prompts
from deploy.demo.tiny_arlm import build_tokenizer

TOKENIZER = build_tokenizer()
ROWS = [{"question": f"What is {i} + 1?", "answer": i + 1, "domain": "math", "tests": ["x"]} for i in range(6)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, seed=0, **data):
    return load_prompts(DataConfig(prompts=str(path), **data), TOKENIZER, seed)


def test_a_row_becomes_a_prompt(tmp_path):
    found = load(write(tmp_path / "p.jsonl", ROWS), seed=None)
    assert [p.question for p in found.prompts] == [row["question"] for row in ROWS]
    assert [p.answer for p in found.prompts] == [str(row["answer"]) for row in ROWS]
    assert {p.domain for p in found.prompts} == {"math"}
    assert [p.ordinal for p in found.prompts] == list(range(6))
    assert all(p.ids.dtype == np.int32 for p in found.prompts)
    assert (found.read, found.dropped, found.notes) == (6, {}, ())


def test_the_releases_form_needs_no_domain_or_answer(tmp_path):
    rows = [
        {"question": "a"},
        {"question": "b", "domain": "code", "test_cases": {"x": [1]}},
        {"question": "c", "domain": None},
    ]
    (tmp_path / "opdlm_train.json").write_text(json.dumps(rows))
    found = load(tmp_path / "opdlm_train.json", seed=None).prompts
    assert [(p.domain, p.answer) for p in found] == [("", None), ("code", None), ("", None)]


def test_long_prompts_are_dropped_and_counted(tmp_path):
    around = len(load(write(tmp_path / "p.jsonl", [{"question": "w"}])).prompts[0].ids) - 1
    rows = [{"question": "short one"}, {"question": "w" * 50}, {"question": "x" * 51}]
    found = load(write(tmp_path / "p.jsonl", rows), max_prompt_tokens=around + 50)
    assert sorted(len(p.ids) - around for p in found.prompts) == [9, 50]
    assert (found.read, found.dropped) == (3, {f"longer than {around + 50} tokens": 1})
    with pytest.raises(
        PromptError, match=r"none of 3 rows can be used \(3 longer than 1 tokens\); raise data\.max_prom"
    ):
        load(tmp_path / "p.jsonl", max_prompt_tokens=1)


@given(
    count=st.integers(1, 30),
    epochs=st.integers(1, 4),
    limit=st.none() | st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_every_epoch_is_an_order_of_the_same_prompts(tmp_path_factory, count, epochs, limit, seed):
    path = write(tmp_path_factory.mktemp("p") / "p.jsonl", [{"question": str(i)} for i in range(count)])
    found = load(path, seed=seed, epochs=epochs, limit=limit).prompts
    size = min(count, limit or count)
    assert [p.ordinal for p in found] == list(range(size * epochs))
    by_epoch = [[p.question for p in found[e * size : (e + 1) * size]] for e in range(epochs)]
    assert all(len(set(questions)) == size for questions in by_epoch)
    assert all(set(questions) == set(by_epoch[0]) for questions in by_epoch)
    again = load(path, seed=seed, epochs=epochs, limit=limit).prompts
    assert [p.question for p in again] == [p.question for p in found]


def test_order_depends_on_seed_and_epoch(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"question": str(i)} for i in range(50)])
    first = [p.question for p in load(path, seed=0, epochs=2).prompts]
    other = [p.question for p in load(path, seed=1).prompts]
    assert first[:50] != first[50:]
    assert first[:50] != other


def test_other_field_names(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "solution": "1", "topic": "math"}])
    found = load(path, question_field="prompt", answer_field="solution", domain_field="topic").prompts[0]
    assert (found.question, found.answer, found.domain) == ("a", "1", "math")


def test_templates_and_the_system_turn_are_around_the_question(tmp_path):
    rows = [{"question": "What is {x}?", "domain": "math"}, {"question": "Hi", "domain": "chat"}]
    templates = {"math": "{question}\nPut it in \\boxed{}.", "default": "Say: {question}"}
    found = load(write(tmp_path / "p.jsonl", rows), seed=None, templates=templates, system="Be brief.").prompts
    assert [p.question for p in found] == ["What is {x}?", "Hi"]
    system = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert [TOKENIZER.decode(p.ids) for p in found] == [
        f"{system}What is {{x}}?\nPut it in \\boxed{{}}.<|im_end|>\n<|im_start|>assistant\n",
        f"{system}Say: Hi<|im_end|>\n<|im_start|>assistant\n",
    ]


MATH = "<|im_start|>user\nQ?\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
SCIENCE = (
    "<|im_start|>user\nQ?\nPlease show your choice in the answer field with only the choice letter, e.g., "
    '"answer": "C".<|im_end|>\n'
)
BARE = "<|im_start|>user\nQ?<|im_end|>\n"


PUBLISHED = [name for name in preset_names() if name.startswith("qwen3") or name in ("paper", "released")]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_presets_ask_as_was_published(tmp_path, preset):
    of_math_only = "math" in preset  # whose file names no domain
    data = load_config(preset).data
    write(tmp_path / "p.jsonl", [{"question": "Q?", "domain": d} for d in ("math", "science", "code", "chat", "")])
    data = data.model_copy(update={"prompts": str(tmp_path / "p.jsonl"), "epochs": 1})
    texts = [TOKENIZER.decode(p.ids) for p in load_prompts(data, TOKENIZER, None).prompts]
    expected = [MATH] * 5 if of_math_only else [MATH, SCIENCE, BARE, BARE, BARE]
    assert texts == [text + "<|im_start|>assistant\n" for text in expected]


def test_what_was_read_how_is_said(tmp_path):
    user, full = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b."}
    rows = [
        {"question": "q"},
        {"messages": [user, full]},
        {"messages": [user, {"role": "assistant", "content": "```"}]},
        {"messages": [full]},
        {"instruction": "i", "input": "j"},
    ]
    found = load(write(tmp_path / "p.jsonl", rows))
    assert found.dropped == {"no user turn": 1}
    assert found.notes == (
        "2 of 4 rows are read from the field 'messages'",
        "1 of 4 rows are read from the field 'instruction'",
        "1 of 4 rows end with the start of the assistant's turn, which the response goes on with "
        "(data.assistant_turn: auto)",
        "1 of 4 rows end with a response of the assistant, which is left out of the prompt (data.assistant_turn: auto)",
    )


def test_thinking_without_a_switch_for_it_is_said(tmp_path):
    found = load(write(tmp_path / "p.jsonl", ROWS), enable_thinking=True)
    assert found.notes == ("data.enable_thinking changes nothing: the chat template has no switch for it",)


def test_exact_copies_are_counted_and_dropped_on_demand(tmp_path):
    rows = [{"question": q} for q in ("a", "b", "a", "a")]
    found = load(write(tmp_path / "p.jsonl", rows))
    assert len(found.prompts) == 4
    assert found.notes == ("2 of 4 prompts are exact copies of earlier ones; data.drop_duplicates drops them",)
    found = load(tmp_path / "p.jsonl", seed=None, drop_duplicates=True)
    assert [p.question for p in found.prompts] == ["a", "b"]
    assert (found.read, found.dropped, found.notes) == (4, {"exact copy of an earlier prompt": 2}, ())


def test_problems_without_an_answer_are_left_out_and_counted(tmp_path):
    answers = [float("nan"), "", None, "003", ["3", "4"], {"value": 3}, " NaN ", []]
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)] + [{"question": "q8"}]
    data = DataConfig(prompts=str(write(tmp_path / "p.jsonl", rows)))
    found = load_problems(data, TOKENIZER, 10)
    assert [(p.question, p.answer) for p in found.prompts] == [("q3", "003"), ("q4", '["3", "4"]'), ("q5", "3")]
    assert found.dropped == {"no answer (missing, empty, null or NaN)": 6}
    assert [p.question for p in load_problems(data, TOKENIZER, 2).prompts] == ["q3", "q4"]
    write(tmp_path / "p.jsonl", rows[:3])
    with pytest.raises(
        PromptError, match=r"none of 3 rows can be used \(3 no answer .*set data\.answer_field \('answer'\)"
    ):
        load_problems(data, TOKENIZER, 10)


def test_text_that_no_file_can_hold_is_replaced_beside_the_question(tmp_path):
    rows = [{"question": "q", "domain": "\ud83d", "answer": "\udc00 3"}]
    prompt = load(write(tmp_path / "p.jsonl", rows)).prompts[0]
    assert (prompt.domain, prompt.answer) == ("?", "? 3")


def questions(prompts):
    return [p.question for p in prompts]


def held_out(path, count, seed=0, **data):
    return load_prompts(DataConfig(prompts=str(path), **data), TOKENIZER, seed, count)


def test_held_out_prompts_are_the_end_of_the_order_and_their_copies_are_never_trained_on(tmp_path):
    rows = [{"question": f"What is {i % 12} + 1?"} for i in range(30)]  # every one two or three times
    path = write(tmp_path / "p.jsonl", rows)
    order = questions(load(path).prompts)
    found = held_out(path, 4, epochs=3)
    assert questions(found.held_out) == list(dict.fromkeys(order[::-1]))[:4]
    left = [question for question in order if question not in questions(found.held_out)]
    assert questions(found.prompts[: len(left)]) == left  # in the order that they had
    assert len(found.prompts) == 3 * len(left)
    assert not {p.ids.tobytes() for p in found.prompts} & {p.ids.tobytes() for p in found.held_out}
    assert [p.ordinal for p in found.prompts] == list(range(3 * len(left)))
    assert f"{30 - len(left)} prompts are held out of the training, 4 different ones" in found.notes


def test_held_out_prompts_cost_no_training_prompt_where_a_limit_leaves_enough(tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS)
    assert questions(held_out(path, 2, limit=4).prompts) == questions(load(path, limit=4).prompts)
    assert len(held_out(path, 2, limit=5).prompts) == 4


def test_prompts_that_were_held_out_stay_so_in_a_file_that_has_changed(tmp_path):
    before = held_out(write(tmp_path / "p.jsonl", ROWS), 2)
    more = write(tmp_path / "more.jsonl", [*ROWS, *({"question": f"What is {i} + 2?"} for i in range(5))])
    assert questions(held_out(more, 2).held_out) != questions(before.held_out)
    after = held_out(more, before.held_out)
    assert after.held_out == before.held_out
    assert len(after.prompts) == 9 and not {*questions(before.held_out)} & {*questions(after.prompts)}


def test_too_few_prompts_to_hold_any_out(tmp_path):
    path = write(tmp_path / "p.jsonl", [*ROWS, *ROWS])
    for count in (6, 256):
        with pytest.raises(
            PromptError,
            match=r"p\.jsonl' has 6 different prompts that can be used, and evaluation\.held_out_prompts takes them "
            r"all; give more prompts, or lower evaluation\.held_out_prompts to 5 or less",
        ):
            held_out(path, count)
    assert len(held_out(path, 5).prompts) == 2
