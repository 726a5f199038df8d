"""The best of several responses to a prompt (BRTS, arXiv 2605.09725): `opdlm respond --keep best`.

A response whose final answer is the prompt's is better than one whose is not; of these the one nearest to the student
(actors/teacher/overlap.py). Where none is right, the teacher is asked once more with the answer as a hint in the
prompt, and that response is kept if it is right; the prompt of the training has no hint. Else the nearest is kept. The
student is `model.path` as it is, read causally. Nearness is a share, so that long responses are not preferred.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from common.answers import is_correct, stated_answer
from common.config.run import RunConfig
from common.prompts import Prompt, hinted_ids

HINT = "(Hint: the answer is {answer}.)"


def hinted_prompts(config: RunConfig, tokenizer: Any, prompts: list[Prompt]) -> dict[int, Prompt]:
    """The prompts that have an answer, by ordinal, with it as a hint."""
    answer_format = config.evaluation.answer_format

    def hint(answer: str) -> str:
        return HINT.replace("{answer}", stated_answer(answer, answer_format))

    ids = hinted_ids(config.data, tokenizer, hint, {p.question for p in prompts})
    return {p.ordinal: replace(p, ids=ids[p.question]) for p in prompts if p.question in ids}


class Candidates:
    """The responses to some prompts, and which of them may be kept.

    Life cycle: constructed with `samples` rows a prompt; `try_again` once with what came of the `unsolved`; then
    `compared` says what must be measured, and `kept` gives the rows.
    """

    def __init__(self, config: RunConfig, prompts: list[Prompt], table: pa.Table, samples: int) -> None:
        self.config = config
        self.prompts = prompts
        self.table = table
        self.right = self._right(table)
        self.first_hinted = len(table)
        own = np.arange(len(table)).reshape(len(prompts), samples)
        self.rows = [rows[self.right[rows]] if self.right[rows].any() else rows for rows in own]

    @property
    def unsolved(self) -> list[Prompt]:
        """The prompts that have no right response."""
        return [p for p, rows in zip(self.prompts, self.rows, strict=True) if not self.right[rows].any()]

    def try_again(self, asked: list[Prompt], table: pa.Table) -> None:
        """One more response to each prompt of `asked`, which were unsolved; it counts if it is right."""
        place = {p.ordinal: i for i, p in enumerate(self.prompts)}
        first = len(self.table)
        self.table = pa.concat_tables([self.table, table])
        self.right = np.concatenate([self.right, self._right(table)])
        for row, prompt in enumerate(asked, start=first):
            if self.right[row]:
                self.rows[place[prompt.ordinal]] = np.array([row])

    def compared(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Prompt and response, int32 ids, of the rows among which nearness decides, by row."""
        ids = self.table["response_ids"]
        return {
            int(row): (prompt.ids, np.asarray(ids[int(row)].as_py(), np.int32))
            for prompt, rows in zip(self.prompts, self.rows, strict=True)
            if len(rows) > 1
            for row in rows
        }

    def kept(self, nearness: dict[int, float]) -> pa.Table:
        """One row a prompt: of several the one with the highest nearness, the first of equals."""
        chosen = [int(max(rows, key=lambda row: nearness.get(int(row), 0.0))) for rows in self.rows]
        table = self.table.take(chosen)
        answers = table[self.config.data.answer_field].to_pylist()
        correct = [None if a is None else bool(self.right[row]) for a, row in zip(answers, chosen, strict=True)]
        columns = {
            "correct": pa.array(correct, pa.bool_()),
            "hinted": pa.array([row >= self.first_hinted for row in chosen], pa.bool_()),
            "overlap": pa.array([nearness.get(row) for row in chosen], pa.float64()),
        }
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    def _right(self, table: pa.Table) -> np.ndarray:
        """bool [rows]: the final answer is the prompt's; false where it has none."""
        data, answer_format = self.config.data, self.config.evaluation.answer_format
        pairs = zip(table[data.response_field].to_pylist(), table[data.answer_field].to_pylist(), strict=True)
        return np.array([a is not None and is_correct(text, a, answer_format) for text, a in pairs], bool)
