"""`opdlm generate` and `opdlm eval` on the files that people bring, and asked as the student was trained."""

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import AutoTokenizer
from typer.testing import CliRunner

from actors.sampler.sampler import Sampler
from common.config.file import REPOSITORY
from common.conversion import convert_folder
from deploy import cli
from deploy.evaluation import lm_eval_model
from tests.models import tiny_qwen3

ARLM = REPOSITORY / "deploy/models/tiny-arlm"
SHORT = ("--max-new-tokens", 8, "--rule", "static")
THINKING = "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    convert_folder(tiny_qwen3(folder / "arlm"), folder / "student", 4, "<|mask|>", torch.float32)
    return folder / "student"


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def asked(monkeypatch) -> list[list[int]]:
    """The prompts that reach the sampler, as ids."""
    seen: list[list[int]] = []
    real = Sampler.generate

    def generate(self, requests, decoding):
        requests = list(requests)
        seen.extend(request.prompt_ids.tolist() for request in requests)
        return real(self, requests, decoding)

    monkeypatch.setattr(Sampler, "generate", generate)
    return seen


def texts(student: Path, asked: list[list[int]]) -> list[str]:
    return AutoTokenizer.from_pretrained(student).batch_decode(asked)


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_file_in_any_unicode(opdlm, student, tmp_path, encoding):
    file, out = tmp_path / "p.TXT", tmp_path / "o.jsonl"
    file.write_bytes("How many?\r\n\r\nAnd now?\r\n".encode(encoding))
    assert opdlm("generate", student, "--file", file, "--output", out, *SHORT)[0] == 0
    assert [line["question"] for line in answers(out)] == ["How many?", "And now?"]


