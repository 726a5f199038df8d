"""From conversations to ids: templates of every kind, and that a prompt holds its question."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.chat import ChatTemplate, asked_with, missing_turn
from common.config.data import DataConfig
from common.conversations import Conversation, Turn
from common.datasets.errors import PromptError
from common.prompts import load_prompts
from deploy.demo.tiny_arlm import build_tokenizer

TOKENIZER = build_tokenizer()
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
SYSTEM_REFUSED = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Turn(role, text) for role, text in turns), "messages")


def templated(template: str | None):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def prompt(tokenizer, *turns: tuple[str, str], **options) -> str:
    chat = ChatTemplate(tokenizer, **options)
    return tokenizer.decode(chat.ids([chat.text(conversation(*turns))])[0])


def test_ids_are_the_chat_template_with_the_generation_prompt():
    assert prompt(TOKENIZER, ("user", "What?")) == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    ids = ChatTemplate(TOKENIZER).ids([ChatTemplate(TOKENIZER).text(conversation(("user", "What?")))])[0]
    direct = TOKENIZER.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    assert ids.dtype == np.int32
    assert ids.tolist() == direct["input_ids"]


def test_several_turns_and_the_start_of_the_response():
    assert prompt(TOKENIZER, ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt(TOKENIZER, ("user", "a"), ("assistant", "```python\n")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n```python\n"
    )


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_thinking_reaches_the_template(name):
    tokenizer = templated(f"{TOKENIZER.chat_template}{{% if not {name} %}}<think></think>{{% endif %}}")
    on, off = (prompt(tokenizer, ("user", "q"), enable_thinking=value) for value in (True, False))
    assert off == on + "<think></think>"


def test_a_template_that_takes_content_parts():
    assert prompt(templated(PARTS), ("user", "How many?")) == "How many?"
    joined = "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}"
    assert prompt(templated(joined), ("user", "How many?")) == "<How many?>"


def test_without_a_template_the_question_is_the_prompt():
    assert prompt(templated(None), ("user", "How many?")) == "How many?"
    assert prompt(TOKENIZER, ("user", "How many?"), raw=True) == "How many?"
    with pytest.raises(PromptError, match=r"this one has system, user: set data\.chat_template"):
        prompt(templated(None), ("system", "S"), ("user", "How many?"))


def test_raw_text_begins_as_the_tokenizer_begins_it():
    tokenizer = templated(None)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    chat = ChatTemplate(tokenizer)
    ids = chat.ids([chat.text(conversation(("user", "How?")))])[0].tolist()
    assert ids == tokenizer("How?")["input_ids"] == [tokenizer.bos_token_id, *TOKENIZER("How?")["input_ids"]]


def test_a_template_that_leaves_out_the_question_is_refused():
    with pytest.raises(PromptError, match="leaves out what the user says"):
        prompt(templated("<|im_start|>"), ("user", "How many?"))


def load(tmp_path, tokenizer, *rows: str, **data):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(row + "\n" for row in rows))
    return load_prompts(DataConfig(prompts=str(file), **data), tokenizer, None)


def test_templates_that_raise_or_do_not_parse(tmp_path):
    for template, said in (
        ("{{ raise_exception('A system message is required') }}", "A system message is required"),
        ("{% for m in messages %}{{ m.content }", "the chat template refuses it: unexpected '}'"),
    ):
        with pytest.raises(PromptError, match="1 of 1 prompts: the chat template refuses it") as error:
            load(tmp_path, templated(template), '{"question": "a"}')
        assert said in str(error.value)
    with pytest.raises(PromptError, match="System role not supported; fix the tokenizer's chat_template, or give"):
        load(tmp_path, templated(SYSTEM_REFUSED), '{"question": "a"}', system="S")


def test_rows_that_the_template_refuses_are_counted(tmp_path):
    rows = ('{"question": "a"}', '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "b"}]}')
    found = load(tmp_path, templated(SYSTEM_REFUSED), *rows)
    assert [p.question for p in found.prompts] == ["a"]
    assert found.dropped == {"the chat template refuses it: System role not supported": 1}


def empty_tokenizer():
    """What transformers builds where tokenizer.json was not copied: no vocabulary, and no error."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<|im_end|>")
    tokenizer.chat_template = TOKENIZER.chat_template
    return tokenizer


def test_prompts_that_do_not_hold_their_question_are_refused(tmp_path):
    rows = ('{"question": "How many?"}', '{"question": "And now?"}')
    with pytest.raises(PromptError) as error:
        load(tmp_path, empty_tokenizer(), *rows)
    assert (
        f"2 of 2 prompts (100.0%) do not hold their question: {tmp_path}/p.jsonl, line 1, the user's words 'How many?' "
        "are not in" in str(error.value)
    )
    assert "bring tokenizer.json and the chat template from the model's source again" in str(error.value)
    # a template that ignores the system turn
    ignoring = templated("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(PromptError, match=r"the system's words 'Be brief\.' are not in 'How many"):
        load(tmp_path, ignoring, *rows, system="Be brief.")
    # a template that cuts
    cutting = templated("{% for m in messages %}{{ m.content[:20] }}{% endfor %}")
    with pytest.raises(PromptError, match=r"1 of 2 prompts \(50\.0%\) do not hold"):
        load(tmp_path, cutting, rows[0], '{"question": "%s"}' % ("long " * 10))


def word_tokenizer(**parts):
    backend = Tokenizer(models.WordLevel({"[unk]": 0, "how": 1, "many": 2, "?": 3, "now": 4}, unk_token="[unk]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]")


@pytest.mark.parametrize(
    ("text", "held"),
    [("How MANY?", True), ("Hów  many?\n", True), ("how many now 🙂", True), ("something else", False)],
)
def test_what_a_tokenizer_normalises_is_held(text, held):
    tokenizer = word_tokenizer()
    asked = conversation(("user", text))
    missing = missing_turn(tokenizer, asked, tokenizer.decode(tokenizer(text)["input_ids"]))
    assert missing == (None if held else asked.turns[0])


def test_what_was_thought_in_an_earlier_turn_may_be_left_out():
    asked = conversation(("user", "a?"), ("assistant", "<think>hm</think>b"), ("user", "c?"))
    assert missing_turn(TOKENIZER, asked, "a? b c?") is None
    assert missing_turn(TOKENIZER, asked, "b c?") == asked.turns[0]
    start = conversation(("user", "a?"), ("assistant", "It is"))
    assert missing_turn(TOKENIZER, start, "a?") == start.turns[1]


def test_a_prompt_with_the_mask_token_is_dropped(tmp_path):
    found = load(tmp_path, TOKENIZER, '{"question": "a <|mask|> b"}', '{"question": "c"}')
    assert [p.question for p in found.prompts] == ["c"]
    assert found.dropped == {"holds the mask token '<|mask|>'": 1}


def test_a_checkpoint_records_how_it_was_asked():
    data = DataConfig(prompts="p", enable_thinking=True, system="S", templates={"math": "m {question}"}, limit=3)
    assert asked_with(data) == {"enable_thinking": True, "system": "S", "templates": {"math": "m {question}"}}
