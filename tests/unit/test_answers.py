"""Reading a response's final answer, and comparing it."""

import pytest

from common.answers import final_answer, is_correct, normalised
from common.config.run import AnswerFormat


@pytest.mark.parametrize(
    ("answer_format", "text", "answer"),
    [
        ("answer_line", "Answer: 3. No, Answer: -4", "-4"),
        ("answer_line", "First 7+5=12. Answer: 12", "12"),
        ("answer_line", "Answer: 3 Answer: 14<|im_end|>", "14"),
        ("answer_line", "Answer: -2", "-2"),
        ("answer_line", "so it is 4", None),
        ("answer_line", "", None),
        ("boxed", r"first \boxed{1}, then \boxed{\frac{1}{2}} holds", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1", None),
        ("boxed", "1", None),
        ("last_number", "3 apples cost $1,200.50, in all", "1,200.50"),
        ("last_number", "12, and that is it", "12"),
        ("last_number", "none", None),
    ],
)
def test_final_answer(answer_format: AnswerFormat, text: str, answer: str | None) -> None:
    assert final_answer(text, answer_format) == answer


@pytest.mark.parametrize(("given", "same"), [("$1,200.00", "1200"), (" 7. ", "7"), ("0.50", "0.5"), ("100", "100")])
def test_normalised(given: str, same: str) -> None:
    assert normalised(given) == same


def test_correct_means_equal_after_normalisation() -> None:
    assert is_correct("The total is 1,200", "3 * 400 = <<3*400=1200>>1200 #### 1200", "last_number")
    assert not is_correct("The total is 120", "1200", "last_number")
    assert is_correct("Answer: 12", "12", "answer_line")
    assert not is_correct("Answer: 12", "1", "answer_line")
    assert not is_correct("12", "12", "answer_line")
    assert not is_correct("I do not know", "", "last_number")
    assert is_correct(r"\boxed{x+1}", "x+1", "boxed")
