"""Seeded arithmetic word problems: the task that the tiny models of this project learn.

A problem tells how many things somebody has and how that number changes; its response works the steps out and
ends in ``Answer: N``. The phrases of the response are drawn at random, so a language model of it has entropy at
a few places and is certain in between, as on natural text.

Held-out problems never occur in training: a question belongs to the held-out split exactly when the first byte
of the SHA-256 of its text is below `HELDOUT_BYTES`, whatever the seed.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_BYTES = 16  # of 256: one question in sixteen is held out

NAMES = ("Tom", "Anna", "Ben", "Lily", "Sam", "Emma", "Jack", "Olivia")
OBJECTS = ("apples", "books", "coins", "pens", "marbles", "cards", "eggs", "stamps")
GAINS = ("buys {n} more", "finds {n}", "gets {n} from a friend", "wins {n}")
LOSSES = ("gives {n} away", "loses {n}", "sells {n}", "gives {n} to a friend")
CLOSINGS = ("How many now?", "How many {objects} now?", "How many {objects} does {name} have?")

FIRST_STEPS = ("First {equation}.", "{name} has {equation} {objects}.", "We get {equation}.")
LATER_STEPS = ("Then {equation}.", "So {equation} {objects}.", "Now {equation}.")


@dataclass(frozen=True)
class Difficulty:
    """How hard the arithmetic is. Numbers are inclusive bounds; every number of a problem is at least 1.

    start_max: of the number somebody has at first.
    operand_max: of the number added or taken away in one step.
    result_max: of every intermediate and final result.
    steps: additions and subtractions in one problem.
    """

    start_max: int = 9
    operand_max: int = 9
    result_max: int = 18
    steps: int = 2


STANDARD = Difficulty()
EASIER = Difficulty(start_max=6, operand_max=5, result_max=10)
HARDER = Difficulty(start_max=20, operand_max=9, result_max=30)
DIFFICULTIES = {"easier": EASIER, "standard": STANDARD, "harder": HARDER}


@dataclass(frozen=True)
class WordProblem:
    """One problem: the question, one worked response (without end token) and its final number as a string."""

    question: str
    response: str
    answer: str


def split_of(question: str) -> Split:
    """The split that a question belongs to, by a hash of its text."""
    return "heldout" if hashlib.sha256(question.encode()).digest()[0] < HELDOUT_BYTES else "train"


def stream(seed: int, split: Split = "train", difficulty: Difficulty = STANDARD) -> Iterator[WordProblem]:
    """Endless problems of one split; equal arguments give equal problems. Questions may repeat."""
    rng = random.Random(seed)
    while True:
        problem = _draw(rng, difficulty)
        if split_of(problem.question) == split:
            yield problem


def generate(seed: int, count: int, split: Split = "train", difficulty: Difficulty = STANDARD) -> list[WordProblem]:
    """The first `count` problems of `stream`."""
    return list(islice(stream(seed, split, difficulty), count))


def _draw(rng: random.Random, difficulty: Difficulty) -> WordProblem:
    name, objects = rng.choice(NAMES), rng.choice(OBJECTS)
    start = total = rng.randint(1, difficulty.start_max)
    events, solution = [], []
    for step in range(difficulty.steps):
        room_up, room_down = difficulty.result_max - total, total - 1
        gains = room_up > 0 and (room_down == 0 or rng.random() < 0.5)
        n = rng.randint(1, min(difficulty.operand_max, room_up if gains else room_down))
        result = total + n if gains else total - n
        events.append(rng.choice(GAINS if gains else LOSSES).format(n=n))
        equation = f"{total}{'+' if gains else '-'}{n}={result}"
        phrase = rng.choice(LATER_STEPS if step else FIRST_STEPS)
        solution.append(phrase.format(equation=equation, name=name, objects=objects))
        total = result
    closing = rng.choice(CLOSINGS).format(name=name, objects=objects)
    story = rng.choice(
        (
            f"{name} has {start} {objects}, {_join(events)}.",
            f"{name} has {start} {objects} and {_join(events, ' then ')}.",
        )
    )
    return WordProblem(f"{story} {closing}", f"{' '.join(solution)} Answer: {total}", str(total))


def _join(events: list[str], last: str = " and ") -> str:
    return ", ".join(events[:-1]) + last * (len(events) > 1) + events[-1]
