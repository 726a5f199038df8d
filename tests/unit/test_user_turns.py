"""`opdlm prompts`: where a user turn begins and ends, what is dropped, and how an interrupted command goes on."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from actors.responder import SamplerEngine
from common.config.data import DataConfig
from common.config.errors import ConfigError
from common.config.file import REPOSITORY
from common.config.run import RunConfig
from common.prompts import load_prompts
from deploy import user_turns
from deploy.cli import app
from deploy.part_files import PartFiles
from deploy.user_turns import NEAR_DUPLICATE, Written, question_of, user_turn, write_prompts
from tests.models import tiny_qwen3, tiny_tokenizer

LLAMA2 = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN_TOKEN = "<s>{% for m in messages %}<u>{{ m['content'] | trim }}<a>{% endfor %}"


def ids_of(tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


@pytest.mark.parametrize(
    ("template", "special", "prefix", "ends", "marker"),
    [
        (DEFAULT_SYSTEM, [], "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n", ["<|im_end|>"], ""),
        # no space at the end: words begin with the space
        (LLAMA2, [], "[INST]", ["<|im_end|>"], "[/INST]"),
        # the assistant's token ends the user's turn, the tokenizer's eos does not
        (TURN_TOKEN, ["<s>", "<u>", "<a>"], "<s><u>", ["<a>", "<|im_end|>"], ""),
    ],
)
def test_a_user_turn_is_found_in_the_chat_template(template, special, prefix, ends, marker):
    tokenizer = tiny_tokenizer(*special, chat_template=template)
    turn = user_turn(tokenizer, (tokenizer.eos_token_id,), "m")
    assert tokenizer.decode(turn.prefix) == prefix
    assert turn.prefix.dtype == np.int32
    assert [tokenizer.convert_ids_to_tokens(i) for i in turn.end_tokens] == ends
    assert turn.marker == marker


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template .a base model."),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "writes the user's words 2 times"),
        ("{{ messages[0]['content'] }}", "writes nothing before the user's words"),
        ("{{ raise_exception('system turn wanted') }}", "refuses a user turn .system turn wanted."),
    ],
)
def test_templates_without_a_user_turn_are_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        user_turn(tiny_tokenizer(chat_template=template), (1,), "m")


def test_what_cannot_be_used_is_named():
    tokenizer = tiny_tokenizer(chat_template=DEFAULT_SYSTEM)
    turn = user_turn(tokenizer, (tokenizer.eos_token_id,), "m")

    def question(text: str, end: str = "<|im_end|>", least: int = 4) -> tuple[str, str]:
        return question_of(tokenizer, turn, ids_of(tokenizer, text + end), least)

    assert question("  How old is it?\n") == ("How old is it?", "")
    assert question("How old is it?", end="")[1] == "cut at the limit"
    assert question(" \n")[1] == "empty"
    assert question("Why")[1] == "shorter than 4 tokens"
    assert question("How <|im_start|> old is it?")[1] == "holds special tokens"
    half = ids_of(tokenizer, "How old is ä?")
    half = half[half != ids_of(tokenizer, "ä")[1]]
    whole = np.append(half, tokenizer.eos_token_id).astype(np.int32)
    assert question_of(tokenizer, turn, whole, 4)[1] == "not valid UTF-8"
    # spelled with plain tokens, which are read as the special one
    spelled = [ids_of(tokenizer, letter) for letter in "How <|im_start|>?"]
    assert question_of(tokenizer, turn, np.concatenate([*spelled, [tokenizer.eos_token_id]]), 4)[1] == (
        "holds special tokens"
    )


def test_a_turn_that_plain_text_ends_is_cut_there():
    tokenizer = tiny_tokenizer(chat_template=LLAMA2)
    turn = user_turn(tokenizer, (tokenizer.eos_token_id,), "m")
    assert question_of(tokenizer, turn, ids_of(tokenizer, " Why is it? [/INST] Because"), 4) == ("Why is it?", "")


def test_parts_are_counted_in_their_order_until_there_are_enough():
    written = Written(3)
    written.take(pa.table({"question": ["How are you?", "how are YOU", "cut"], "reason": ["", "", "cut at the limit"]}))
    assert (written.prompts, written.enough) == (["How are you?"], False)
    written.take(pa.table({"question": ["Two of them", "Three of us", "not needed"], "reason": ["", "", ""]}))
    assert written.prompts == ["How are you?", "Two of them", "Three of us"]
    assert (written.enough, written.samples) == (True, 5)
    assert written.dropped == Counter({NEAR_DUPLICATE: 1, "cut at the limit": 1})


def run_config(model: str, output, tokens: int = 300) -> RunConfig:
    teacher = {"backend": "transformers", "dtype": "float32", "max_batched_tokens": tokens}
    return RunConfig(model={"path": model}, data={"prompts": str(output)}, teacher=teacher)


OPTIONS = {"count": 8, "max_new_tokens": 40, "min_tokens": 2, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture
def in_this_process(monkeypatch):
    """The engine without Ray, which tests/integration/test_real_model.py starts; returns the indices of its parts."""
    dealt: list[int] = []

    def generated(config, chunks, actors, sampling, tokens):
        engine = SamplerEngine(config.teacher, config.teacher_path, tokens)
        for index, requests in chunks:
            dealt.append(index)
            yield index, engine.respond(requests, sampling, config.seed)

    monkeypatch.setattr(user_turns, "generated", generated)
    monkeypatch.setattr(user_turns, "connect", lambda config: None)
    return dealt


def test_an_interrupted_command_goes_on_and_writes_the_same_prompts(tmp_path, in_this_process):
    model = str(REPOSITORY / "deploy" / "models" / "tiny-arlm")  # a random model writes no characters
    whole = tmp_path / "whole.parquet"
    first = write_prompts(run_config(model, whole), PartFiles(whole), **OPTIONS, note=lambda text: None)
    parts = list(in_this_process)
    assert len(parts) > 3 and parts == list(range(len(parts)))
    assert first.prompts and first.dropped["cut at the limit"]
    assert len(first.prompts) + first.dropped.total() == first.samples >= 8 * OPTIONS["count"]
    assert not whole.with_name("whole.parquet.parts").exists()

    def stop_after_two(text: str) -> None:
        if len(in_this_process) == 2:
            raise KeyboardInterrupt

    broken = tmp_path / "broken.parquet"
    in_this_process.clear()
    with pytest.raises(KeyboardInterrupt):
        write_prompts(run_config(model, broken), PartFiles(broken), **OPTIONS, note=stop_after_two)
    with pytest.raises(ConfigError, match="left by a command with other settings"):
        write_prompts(run_config(model, broken), PartFiles(broken), **{**OPTIONS, "top_p": 0.5}, note=print)
    in_this_process.clear()
    again = write_prompts(run_config(model, broken), PartFiles(broken), **OPTIONS, note=lambda text: None)
    assert in_this_process == parts[2:]
    assert (again.prompts, again.dropped) == (first.prompts, first.dropped)
    read = load_prompts(DataConfig(prompts=str(broken)), tiny_tokenizer(), None)
    assert [p.question for p in read.prompts] == first.prompts


def test_bad_arguments_are_refused_before_anything_is_made(tmp_path):
    model = tiny_qwen3(tmp_path / "model", seed=0)
    student = tmp_path / "student"
    tiny_qwen3(student, seed=0)
    settings = json.loads((student / "config.json").read_text()) | {"mask_token_id": 262}
    (student / "config.json").write_text(json.dumps(settings))
    output = tmp_path / "out.parquet"
    for arguments, message in (
        ([model, "--output", str(tmp_path / "p.jsonl")], "must end in .parquet"),
        ([model, "--output", str(output), "--temperature", "0"], "--temperature: 0 would write one and the same"),
        ([model, "--output", str(output), "--learner.lr", "1"], "--learner.lr: has no meaning here"),
        ([model, "--output", str(output), "--max-new-tokens", "600"], "--max-new-tokens: 600 after the longest prompt"),
        ([str(student), "--output", str(output)], "is a student"),
        ([str(tmp_path / "none"), "--output", str(output)], "does not exist"),
    ):
        result = CliRunner().invoke(app, ["prompts", *arguments])
        assert isinstance(result.exception, ConfigError), arguments
        assert message in str(result.exception)
    assert not output.with_name("out.parquet.parts").exists()
