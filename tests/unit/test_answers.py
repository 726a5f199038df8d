r"""Reading a response's final answer, and when it is right: tables of what models write and data sets hold."""

import datetime
import time
from decimal import Decimal
from typing import Any

import pytest

from common.answers import final_answer, is_correct, reference_text
from common.config.evaluation import AnswerFormat
from common.math_equality import mathematically_equal


@pytest.mark.parametrize(
    ("answer_format", "text", "answer"),
    [
        ("answer_line", "Answer: 3. No, Answer: -4", "-4"),
        ("answer_line", "First 7+5=12. Answer: 12", "12"),
        ("answer_line", "Answer: 3 Answer: 14<|im_end|>", "14"),
        ("answer_line", "Answer: -2", "-2"),
        ("answer_line", "Answer: 15\nAnswer:", "15"),
        ("answer_line", "so it is 4", None),
        ("answer_line", "", None),
        ("boxed", r"first \boxed{1}, then \boxed{\frac{1}{2}} holds", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1", None),
        ("boxed", r"\boxed{1} and \boxed{2", "1"),
        ("boxed", "1", None),
        ("last_number", "3 apples cost $1,200.50, in all", "1,200.50"),
        ("last_number", "12, and that is it", "12"),
        ("last_number", "none", None),
    ],
)
def test_final_answer(answer_format: AnswerFormat, text: str, answer: str | None) -> None:
    assert final_answer(text, answer_format) == answer


RIGHT = [
    # thousands, decimals, leading zeros
    ("Answer: 1,200", "1200"),
    ("Answer: 1200", "1,200"),
    ("Answer: 100,000,000", "100000000"),
    ("Answer: 1,00,000", "100000"),
    ("Answer: 1'200", "1200"),
    (r"Answer: 1\,200", "1200"),
    (r"Answer: 1{,}200", "1200"),
    ("Answer: 1\u202f200", "1200"),
    ("Answer: 3.5", "3.50"),
    ("Answer: 7.0", "7"),
    ("Answer: .5", "0.5"),
    ("Answer: 003", "3"),
    ("Answer: 3", "003"),
    ("Answer: １２", "12"),  # noqa: RUF001
    # signs
    ("Answer: −4", "-4"),  # noqa: RUF001
    ("Answer: - 4", "-4"),
    ("Answer: +5", "5"),
    ("Answer: -$1,200.00", "-1200"),
    ("Answer: $-5", "-5"),
    # fractions and powers
    ("Answer: 1/2", "0.5"),
    ("Answer: 2/4", "1/2"),
    ("Answer: 3½", "3.5"),
    ("Answer: 3 1/2", "3.5"),
    (r"Answer: $\frac{1}{2}$", "0.5"),
    (r"Answer: \(\dfrac12\)", "1/2"),
    (r"Answer: 3\frac{1}{2}", "7/2"),
    (r"Answer: -\frac{3}{4}", "-0.75"),
    (r"Answer: \frac{-3}{4}", "-0.75"),
    ("Answer: 1e3", "1000"),
    ("Answer: 1.5e-3", "0.0015"),
    (r"Answer: 2 \times 10^3", "2000"),
    # currency, percent, units
    ("Answer: $15", "15"),
    (r"Answer: \$1,200", "1200"),
    ("Answer: €15", "15"),
    ("Answer: 15€", "15"),
    ("Answer: 15 USD", "15"),
    ("Answer: 15 dollars", "$15"),
    ("Answer: 50%", "50"),
    ("Answer: 50%", "0.5"),
    ("Answer: 0.5", "50%"),
    (r"Answer: 25\%", "25%"),
    ("Answer: 15 apples", "15"),
    ("Answer: 15 red apples, because 7 + 8 = 15", "15 apples"),
    ("Answer: 5cm", "5"),
    ("Answer: 5 cm", r"5 \text{ cm}"),
    ("Answer: 3 minutes", "3 min"),
    ("Answer: 12 m^2", "12"),
    (r"Answer: 90^\circ", "90"),
    ("Answer: 1st", "1"),
    ("Answer: 1.5 million people", "1,500,000"),
    # around it
    ("**Answer:** 15", "15"),
    ("**Answer**: 15.", "15"),
    ("Answer:15", "15"),
    ("Answer: **15**", "15"),
    ("Answer: `15`", "15"),
    ("Answer: {15}", "15"),
    ("Final Answer:\n15", "15"),
    ("ANSWER: 15!", "15"),
    ("Answer: 15 - that is all", "15"),
    ("Answer: 15 (since 7 + 8 = 15)", "15"),
    ("Answer: x = 5", "5"),
    ("Answer: $x = 5$", "5"),
    ("Answer: 12 + 3 = 15", "15"),
    (r"Answer: \boxed{15}", "15"),
    # choices and words
    ("Answer: (B)", "B"),
    ("Answer: B) Paris", "B"),
    ("Answer: c", "C"),
    (r"Answer: \text{(C)}", "C"),
    ('{"answer": "C"}', "C"),
    ("Answer: Paris.", "paris"),
    ("Answer: The Hague", "the hague"),
    ("Answer: 12:30", "12:30"),
    # mathematics
    ("Answer: (1,2)", "(1, 2)"),
    ("Answer: x+1", "1+x"),
    (r"Answer: \sqrt{8}", r"2\sqrt{2}"),
    (r"Answer: 6\pi", "6π"),
    # references
    ("Answer: 2", '["3", "2"]'),
    ("Answer: 18", "worked 9*2=18\n#### 18"),
    ("Answer: 18", r"so it is \boxed{18}."),
    ("Answer: 18", "He has 18.\nAnswer: 18"),
]
WRONG = [
    ("Answer: 12", "1"),
    ("Answer: 1", "12"),
    ("Answer: 120", "1,200"),
    ("Answer: 1,2", "12"),
    ("Answer: 1.200", "1200"),
    ("Answer: 4", "-4"),
    ("Answer: 1/2", "1"),
    ("Answer: 15 1/2", "15"),
    ("Answer: 3-4", "3"),
    ("Answer: 3 or 4", "3"),
    ("Answer: 1, 2 and 3", "1"),
    ("Answer: 10 - 3", "10"),
    ("Answer: 2^10", "2"),
    ("Answer: 11;s. Then 10-1=9", "9"),
    ("Answer: 5x", "5"),
    ("Answer: 5 cm", "5 apples"),
    ("Answer: 3:00", "3"),
    ("Answer: 50%", "5"),
    ("Answer: 1.5 million", "1.5"),
    ("Answer: unknown", "3"),
    ("Answer: ", "3"),
    ("12", "12"),
    ("Answer: A", "B"),
    ("Answer: AB", "BA"),
    ("Answer: [1,2)", "[1,2]"),
    ("Answer: " + "9" * 5000, "9"),
    ("Answer: 3", ""),
]


@pytest.mark.parametrize(("text", "reference"), RIGHT)
def test_right_answers(text: str, reference: str) -> None:
    assert is_correct(text, reference, "answer_line")


@pytest.mark.parametrize(("text", "reference"), WRONG)
def test_wrong_answers(text: str, reference: str) -> None:
    assert not is_correct(text, reference, "answer_line")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (r"\boxed{033}", "33"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\frac{1}{2}} then \boxed{7", "1/2"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\{1,2\}}", "2,1"),
        (r"\boxed{5\text{ apples}}", "5"),
        (r"\boxed{x=5}", "5"),
        (r"$\boxed{\text{Paris}}$", "Paris"),
        (r"\boxed{\$1,200}", "1200"),
        (r"\boxed{x+1}", "x+1"),
    ],
)
def test_boxes(text: str, reference: str) -> None:
    assert is_correct(text, reference, "boxed")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("The total is 1,200", "3 * 400 = <<3*400=1200>>1200 #### 1200"),
        ("7 - 5 = 2", "2"),
        ("7-5", "5"),
        ("it is -5", "-5"),
        ("it is −5.", "-5"),  # noqa: RUF001
        ("costs -$5", "-5"),
        ("half, 1/2", "0.5"),
        (r"half, \frac{1}{2}", "0.5"),
        ("3 1/2 cups", "3.5"),
        ("on 12/25/2024", "2024"),
        ("50%", "50"),
        ("(5)", "5"),
    ],
)
def test_last_numbers(text: str, reference: str) -> None:
    assert is_correct(text, reference, "last_number")
    assert not is_correct(text, "77", "last_number")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("003", "003"),
        (3, "3"),
        (3.0, "3.0"),
        (Decimal("3.50"), "3.50"),
        (datetime.date(2024, 1, 1), "2024-01-01"),
        (["3"], "3"),
        (["3", None, 4], '["3", "4"]'),
        ("['3']", "3"),
        ('["3", "4"]', '["3", "4"]'),
        ("[1,2]", "[1,2]"),
        ("[1, 2)", "[1, 2)"),
        ({"value": 3}, "3"),
        ('{"value": 3}', "3"),
        ({"text": ["a"]}, "a"),
        *((nothing, None) for nothing in (None, "", " ", "NaN", "null", "#### ", [], [None], {"value": None}, {})),
        (float("nan"), None),
        (float("inf"), None),
        (Decimal("nan"), None),
    ],
)
def test_references(value: Any, text: str | None) -> None:
    assert reference_text(value) == text
    assert text is None or reference_text(text) == text


def test_computer_algebra_has_a_deadline_and_a_memory_limit() -> None:
    start = time.monotonic()
    assert not mathematically_equal("1", "9^{9^{9^{9}}}")
    assert not mathematically_equal("1", "(1000!)!")
    assert time.monotonic() - start < 200
    assert mathematically_equal("2x", "x+x")  # and works again afterwards