def test_values_that_json_does_not_know_are_written_as_text(opdlm, student, tmp_path):
    file, out = tmp_path / "p.parquet", tmp_path / "o.jsonl"
    parquet.write_table(pa.table({"question": ["a", "b"], "asked": [datetime.datetime(2024, 1, 1)] * 2}), file)
    assert opdlm("generate", student, "--file", file, "--output", out, *SHORT)[0] == 0
    assert [line["asked"] for line in answers(out)] == ["2024-01-01T00:00:00"] * 2
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "How many?", "source": "\\ud83d"}\n')
    assert opdlm("generate", student, "--file", file, "--output", out, *SHORT)[0] == 0
    assert answers(out)[0]["source"] == "\ud83d"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"caf\xe9\n", "p.txt, line 1: not UTF-8 text (byte 0xe9)"),
        ("p.txt", b"\n \n", "--file: no prompt in"),
        (
            "p.jsonl",
            b'{"question": "a"}\n{"question": "\\ud83d"}\n',
            "line 2: the text holds half a character",
        ),
        ("p.jsonl", b'{"q": "a"}\n', "no text in field 'question'; the record has ['q']. Set --question-field to the"),
        ("p.jsonl", b'{"question": "a", "finish_reason": "eos"}\n', "has a field 'finish_reason' already; rename it"),
        ("p.jsonl", b'{"messages": [{"role": "tool", "content": "x"}]}\n', "line 1: no prompt (a turn of role 'tool')"),
        ("p.jsonl", b'{"question": "a <|mask|>"}\n', "line 1: the prompt holds the mask token '<|mask|>'"),
        ("p.jsonl", b'{"question": "' + b"long " * 400 + b'"}\n', "positions at block size 4"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_decoded(
    opdlm,
    student,
    tmp_path,
    asked,
    name,
    content,
    said,
):
    (tmp_path / name).write_bytes(content)
    status, out, err = opdlm("generate", student, "--file", tmp_path / name, "--output", tmp_path / "o.jsonl", *SHORT)
    assert (status, out, asked) == (2, "", [])
    assert said in err
    assert not (tmp_path / "o.jsonl").exists()


def test_a_prompt_on_the_command_line(opdlm, student):
    assert opdlm("generate", student, " ")[2] == "error: PROMPT: it is empty; give a question\n"
    assert opdlm("generate", student, "caf\udce9")[2].startswith("error: PROMPT: the text holds half a character")


def test_a_terminal_that_cannot_show_a_character_loses_no_response(student, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("é?\n🙂?\n")
    command = [sys.executable, "-m", "deploy", "generate", str(student), "--file", str(file), *map(str, SHORT)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("per step") == 2
    assert "\\U0001f642?" in done.stdout


def test_the_limit_is_the_models_positions(opdlm, student):
    status, _, err = opdlm("generate", student, "2 + 2?", "--max-new-tokens", 2000)
    assert status == 2
    assert "--max-new-tokens: 2000 after the longest prompt" in err
    assert "512 positions" in err


def test_responses_that_are_done_stay_and_the_command_goes_on(
    opdlm,
    student,
    tmp_path,
    asked,
    monkeypatch,
):
    file, out = tmp_path / "p.txt", tmp_path / "o.jsonl"
    file.write_text("".join(f"{i} + {i}?\n" for i in range(6)))
    command = ("generate", student, "--file", file, "--output", out, "--slots", 2, *SHORT)
    assert opdlm(*command)[0] == 0
    whole = answers(out)
    real = Sampler.generate

    def failing(self, requests, decoding):
        for count, trajectory in enumerate(real(self, requests, decoding)):
            if count == 3:
                raise KeyboardInterrupt
            yield trajectory

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", failing)
        assert opdlm(*command)[0] != 0
    assert len(answers(out)) == 3
    asked.clear()
    status, said, _ = opdlm(*command)
    assert (status, len(asked)) == (0, 3)
    assert "3 of 6 responses are in" in said
    assert answers(out) == whole


def test_messages_system_and_template(opdlm, student, tmp_path, asked):
    file = tmp_path / "p.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "How {many}?"}]}\n{"question": "b"}\n')
    options = ("--system", "Be brief.", "--template", "Q: {question}")
    assert opdlm("generate", student, "--file", file, *options, *SHORT)[0] == 0
    system = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: "
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert texts(student, asked) == [f"{system}How {{many}}?{end}", f"{system}b{end}"]
    assert "--template: 'Q' has no {question}" in opdlm("generate", student, "a", "--template", "Q")[2]


def test_asked_as_the_student_was_trained_unless_told_otherwise(
    opdlm,
    student,
    tmp_path,
    asked,
):
    trained = tmp_path / "trained"
    shutil.copytree(student, trained)
    template = trained / "chat_template.jinja"
    template.write_text(template.read_text() + THINKING)
    edit(
        trained / "config.json",
        opdlm={
            "enable_thinking": True,
            "system": "S.",
            "templates": {"math": "M {question}", "default": "D {question}"},
        },
    )
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"question": "a", "answer": "1", "domain": "math"}\n{"question": "b", "answer": "2"}\n')
    system = "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    evaluate = ("eval", trained, "--problems", problems)
    off = "<think>\n\n</think>\n\n"
    for command, expected in (
        (evaluate, [f"{system}M a{end}", f"{system}D b{end}"]),
        ((*evaluate, "--no-thinking"), [f"{system}M a{end}{off}", f"{system}D b{end}{off}"]),
        (("generate", trained, "a"), [f"{system}a{end}"]),
        (("generate", trained, "a", "--no-thinking"), [f"{system}a{end}{off}"]),
    ):
        asked.clear()
        assert opdlm(*command, *SHORT)[0] == 0
        assert texts(trained, asked) == expected
    for given, expected in ((None, ""), (False, off), (True, "")):
        model = lm_eval_model.BlockDiffusionLM(str(trained), enable_thinking=given, device="cpu")
        assert model.apply_chat_template([{"role": "user", "content": "a"}]).endswith(end + expected)


def test_a_switch_that_changes_nothing_is_refused(opdlm, student):
    for option in ("--thinking", "--no-thinking"):
        status, _, err = opdlm("generate", student, "a", option)
        assert (status, "--thinking: the model's chat template has no switch for thinking" in err) == (2, True)


def test_thinking_is_one_more_option_of_lm_eval(monkeypatch):
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv))
    for option in ([], ["--thinking"], ["--no-thinking"]):
        CliRunner().invoke(cli.app, ["lm_eval", "--model", "opdlm", "--model_args", "pretrained=x", *option])
    plain = ["lm_eval", "--model", "opdlm", "--model_args", "pretrained=x"]
    assert seen == [
        plain,
        [*plain, "--model_args", "enable_thinking=True"],
        [*plain, "--model_args", "enable_thinking=False"],
    ]


@pytest.mark.parametrize("answer", ['"001"', '["1"]', '{"value": 1}', "1.0", '"1 apple"'])
def test_references_in_every_form_are_right_where_they_are(opdlm, tmp_path, answer):
    file, out = tmp_path / "p.jsonl", tmp_path / "o.json"
    question = "Tom has 5 apples, loses 3 and gives 1 away. How many now?"
    file.write_text(f'{{"question": "{question}", "answer": {answer}}}\n{{"question": "{question}", "answer": NaN}}\n')
    command = ("eval", ARLM, "--problems", file, "--autoregressive", "--max-new-tokens", 72, "--output", out)
    status, said, _ = opdlm(*command)
    assert status == 0
    assert "p: 1 left out: no answer (missing, empty, null or NaN)" in said
    report = json.loads(out.read_text())
    assert report["rows"][0]["metrics"]["exact_match"]["mean"] == 1
    assert report["suites"][0]["left_out"] == {"no answer (missing, empty, null or NaN)": 1}


def test_fields_and_splits_of_problems(opdlm, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(f"prompt,solution\n{split} 5 + 3?,8\n")
    command = ("eval", ARLM, "--problems", tmp_path, "--autoregressive", "--max-new-tokens", 8)
    assert "holds several splits, test, train; set --split to one of them" in opdlm(*command)[2]
    assert "Set --question-field to the field" in opdlm(*command, "--split", "test")[2]
    named = ("--split", "test", "--question-field", "prompt")
    assert "set --answer-field ('answer') to the field" in opdlm(*command, *named)[2]
    assert opdlm(*command, *named, "--answer-field", "solution")[0] == 0
