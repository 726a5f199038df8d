"""The problem generator: determinism, disjoint splits, right arithmetic, and how answers are read."""

import re

import pytest

from common.answers import is_correct
from deploy.demo.word_problems import (
    DIFFICULTIES,
    STANDARD,
    Difficulty,
    generate,
    split_of,
)


def test_equal_seeds_give_equal_problems() -> None:
    assert generate(3, 50) == generate(3, 50)
    assert generate(3, 50) == generate(3, 80)[:50]
    assert generate(3, 50) != generate(4, 50)


def test_heldout_questions_never_occur_in_training() -> None:
    heldout = {p.question for p in generate(0, 300, "heldout")}
    train = {p.question for seed in range(3) for p in generate(seed, 2000)}
    assert not heldout & train
    assert all(split_of(q) == "heldout" for q in heldout)
    assert len(heldout) > 290


@pytest.mark.parametrize("difficulty", DIFFICULTIES.values(), ids=list(DIFFICULTIES))
def test_solutions_are_right_and_within_bounds(difficulty: Difficulty) -> None:
    for problem in generate(5, 500, difficulty=difficulty):
        equations = re.findall(r"(\d+)([+-])(\d+)=(\d+)", problem.response)
        total = int(equations[0][0])
        assert len(equations) == difficulty.steps
        assert 1 <= total <= difficulty.start_max
        for left, sign, operand, result in equations:
            assert int(left) == total
            assert 1 <= int(operand) <= difficulty.operand_max
            assert operand in re.findall(r"\d+", problem.question)
            total += int(operand) if sign == "+" else -int(operand)
            assert total == int(result)
            assert 1 <= total <= difficulty.result_max
        assert is_correct(problem.response, problem.answer, "answer_line")
        assert problem.answer == str(total)


def test_lengths_stay_short_and_prompts_vary_modulo_the_block() -> None:
    problems = generate(0, 500)
    assert max(len(p.question) for p in problems) <= 110
    assert max(len(p.response) for p in problems) <= 58
    assert {len(p.question) % 4 for p in problems} == {0, 1, 2, 3}


def test_more_steps_make_longer_solutions() -> None:
    longer = Difficulty(STANDARD.start_max, STANDARD.operand_max, STANDARD.result_max, steps=3)
    assert all(p.response.count("=") == 3 for p in generate(0, 20, difficulty=longer))
