"""The suites by name: from where they are read, how they are asked, and how they are scored."""

import json
from pathlib import Path

import pytest

from common.config.errors import ConfigError
from deploy.evaluation.problems import Problem, SuiteProblems, load_problems, source_of
from deploy.evaluation.scoring import chosen_letter, score_all
from deploy.evaluation.suite_options import SuiteOptions
from deploy.evaluation.suites import SUITES
from tests.models import tiny_tokenizer

ROWS = {
    "gsm8k": {"question": "Ann has 2 pens and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5 pens.\n#### 5"},
    "math500": {"problem": "What is $1/2 + 1/4$?", "solution": "\\boxed{3/4}", "answer": "\\frac34", "unique_id": "1"},
    "ifeval": {
        "key": 7, "prompt": "Say yes. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}],
    },
    "humaneval": {
        "task_id": "H/0", "prompt": 'def one():\n    """One."""\n', "entry_point": "one",
        "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n",
    },
    "mbpp": {
        "task_id": 2, "prompt": "Write one().", "code": "def one():\n    return 1", "test_list": ["assert one() == 1"],
        "test_imports": [],
    },
    "arc": {
        "id": "M_1", "question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "mmlu": {"question": "Which is hot?", "choices": ["ice", "snow", "fire", "rain"], "answer": 2, "subject": "heat"},
}  # fmt: skip
RIGHT = {
    "gsm8k": ["So \\boxed{5}.", "She has 5 pens", "Answer: 5", "#### 5.0"],
    "math500": ["\\boxed{0.75}", "It is $\\boxed{\\frac{3}{4}}$."],
    "ifeval": ["yes"],
    "humaneval": ["def one():\n    return 1\n", "    return 1"],
    "mbpp": ["def one():\n    return 1"],
    "arc": ['"answer": "B"', "B", "(B) fire", "The answer is B."],
    "mmlu": ['{"answer": "C"}', "C. fire", "\\boxed{C}"],
}
WRONG = {
    "gsm8k": ["\\boxed{6}", "many", "5 pens and 3 make 8", ""],
    "math500": ["3/4", "\\boxed{3}", ""],  # a box is asked for
    "ifeval": ["yes, sure", ""],
    "humaneval": ["def one():\n    return 2\n", ""],
    "mbpp": ["def two():\n    return 1", ""],
    "arc": ['"answer": "A"', "fire", "Because it is hot", ""],
    "mmlu": ["A", "2", ""],
}


def write(folder: Path, name: str, *rows: dict) -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(tmp_path: Path, name: str, chat: bool = True, **options) -> SuiteProblems:
    file = write(tmp_path, f"{name}.jsonl", ROWS[name])
    suite = SUITES[name]
    tokenizer = tiny_tokenizer() if chat else tiny_tokenizer(chat_template=None)
    settings = {"asked": {}, "template": None, "shots": 0, "count": None, "positions": 4096, **options}
    return load_problems(suite, source_of(suite, str(file), None), tokenizer, **settings)


def prompt(loaded: SuiteProblems, chat: bool = True) -> str:
    tokenizer = tiny_tokenizer() if chat else tiny_tokenizer(chat_template=None)
    return tokenizer.decode(loaded.problems[0].ids)


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


BOX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = '\nPlease show your choice in the answer field with only the choice letter, e.g., "answer": "C".'
SCRIPT = "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
START = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:\n"
    "```python\n"
)
CHAT = {
    "gsm8k": user(ROWS["gsm8k"]["question"] + BOX),
    "math500": user(ROWS["math500"]["problem"] + BOX),
    "ifeval": user(ROWS["ifeval"]["prompt"]),
    "humaneval": user(f"{SCRIPT}```\n{ROWS['humaneval']['prompt']}\n```") + START,
    "mbpp": user(f'{SCRIPT}```\n"""\nWrite one().\nassert one() == 1\n"""\n```') + START,
    "arc": user(f"Which is hot?\nA. ice\nB. fire{LETTER}"),
    "mmlu": user(f"Which is hot?\nA. ice\nB. snow\nC. fire\nD. rain{LETTER}"),
}
PLAIN = {
    "gsm8k": f"Question: {ROWS['gsm8k']['question']}\nAnswer:",
    "math500": f"Problem: {ROWS['math500']['problem']}\nSolution:",
    "ifeval": ROWS["ifeval"]["prompt"],
    "humaneval": ROWS["humaneval"]["prompt"],
    "mbpp": '"""\nWrite one().\nassert one() == 1\n"""\n',
    "arc": "Question: Which is hot?\nA. ice\nB. fire\nAnswer:",
    "mmlu": "Question: Which is hot?\nA. ice\nB. snow\nC. fire\nD. rain\nAnswer:",
}


