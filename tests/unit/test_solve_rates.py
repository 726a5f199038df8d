"""Problems that a model solves sometimes: rates from responses, bounds, and what is refused."""

import json
from importlib.util import find_spec

import pyarrow as pa
import pytest
from pyarrow import parquet

from common.config.errors import ConfigError
from common.config.file import load_config
from deploy.demo.reasoning_problems import TASKS, named_task, problems
from deploy.evaluation.problems import Source


def responses(folder, rates: dict[str, int], samples: int = 5):
    """A file with as many right responses to each question."""
    rows = [
        {
            "question": question,
            "answer": "12" if right is not None else None,
            "domain": "math",
            "response": f"So it is.\nAnswer: {12 if right is None or i < right else 13}",
            "sample": i,
        }
        for question, right in rates.items()
        for i in range(samples)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "responses.parquet")
    return str(folder / "responses.parquet")


RATES = {"never": 0, "rarely": 1, "often": 4, "always": 5, "no answer": None}


def test_problems_within_the_bounds_are_chosen_in_their_order(tmp_path, opdlm):
    output = tmp_path / "chosen.jsonl"
    status, out, err = opdlm("choose", responses(tmp_path, RATES), "--output", str(output))
    assert status == 0, err
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"question": "rarely", "answer": "12", "domain": "math", "solve_rate": 0.2},
        {"question": "often", "answer": "12", "domain": "math", "solve_rate": 0.8},
    ]
    assert "2 of 4 problems (1 never solved, 1 always, 5 responses each)" in " ".join(out.split())
    assert [row["question"] for _, row in Source(str(output)).rows()] == ["rarely", "often"]  # as eval reads them
    opdlm("choose", responses(tmp_path, RATES), "--output", str(output), "--max-rate", "1", "--count", "2")
    assert [json.loads(line)["question"] for line in output.read_text().splitlines()] == ["rarely", "often"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--min-rate", "0.9"], "--min-rate: 0.9 is above --max-rate 0.8; give a lower one"),
        (["--min-rate", "0.3", "--max-rate", "0.7"], "none of 4 problems is solved in 30% to 70% of 5 responses"),
        (["--answer-format", "boxed"], "they are in 0% to 0%: use easier or harder ones"),
    ],
)
def test_bounds_that_leave_nothing_are_refused(tmp_path, opdlm, options, said):
    status, _, err = opdlm("choose", responses(tmp_path, RATES), "--output", str(tmp_path / "c.jsonl"), *options)
    assert status == 2 and said in " ".join(err.split())


def test_files_that_are_no_responses_are_refused(tmp_path, opdlm):
    output = ["--output", str(tmp_path / "c.jsonl")]
    assert "no row of" in opdlm("choose", responses(tmp_path, {"a": None}), *output)[2]
    parquet.write_table(pa.table({"question": ["a"], "answer": ["1"]}), tmp_path / "prompts.parquet")
    assert "has no 'response' in its rows" in opdlm("choose", str(tmp_path / "prompts.parquet"), *output)[2]
    (tmp_path / "text").write_text("a")
    assert "is no Parquet file; give one of opdlm respond" in opdlm("choose", str(tmp_path / "text"), *output)[2]
    assert "is no file; make one with opdlm respond" in opdlm("choose", str(tmp_path / "none"), *output)[2]


def test_a_task_may_have_options():
    assert named_task("gcd") == ("gcd", {})
    assert named_task("chain_sum: {max_terms: 3}") == ("chain_sum", {"max_terms": 3})
    for text in ("chain_sum: 3", "[gcd]", "a: {b", "a: {}, b: {}"):
        with pytest.raises(ConfigError, match=r"^--task: '.*' is no task; write NAME or 'NAME: {option: value}'$"):
            named_task(text)


@pytest.mark.skipif(find_spec("reasoning_gym") is not None, reason="reasoning-gym is installed")
def test_without_the_package_it_is_said_which_one():
    with pytest.raises(ConfigError, match=r"reasoning-gym is not installed; install it: pip install reasoning-gym"):
        list(problems(TASKS, 2, 0))


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="needs reasoning-gym")
def test_problems_of_the_package_are_rows_of_prompts(tmp_path):
    rows = list(problems(TASKS, 3, 0))
    assert len(rows) == 3 * len(TASKS) and rows == list(problems(TASKS, 3, 0))
    assert all(row["question"] and row["answer"] and row["domain"] for row in rows)
    with pytest.raises(ConfigError, match=r"--task: 'no_such_task'"):
        list(problems(["no_such_task"], 1, 0))
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_config("tiny", ["--data.prompts", str(file)]).data.prompts == str(file)
