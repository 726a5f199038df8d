"""Problems that the package reasoning-gym generates, as a file of questions and answers; it needs no download.

    python -m deploy.demo.reasoning_problems --output problems.jsonl --count 200 \\
        --task leg_counting --task 'chain_sum: {max_terms: 3, max_digits: 2}'

Beside each task may stand options of its generator. The answer is scored as in any file of problems: tasks that accept
several answers, such as countdown, are out of place here. The task is the problem's domain.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from common.config.errors import ConfigError

TASKS = ("leg_counting", "chain_sum: {max_terms: 3, max_digits: 2}", "gcd", "letter_counting")
INSTRUCTION = "Give your final answer in a last line that begins with 'Answer:'."


def problems(tasks: Sequence[str], count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` problems of each task, as rows of question, answer and domain.

    Raises:
        ConfigError: the package is not installed, or it knows no such task or option.
    """
    if find_spec("reasoning_gym") is None:
        raise ConfigError("--task: the package reasoning-gym is not installed; install it: pip install reasoning-gym")
    import reasoning_gym

    for task in tasks:
        name, options = named_task(task)
        try:
            generated = reasoning_gym.create_dataset(name, size=count, seed=seed, **options)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"--task: {task!r}: {error}; see the package's gallery of tasks") from error
        for item in generated:
            yield {"question": f"{item['question']}\n{INSTRUCTION}", "answer": item["answer"], "domain": name}


def named_task(text: str) -> tuple[str, dict[str, Any]]:
    """A task's name and the options beside it.

    Raises:
        ConfigError: it is neither `NAME` nor `NAME: {option: value, ...}`.
    """
    try:
        match yaml.safe_load(text):
            case str(name):
                return name, {}
            case dict(given) if len(given) == 1:
                ((name, options),) = given.items()
                if isinstance(name, str) and isinstance(options, dict):
                    return name, options
    except yaml.YAMLError:
        pass
    raise ConfigError(f"--task: {text!r} is no task; write NAME or 'NAME: {{option: value}}'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--task", action="append", help=f"repeatable; default: {', '.join(TASKS)}")
    parser.add_argument("--count", type=int, default=200, help="problems of each task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        rows = list(problems(options.task or TASKS, options.count, options.seed))
    except ConfigError as error:
        parser.error(str(error))
    options.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"wrote {options.output}: {len(rows)} problems")


if __name__ == "__main__":
    main()