@pytest.mark.parametrize("name", SUITES)
def test_prompts_with_and_without_a_chat_template(tmp_path, name):
    chat, plain = load(tmp_path, name), load(tmp_path, name, chat=False)
    assert prompt(chat) == CHAT[name]
    assert prompt(plain, chat=False) == PLAIN[name]
    assert (chat.stop, plain.stop) == (SUITES[name].stop, SUITES[name].plain_stop)
    assert chat.problems[0].begun == (SUITES[name].scorer == "code")
    assert not plain.problems[0].begun
    expected = ROWS[name].get(SUITES[name].key_field or "", 1)
    assert chat.problems[0].key == str(expected)


@pytest.mark.parametrize("name", SUITES)
def test_right_and_wrong_responses(tmp_path, name):
    loaded = load(tmp_path, name, chat=SUITES[name].scorer != "code")
    (problem,) = loaded.problems
    for texts, expected in ((RIGHT[name], 1), (WRONG[name], 0)):
        scores = score_all(loaded.suite, [problem] * len(texts), texts)
        own = next(iter(scores[0].ratios))
        assert [score.ratios[own] for score in scores] == [(expected, 1)] * len(texts), texts


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ('{"answer": "D"}', "D"), ("Answer: (C) because", "C"), ("**Answer:** B", "B"), ("\\boxed{A}", "A"),
        ("I think the answer is B, not A.", "B"), ("A", "A"), ("(c)", None), ("A dog.", "A"), ("I'd say so", None),
        ("Bees", None), ("", None), ("The right choice is (D).", "D"), ("Answer: none", None),
    ],
)  # fmt: skip
def test_the_letter_that_a_response_chooses(text, letter):
    assert chosen_letter(text) == letter


def test_templates_and_system_turn_of_the_training_come_before_the_suites_own(tmp_path):
    asked = {"system": "S.", "templates": {"math": "M {question}", "default": "D {question}"}}
    system = "<|im_start|>system\nS.<|im_end|>\n"
    assert prompt(load(tmp_path, "gsm8k", asked=asked)) == system + user(f"M {ROWS['gsm8k']['question']}")
    assert prompt(load(tmp_path, "arc", asked=asked)) == system + CHAT["arc"]  # not trained with one for science
    given = load(tmp_path, "gsm8k", asked=asked, template="T {question}")
    assert prompt(given) == system + user(f"T {ROWS['gsm8k']['question']}")
    assert given.template == "T {question}"


