"""The forms in which rows come: questions, messages, ShareGPT, Alpaca; templates and system turns around them."""

import json

import pytest

from common.config.data import DataConfig
from common.conversations import LeftOut, conversation_of, template_for
from common.datasets.errors import PromptError

USER = {"role": "user", "content": "How many?"}
FULL = {"role": "assistant", "content": "Four apples."}


def turns(record, **data):
    found = conversation_of("p.jsonl, line 1", record, DataConfig(prompts="p", **data))
    return [(turn.role, turn.text) for turn in found.turns]


def start(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "How many?"}, [("user", "How many?")]),
        ({"messages": [USER]}, [("user", "How many?")]),
        ({"question": None, "messages": [USER]}, [("user", "How many?")]),
        ({"question": "q", "messages": [USER]}, [("user", "q")]),
        ({"question": [USER]}, [("user", "How many?")]),
        ({"prompt": [USER]}, [("user", "How many?")]),
        ({"messages": json.dumps([USER, FULL])}, [("user", "How many?")]),
        ({"question": ' [{"role": "user", "content": "How many?"}]'}, [("user", "How many?")]),
        ({"question": '[{"role": "is no JSON'}, [("user", '[{"role": "is no JSON')]),
        ({"question": "[1, 2]"}, [("user", "[1, 2]")]),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, USER, FULL, {"role": "user", "content": "Why?"}]},
            [("system", "Be brief."), ("user", "How many?"), ("assistant", "Four apples."), ("user", "Why?")],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]}, [("user", "ab")]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, [("user", "Hi")]),
        (
            {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}]},
            [("system", "Be kind."), ("user", "Hi")],
        ),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, [("user", "Add.\n\n1 and 2")]),
        ({"instruction": "Add.", "input": ""}, [("user", "Add.")]),
        (
            {"instruction": "And?", "system": "S", "history": [["a", "b"], ["c", "d"]]},
            [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "And?")],
        ),
    ],
)
def test_forms(record, expected):
    assert turns(record) == expected


@pytest.mark.parametrize(
    ("field", "last", "kept"),
    [
        ("messages", FULL, False),
        ("messages", start("Let us see", prefix=True), True),
        ("messages", start("```python\n"), True),
        ("messages", start("```python\nx\n```"), False),
        ("messages", start("<think>\nWell"), True),
        ("messages", start("Answer: "), True),
        ("messages", start("Answer:"), True),
        ("messages", start("Paris"), False),
        ("prompt", start("Paris is"), True),
    ],
)
def test_an_assistant_turn_at_the_end_is_a_start_or_a_response(field, last, kept):
    record = {field: [USER, last]}
    assert (turns(record)[-1] == ("assistant", last["content"])) is kept
    assert len(turns(record, assistant_turn="start")) == 2
    assert turns(record, assistant_turn="response") == [("user", "How many?")]


def test_several_assistant_turns_at_the_end_are_all_the_response():
    assert turns({"messages": [USER, start("Answer: "), FULL]}) == [("user", "How many?")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "no user turn"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no user turn"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no user turn"),
        ({"messages": [{"role": "user", "content": " "}]}, "no user turn"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "a turn of role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn without text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a turn with other parts than text"),
    ],
)
def test_whole_rows_without_a_prompt_are_left_out(record, reason):
    with pytest.raises(LeftOut, match=reason):
        turns(record)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"prompt": "a", "id": 1},
            "no text in field 'question'; the record has ['id', 'prompt']. Set data.question_field",
        ),
        ({"question": "  "}, "line 1: no text in field 'question'"),
        ({"question": 7}, "line 1: no text in field 'question', but int; the record has"),
        ({"question": b"a"}, "line 1: no text in field 'question', but bytes; the record has"),
        (
            {"messages": ["Hi"]},
            "turn 1 of 'messages': expected an object with 'role' and 'content' or 'from' and 'value'",
        ),
        ({"instruction": "x", "history": ["a"]}, "expected pairs of texts in field 'history', found 'a'"),
        ({"question": "What is \ud83d?"}, r"the text holds half a character, '\ud83d' (a surrogate without its pair)"),
        ({"messages": [USER, {"role": "user", "content": "\udc00"}]}, r"half a character, '\udc00'"),
    ],
)
def test_broken_rows_are_refused_with_their_place(record, said):
    with pytest.raises(PromptError) as error:
        turns(record)
    assert said in str(error.value)


def test_a_field_that_was_named_is_the_only_one_looked_at():
    assert turns({"chat": [USER]}, question_field="chat") == [("user", "How many?")]
    with pytest.raises(PromptError, match="no text in field 'chat'"):
        turns({"messages": [USER]}, question_field="chat")


def test_the_template_goes_around_the_last_user_turn_and_braces_are_text():
    question = "Is {x} or {question} or {0} in \\boxed{}?"
    record = {"messages": [USER, FULL, {"role": "user", "content": question}]}
    found = conversation_of("p", record, DataConfig(prompts="p"))
    asked = found.asked("Q: {question}\nPut it in \\boxed{}.", "Be brief.")
    assert [turn.text for turn in asked.turns] == [
        "Be brief.",
        "How many?",
        "Four apples.",
        f"Q: {question}\nPut it in \\boxed{{}}.",
    ]
    own = conversation_of("p", {"messages": [{"role": "system", "content": "Own."}, USER]}, DataConfig(prompts="p"))
    assert own.asked("{question}", "Be brief.").turns == own.turns


def test_the_template_of_a_domain():
    templates = {"math": "m {question}", "default": "d {question}"}
    assert template_for("math", templates) == "m {question}"
    assert template_for("code", templates) == template_for("", templates) == "d {question}"
    assert template_for("math", {}) == "{question}"


def test_a_question_names_the_conversation():
    one = conversation_of("p", {"question": "a"}, DataConfig(prompts="p")).question
    several = conversation_of("p", {"messages": [USER, FULL, USER]}, DataConfig(prompts="p")).question
    assert one == "a"
    assert several == "user: How many?\n\nassistant: Four apples.\n\nuser: How many?"