def test_worked_examples_are_earlier_turns(tmp_path):
    example = {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
    write(tmp_path, "gsm8k_train.jsonl", example, {"question": "2 + 2?", "answer": "#### 4"})
    worked = "1 + 1 = 2\nThe answer is \\boxed{2}."
    loaded = load(tmp_path, "gsm8k", shots=1)
    assert prompt(loaded) == (
        f"<|im_start|>user\n1 + 1?{BOX}<|im_end|>\n<|im_start|>assistant\n{worked}<|im_end|>\n{CHAT['gsm8k']}"
    )
    plain = prompt(load(tmp_path, "gsm8k", chat=False, shots=1), chat=False)
    assert plain == f"Question: 1 + 1?\nAnswer: {worked}\n\n{PLAIN['gsm8k']}"
    with pytest.raises(ConfigError, match="has 2 worked examples, not 3; use fewer"):
        load(tmp_path, "gsm8k", shots=3)
    with pytest.raises(ConfigError, match="holds no worked examples for arc; put its file arc_challenge_train or"):
        load(tmp_path, "arc", shots=1)
    with pytest.raises(ConfigError, match="ifeval has no worked examples; use 0"):
        load(tmp_path, "ifeval", shots=1)


def test_rows_that_cannot_be_used_are_counted_or_refused(tmp_path):
    rows = [ROWS["gsm8k"], {"question": "x" * 300, "answer": "1"}, {"question": "1 + 1?", "answer": "2"}]
    file = write(tmp_path, "g.jsonl", *rows)
    suite = SUITES["gsm8k"]
    options = {"asked": {}, "template": None, "shots": 0, "positions": 300}
    loaded = load_problems(suite, source_of(suite, str(file), None), tiny_tokenizer(), count=None, **options)
    assert [(p.ordinal, p.key) for p in loaded.problems] == [(0, "1"), (1, "3")]
    assert loaded.left_out == {"prompt that fills the 300 positions of the model": 1}
    first = load_problems(suite, source_of(suite, str(file), None), tiny_tokenizer(), count=1, **options)
    assert [p.key for p in first.problems] == ["1"]
    assert loaded.less_room(200, 300) == sum(len(p.ids) > 100 for p in loaded.problems) > 0
    with pytest.raises(ConfigError, match=r"none of the problems of .* can be used"):
        load_problems(
            suite, source_of(suite, str(file), None), tiny_tokenizer(), count=None, **{**options, "positions": 20}
        )
    for name, row, said in (
        ("gsm8k", {"question": "1?"}, "this is no row of gsm8k \\(no field 'answer'; its fields are question\\)"),
        ("mmlu", {"question": "1?", "answer": 1}, "this is no row of mmlu \\(no field 'choices'"),
        ("arc", {**ROWS["arc"], "answerKey": "9"}, "this is no row of arc \\('9' is not in list"),
    ):
        broken = write(tmp_path, "broken.jsonl", row)
        with pytest.raises(ConfigError, match=rf"--suite {name}: .*broken.jsonl, line 1: {said}"):
            load_problems(
                SUITES[name], source_of(SUITES[name], str(broken), None), tiny_tokenizer(), count=None, **options
            )


def test_a_folder_of_suites_is_looked_through_by_name(tmp_path):
    file = write(tmp_path, "gsm8k_test.jsonl", ROWS["gsm8k"])
    write(tmp_path, "gsm8k.jsonl", ROWS["gsm8k"])
    assert source_of(SUITES["gsm8k"], None, tmp_path).place == str(file)
    for name, row in ROWS.items():
        if name != "gsm8k":
            stem = SUITES[name].files[-1]
            write(tmp_path, f"{stem}.jsonl", row)
            assert source_of(SUITES[name], None, tmp_path).place == str(tmp_path / f"{stem}.jsonl")
    (tmp_path / "gsm8k_test.jsonl").unlink()
    (tmp_path / "gsm8k.jsonl").rename(tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match=r"holds no file gsm8k_test or gsm8k .*or give it as --suite gsm8k=FILE"):
        source_of(SUITES["gsm8k"], None, tmp_path)
    with pytest.raises(ConfigError, match="is no folder; give one that holds gsm8k_test or gsm8k"):
        source_of(SUITES["gsm8k"], None, tmp_path / "nowhere")
    assert source_of(SUITES["gsm8k"], None, None).place == "openai/gsm8k"


def test_offline_a_suite_of_the_hub_says_what_to_do():
    suite = SUITES["gsm8k"]
    options = {"asked": {}, "template": None, "shots": 0, "count": 1, "positions": 300}
    with pytest.raises(ConfigError) as error:
        load_problems(suite, source_of(suite, None, None), tiny_tokenizer(), **options)
    assert str(error.value).startswith("--suite gsm8k: 'openai/gsm8k' is no file or folder here")
    assert str(error.value).endswith("or give its file as --suite gsm8k=FILE, or --suite-data FOLDER")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--suite: give one of gsm8k, math500, ifeval"),
        ({"suites": ["gsm9k"]}, "--suite: 'gsm9k' is unknown; choose gsm8k, .*, or give a file .* as gsm9k=FILE"),
        ({"suites": ["gsm8k", "gsm8k=x"]}, "--suite: 'gsm8k' is given twice"),
        ({"suites": ["humaneval"]}, "--suite humaneval: runs the programs that the model writes .* say --run-code"),
        ({"suites": ["mbpp=x"]}, "say --run-code"),
        ({"suites": ["gsm8k"], "split": "train"}, "--split: is for --problems"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, said):
    with pytest.raises(ConfigError, match=said):
        options_with(**options).check()


def options_with(**changed) -> SuiteOptions:
    defaults = {
        "suites": [], "folder": None, "problems": None, "split": None, "subset": None, "question_field": "question",
        "answer_field": "answer", "answer_format": None, "template": None, "shots": 0, "count": None, "run_code": False,
    }  # fmt: skip
    return SuiteOptions(**{**defaults, **changed})


def test_any_name_with_a_file_of_questions_and_answers(tmp_path):
    file = write(tmp_path, "mine.jsonl", {"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": 4})
    asked = options_with(suites=[f"sums={file}", f"gsm8k={file}"], problems=str(file), answer_format="boxed")
    asked.check()
    sums, gsm8k, problems = asked.load(tiny_tokenizer(), {}, 300)
    assert [loaded.suite.name for loaded in (sums, gsm8k, problems)] == ["sums", "gsm8k", "mine"]
    assert prompt(sums) == prompt(problems) == user("1 + 1?")
    assert prompt(gsm8k) == user("1 + 1?" + BOX)
    for loaded in (sums, gsm8k, problems):
        assert loaded.suite.answer_formats == ("boxed",)
        scores = score_all(loaded.suite, loaded.problems, ["\\boxed{2}", "Answer: 4"])
        assert [score.ratios["exact_match"] for score in scores] == [(1, 1), (0, 1)]
    assert isinstance(sums.problems[0], Problem)
